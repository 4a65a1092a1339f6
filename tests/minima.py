"""The problems of MGDA, CAGrad, FairGrad and Nash-MTL, solved slowly and plainly: all faces, bisection, one weight at a time.

An oracle for `lightning_gradnorm.strategies.solvers`, which uses other methods. For few tasks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchjd.aggregation as jd
from scipy.optimize import brentq
from torch import Tensor

from lightning_gradnorm import strategies

Array = Any


def least_on_simplex(A: Array, b: Array) -> Array:
    """The ``w ≥ 0`` with sum 1 that minimizes ``½ wᵀA w + b·w``: the best of the stationary points of all faces."""
    T, best, found = len(b), math.inf, None
    for size in range(1, T + 1):
        for face in map(list, itertools.combinations(range(T), size)):
            system = np.block([[A[np.ix_(face, face)], np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
            on = np.linalg.lstsq(system, np.append(-b[face], 1.0), rcond=None)[0][:size]
            if on.min() < -1e-12:
                continue
            w = np.zeros(T)
            w[face] = on
            value = 0.5 * w @ A @ w + b @ w
            if value < best:
                best, found = value, w
    return found


def mgda(G: Array) -> Array:
    """The shortest convex combination."""
    return least_on_simplex(2 * G, np.zeros(len(G)))


def cagrad(G: Array, c: float, norm_eps: float = 1e-4) -> Array:
    """Mean gradient plus the correction by the worst combination, whose length r is found by bisection.

    ``‖g_w‖ = min over r of (‖g_w‖²/r + r) / 2``, so for a given r the problem is quadratic.
    """
    T = len(G)
    G = G / np.trace(G)
    slopes = G.mean(axis=1)
    radius = c * math.sqrt(slopes.mean())

    def combination(r: float) -> Array:
        return least_on_simplex(radius / r * G, slopes)

    def excess(r: float) -> float:
        w = combination(r)
        return float(math.log(w @ G @ w) / 2 - math.log(r))

    r = brentq(excess, 1e-5, 2.0, xtol=1e-15, rtol=1e-14, maxiter=200)
    return np.full(T, 1 / T) + radius / r * combination(r) if r >= norm_eps else np.zeros(T)


def fair(G: Array, alpha: float) -> Array:
    """``G w = w^(−1/alpha)``: solve for one weight after the other, until none changes."""
    w = np.diag(G) ** (-1 / (1 + 1 / alpha))
    for _ in range(100_000):
        before = w.copy()
        for i in range(len(w)):
            rest = G[i] @ w - G[i, i] * w[i]
            if alpha == 1:  # stable for either sign of the rest
                root = math.sqrt(rest**2 + 4 * G[i, i])
                w[i] = (root - rest) / (2 * G[i, i]) if rest < 0 else 2 / (root + rest)
            else:
                size = abs(math.log(w[i])) + 20

                def excess(log: float, rest: float = rest, i: int = i) -> float:
                    return float(G[i, i] * math.exp(log) + rest - math.exp(-log / alpha))

                w[i] = math.exp(brentq(excess, -size, size, xtol=1e-15, rtol=1e-14))
        if np.abs(w / before - 1).max() < 1e-15:
            break
    return w


def exactly(made: Any) -> Callable[[Tensor], Tensor]:
    """What an aggregator or weighting makes of J; by the functions above if it poses one of their problems."""
    if isinstance(made, jd.NashMTL):
        return _NashMTL(made.max_norm, made.update_weights_every)
    if isinstance(made, strategies.NashMTL):
        of = made.gramian_weighting
        return _NashMTL(of.max_norm, of.update_weights_every)
    of = getattr(made, "gramian_weighting", made)
    if isinstance(of, jd.MGDAWeighting):
        return _of_gramian(mgda)
    if isinstance(of, jd.CAGradWeighting | strategies.CAGradWeighting):
        return _of_gramian(lambda G: cagrad(G, of.c, of.norm_eps))
    if isinstance(of, jd.FairGradWeighting | strategies.FairGradWeighting):
        return _of_gramian(lambda G: fair(G, of.alpha))
    return (lambda J: made(J @ J.T) @ J) if isinstance(made, jd.Weighting) else made  # type: ignore[no-any-return]


def _of_gramian(solve: Callable[[Array], Array]) -> Callable[[Tensor], Tensor]:
    return lambda J: torch.from_numpy(solve((J @ J.T).numpy())) @ J


class _NashMTL:
    """Algorithm 1, with the options of TorchJD."""

    def __init__(self, max_norm: float, every: int) -> None:
        self.max_norm, self.every, self.calls = max_norm, every, 0
        self.weights: Array = None

    def __call__(self, J: Tensor) -> Tensor:
        if self.calls % self.every == 0:
            G = (J @ J.T).numpy()
            self.weights = fair(G, 1.0)
        self.calls += 1
        direction = torch.from_numpy(self.weights) @ J
        norm = float(direction.norm())
        return direction * min(1.0, self.max_norm / norm) if self.max_norm else direction
