"""Random and degenerate gradients of 2 to 40 tasks, and their Gramians, for tests of solvers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

F64 = torch.float64
Case = tuple[str, Tensor]
"""Kind and matrix J."""


def rows_of(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=F64)


def random_rows(seed: int) -> Tensor:
    """2 to 40 gradients; some agree, some are dependent, some differ in length."""
    draw = torch.Generator().manual_seed(seed)
    T = int(torch.randint(2, 41, (), generator=draw))
    width = T + 20 if seed % 3 else max(1, T - seed % 7)
    common = rows_of(draw, 1, width) * 2 * (seed % 2)
    return (rows_of(draw, T, width) + common) * 10 ** rows_of(draw, T, 1)


DEGENERATE: dict[str, Callable[[torch.Generator, int], Tensor]] = {
    "one direction": lambda draw, T: rows_of(draw, T, 1).abs() @ rows_of(draw, 1, 2 * T),
    "one line": lambda draw, T: rows_of(draw, T, 1) @ rows_of(draw, 1, 2 * T),
    "a zero row": lambda draw, T: rows_of(draw, T, 2 * T) * (torch.arange(T) != T // 2)[:, None],
    "two opposite rows": lambda draw, T: torch.cat([J := rows_of(draw, T - 1, 2 * T), -2 * J[:1]]),
    "a row twice": lambda draw, T: torch.cat([J := rows_of(draw, T - 1, 2 * T), J[:1]]),
    "tiny": lambda draw, T: 1e-12 * rows_of(draw, T, 2 * T),
    "huge": lambda draw, T: 1e12 * rows_of(draw, T, 2 * T),
    "from tiny to huge": lambda draw, T: 10 ** torch.linspace(-12, 12, T, dtype=F64)[:, None] * rows_of(draw, T, 2 * T),
    "single precision": lambda draw, T: rows_of(draw, T, T).float().double(),
}


def cases(random: int, degenerate: int) -> list[Case]:
    found: list[Case] = [("random", random_rows(seed)) for seed in range(random)]
    names = list(DEGENERATE)
    for seed in range(degenerate):
        draw = torch.Generator().manual_seed(10_000 + seed)
        T = 2 if seed < len(names) else int(torch.randint(2, 41, (), generator=draw))
        name = names[seed % len(names)]
        found.append((name, DEGENERATE[name](draw, T)))
    return found


@cache
def gramians(random: int, degenerate: int) -> list[Case]:
    return [(name, J @ J.T) for name, J in cases(random, degenerate)]


SOME = pytest.mark.parametrize(
    ("random", "degenerate"),
    [pytest.param(70, 36, id="100"), pytest.param(1000, 200, id="1200", marks=pytest.mark.slow)],
)
"""Numbers of random and degenerate cases."""
