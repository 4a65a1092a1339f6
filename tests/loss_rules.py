"""ReLoBRaLo, SoftAdapt, SLAW and UW-SO from their published equations, in plain floats and fractions, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradnorm.strategies import SLAW, UWSO, ReLoBRaLo, SoftAdapt

Weigh = Callable[[list[float]], list[float]]
"""From the losses of a step to its weights; remembers the steps before."""


def softmax(exponents: Sequence[float]) -> list[float]:
    powers = [math.exp(one) for one in exponents]
    return [one / math.fsum(powers) for one in powers]


def relobralo(alpha: float, tau: float, rho: float) -> Weigh:
    seen: list[list[float]] = []
    weights: list[list[float]] = []

    def balanced(s: int) -> list[float]:
        now, then = seen[-1], seen[s]
        return [len(now) * one for one in softmax([a / (tau * b) for a, b in zip(now, then, strict=True)])]

    def weigh(losses: list[float]) -> list[float]:
        seen.append(losses)
        if len(seen) == 1:
            weights.append([1.0] * len(losses))
        else:
            r = 1 if torch.rand(()).item() < rho else 0
            history = [r * w + (1 - r) * b for w, b in zip(weights[-1], balanced(0), strict=True)]
            weights.append([alpha * h + (1 - alpha) * b for h, b in zip(history, balanced(-2), strict=True)])
        return weights[-1]

    return weigh


def softadapt(beta: float, variant: str = "original", order: int = 1, update_every: int = 1) -> Weigh:
    seen: list[list[float]] = []
    weights: list[float] = []

    def weigh(losses: list[float]) -> list[float]:
        seen.append(losses)
        T, blocks = len(losses), len(seen) // update_every
        if blocks < 2:
            return [1 / T] * T
        if len(seen) % update_every == 0:
            means = np.array(seen).reshape(blocks, update_every, T).mean(axis=1)[-order - 1 :]
            # The slope at the last point of the polynomial through all points.
            slopes = np.polyfit(np.arange(1 - len(means), 1), means, len(means) - 1)[-2]
            if variant == "normalized":
                slopes = slopes / np.abs(slopes).sum()
            factors = means.mean(axis=0) if variant == "loss-weighted" else np.ones(T)
            terms = factors * np.exp(beta * slopes)
            weights[:] = (terms / terms.sum()).tolist()
        return list(weights)

    return weigh


def slaw(beta: Fraction, epsilon: float = 1e-5) -> Weigh:
    averages: list[list[Fraction]] = []
    steps = 0

    def weigh(losses: list[float]) -> list[float]:
        nonlocal steps
        steps += 1
        share = max(Fraction(1, steps), 1 - beta)
        new = [[Fraction(one) ** power for one in losses] for power in (2, 1)]
        old = averages or [[Fraction(0)] * len(losses)] * 2
        averages[:] = [
            [(1 - share) * was + share * one for was, one in zip(*pair, strict=True)]
            for pair in zip(old, new, strict=True)
        ]
        s = [max(math.sqrt(a - b * b), epsilon) for a, b in zip(*averages, strict=True)]
        return [(len(s) / one) / math.fsum(1 / other for other in s) for one in s]

    return weigh


def uwso(tau: float) -> Weigh:
    return lambda losses: softmax([1 / one / tau for one in losses])


class Rule(NamedTuple):
    """A scalarizer and the equations that it is to follow."""

    make: Callable[[], ReLoBRaLo | SoftAdapt | SLAW | UWSO]
    equations: Callable[[], Weigh]


RULES = {
    "ReLoBRaLo": Rule(lambda: ReLoBRaLo(), lambda: relobralo(0.999, 1.0, 0.999)),
    "ReLoBRaLo, quick": Rule(lambda: ReLoBRaLo(0.9, 0.5, 0.7), lambda: relobralo(0.9, 0.5, 0.7)),
    "SoftAdapt": Rule(lambda: SoftAdapt(), lambda: softadapt(0.1)),
    "SoftAdapt, order 3": Rule(lambda: SoftAdapt(-0.5, order=3), lambda: softadapt(-0.5, order=3)),
    "SoftAdapt, loss-weighted": Rule(
        lambda: SoftAdapt(0.5, "loss-weighted", order=2), lambda: softadapt(0.5, "loss-weighted", order=2)
    ),
    "SoftAdapt, normalized": Rule(
        lambda: SoftAdapt(3.0, "normalized", update_every=3), lambda: softadapt(3.0, "normalized", update_every=3)
    ),
    "SLAW": Rule(lambda: SLAW(), lambda: slaw(Fraction(99, 100))),
    "SLAW, quick": Rule(lambda: SLAW(beta=0.75), lambda: slaw(Fraction(3, 4))),
    "UWSO": Rule(lambda: UWSO(tau=2.0), lambda: uwso(2.0)),
}


class ByEquations(nn.Module):
    """What a loop by hand takes for a scalarizer."""

    def __init__(self, weigh: Weigh) -> None:
        super().__init__()
        self.weigh = weigh

    def forward(self, values: Tensor) -> Tensor:
        return (values.new_tensor(self.weigh(values.tolist())) * values).sum()


def weights_of(scalarizer: nn.Module, losses: Sequence[float], dtype: torch.dtype = torch.float64) -> list[float]:
    """The derivatives of the scalarization by the losses."""
    values = torch.tensor(losses, dtype=dtype, requires_grad=True)
    scalarizer(values).backward()
    assert values.grad is not None
    found: list[float] = values.grad.tolist()
    return found
