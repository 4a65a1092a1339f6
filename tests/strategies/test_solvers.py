"""Our solvers against TorchJD's, against slow plain solutions, against closed forms and the conditions of optimality."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from typing import Any

import minima
import numpy as np
import pytest
import torch
import torchjd.aggregation as jd
from gramians import DEGENERATE, F64, SOME, cases, gramians, random_rows, rows_of
from torch import Tensor

from lightning_gradnorm.strategies.solvers import conflict_averse, fair_shares, shortest_combination

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # cvxpy's


def has_no_shares(name: str) -> bool:
    """A gradient is zero, or a nonnegative combination of them is."""
    return name in ("one line", "a zero row", "two opposite rows")


@SOME
@pytest.mark.parametrize("alpha", [1.0, 2.0, 0.5])
def test_fair_shares_satisfy_their_equation_wherever_they_exist(random: int, degenerate: int, alpha: float) -> None:
    none: Counter[str] = Counter()
    for name, G in gramians(random, degenerate):
        w = fair_shares(G, alpha)
        if w is None:
            none[name] += 1
            continue
        right = w ** (-1 / alpha)
        assert float(w.min()) > 0
        assert float(((G @ w - right).abs() / ((G * w).abs().sum(dim=1) + right)).max()) <= 1e-10, name
    certain = {name for name in DEGENERATE if has_no_shares(name)}
    # Gradients in fewer dimensions than there are tasks often cancel each other.
    assert set(none) <= certain | {"random", "from tiny to huge"}
    assert none["random"] <= random / 6
    assert (
        none["a zero row"]
        == none["two opposite rows"]
        == sum(n == "a zero row" for n, _ in gramians(random, degenerate))
    )


@SOME
def test_no_convex_combination_is_shorter_than_the_shortest(random: int, degenerate: int) -> None:
    """``g_w · g_i ≥ ‖g_w‖²`` for all i (up to rounding, of the lengths in the combination) is necessary and sufficient."""
    for (name, J), (_, G) in zip(cases(random, degenerate), gramians(random, degenerate), strict=True):
        w = shortest_combination(G)
        assert w is not None, name
        assert float(w.min()) >= 0
        assert float(w.sum()) == pytest.approx(1, abs=1e-12)
        combined, lengths = w @ J, J.norm(dim=1)
        size = float((w * lengths).sum())
        directions = J / torch.where(lengths > 0, lengths, 1.0)[:, None]
        # per unit of length, so that a long gradient does not hide a short one
        slack = directions @ combined - float(combined @ combined) / torch.where(lengths > 0, lengths, math.inf)
        assert float(slack.min()) >= -1e-9 * size, name


@SOME
@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 2.0])
def test_conflict_averse_weights_satisfy_the_conditions_of_optimality(random: int, degenerate: int, c: float) -> None:
    answered = 0
    for (name, J), (_, G) in zip(cases(random, degenerate), gramians(random, degenerate), strict=True):
        weights = conflict_averse(G, c)
        assert weights is not None, name
        assert bool(weights.isfinite().all())
        if not bool(weights.any()):
            continue
        answered += 1
        J, T = J / float(G.trace()) ** 0.5, len(J)
        v, mean = weights - 1 / T, J.mean(dim=0)
        radius, direction = c * float(mean.norm()), weights @ J
        assert float(v.min()) >= -1e-12
        assert float((v @ J).norm()) == pytest.approx(radius, rel=1e-6), name
        improvements = J @ direction  # the least of them is what the direction maximizes within the ball
        dual = float(v @ improvements / v.sum())  # = g_w · ḡ + c ‖ḡ‖ ‖g_w‖: an upper bound of the least improvement
        assert float(improvements.min()) >= dual - 1e-6 * radius * float((v @ J).norm() / v.sum()), name
    assert answered > random / 2


@SOME
def test_objectives_are_those_of_torchjd_or_better(random: int, degenerate: int) -> None:
    """Where TorchJD's solvers answer: MGDA's Frank-Wolfe stops early, CAGrad's cone program is good to about 1e-8."""
    refused = 0
    for (name, J), (_, G) in zip(cases(random, degenerate), gramians(random, degenerate), strict=True):
        ours, theirs = shortest_combination(G), jd.MGDAWeighting()(G)
        assert ours is not None
        assert float((ours @ J).norm()) <= float((theirs @ J).norm()) + 1e-9 * float(ours @ J.norm(dim=1)), name
        if name in ("tiny", "huge", "from tiny to huge"):
            continue
        try:
            weights = jd.CAGradWeighting(0.5)(G)
        except Exception:  # clarabel gives up
            refused += 1
            continue
        exact = conflict_averse(G, 0.5)
        assert exact is not None
        if bool(weights.any()) and bool(exact.any()):
            unit, mean = J / float(G.trace()) ** 0.5, J.mean(dim=0) / float(G.trace()) ** 0.5
            least, best = (float((unit @ (w @ unit)).min()) for w in (weights, exact))
            assert best >= least - 1e-6 * float(mean @ mean), name
        else:  # at norm_eps both may be right
            assert float(min(weights.sum(), exact.sum())) == 0 or float((exact - weights).abs().max()) <= 1e-6
    assert refused <= (random + degenerate) / 20


@SOME
def test_torchjd_comes_near_the_same_fair_shares(random: int, degenerate: int) -> None:
    """Its least squares end at a residual of 1e-8 of the objective, so ours should be smaller."""
    compared = 0
    for name, G in gramians(random, degenerate):
        G = G / float(G.diagonal().mean())
        if name != "random" or (w := fair_shares(G, 2.0)) is None or len(G) > 12:
            continue
        theirs = jd.FairGradWeighting(2.0)(G)
        mine, other = (float((G @ one - one**-0.5).norm()) for one in (w, theirs))
        assert mine <= other + 1e-9 * float(w.max()), name
        compared += 1
    assert compared >= random / 10


# ---- plain solutions, closed forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("T", [2, 3, 5])
def test_all_solutions_are_those_found_slowly(T: int, seed: int) -> None:
    J = rows_of(torch.Generator().manual_seed(seed), T, 2 * T) + (seed % 3) * torch.ones(1, 2 * T, dtype=F64) / 2
    G = J @ J.T
    found: dict[str, tuple[Any, Any]] = {
        "MGDA": (shortest_combination(G), minima.mgda(G.numpy())),
        "CAGrad": (conflict_averse(G, 0.5), minima.cagrad(G.numpy(), 0.5)),
        "Nash-MTL": (fair_shares(G), minima.fair(G.numpy(), 1.0)),
        "FairGrad": (fair_shares(G, 2.0), minima.fair(G.numpy(), 2.0)),
    }
    for name, (ours, expected) in found.items():
        assert np.abs(ours.numpy() - expected).max() <= 1e-10 * np.abs(expected).max(), name


def test_two_tasks_have_closed_forms() -> None:
    a, b, s = 4.0, 9.0, -3.0  # squared norms, and the inner product
    G = torch.tensor([[a, s], [s, b]], dtype=F64)
    first = (b - s) / (a + b - 2 * s)
    assert shortest_combination(G).tolist() == pytest.approx([first, 1 - first], rel=1e-13)  # type: ignore[union-attr]
    # With w_2 / w_1 = √(a/b), the first equation is a w_1² (1 + s / √(ab)) = 1.
    w = (a * (1 + s / math.sqrt(a * b))) ** -0.5
    assert fair_shares(G).tolist() == pytest.approx([w, w * math.sqrt(a / b)], rel=1e-12)  # type: ignore[union-attr]
    G = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=F64)  # by symmetry along the mean: d = (1 + c) ḡ
    assert conflict_averse(G, 0.5).tolist() == pytest.approx([0.75, 0.75], rel=1e-13)  # type: ignore[union-attr]


def test_orthogonal_gradients_have_closed_forms_for_any_number_of_tasks() -> None:
    squares = torch.logspace(-6, 6, 7, dtype=F64)
    torch.testing.assert_close(fair_shares(squares.diag(), 2.0), squares ** (-2 / 3), rtol=1e-10, atol=0.0)
    torch.testing.assert_close(
        shortest_combination(squares.diag()), 1 / squares / (1 / squares).sum(), rtol=1e-12, atol=0.0
    )


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_common_factor_scales_the_weights_as_the_equations_state(scale: float) -> None:
    J = random_rows(1)
    G = J @ J.T
    for alpha in (1.0, 2.0):
        w, scaled = fair_shares(G, alpha), fair_shares(scale * G, alpha)
        assert w is not None
        torch.testing.assert_close(scaled, w * scale ** (-alpha / (1 + alpha)), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(shortest_combination(scale * G), shortest_combination(G), rtol=1e-9, atol=1e-15)


# ---- edges -----------------------------------------------------------------------------------------------------------


def test_gradients_without_a_common_direction_of_descent() -> None:
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert fair_shares(opposite) is None
    assert shortest_combination(opposite).tolist() == pytest.approx([0.5, 0.5], abs=1e-6)  # type: ignore[union-attr]
    assert conflict_averse(opposite, 0.5).tolist() == [0.0, 0.0]  # type: ignore[union-attr]
    nothing = torch.zeros(3, 3)
    assert fair_shares(nothing) is None
    assert float(shortest_combination(nothing).sum()) == pytest.approx(1)  # type: ignore[union-attr]
    assert conflict_averse(nothing, 0.5).tolist() == [0.0, 0.0, 0.0]  # type: ignore[union-attr]


def test_options_of_cagrad_count_as_in_torchjd() -> None:
    J = random_rows(3)[:4]
    G = J @ J.T / 1e3
    for c, norm_eps in ((0.0, 1e-4), (0.3, 1e-4), (1.5, 1e-4), (0.3, 0.9)):
        with warnings.catch_warnings():
            expected = jd.CAGradWeighting(c, norm_eps)(G)
        torch.testing.assert_close(conflict_averse(G, c, norm_eps), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gramian", [torch.full((2, 2), math.nan), torch.tensor([[1.0, 2.0], [2.0, 1.0]])])
def test_what_is_no_gramian_gives_no_nan(gramian: Tensor) -> None:
    for found in (fair_shares(gramian), shortest_combination(gramian), conflict_averse(gramian, 0.5)):
        assert found is None or bool(found.isfinite().all())
