"""Solves the problems of TorchJD's aggregators with our own `solvers`, where these are exact and faster.

TorchJD's objects stay as they are: we read their options, and write what they remember, in each call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchjd import aggregation as jd

from lightning_gradnorm.strategies.nash_mtl import bargain
from lightning_gradnorm.strategies.solvers import conflict_averse, fair_shares, shortest_combination

Solver = Callable[[Tensor], Tensor | None]
"""Returns the weights for a Gramian, or ``None`` if it finds none."""


def solver_of(aggregator: nn.Module) -> Solver | None:
    """Return our solver for an aggregator or weighting of TorchJD; ``None`` without one, or if it has hooks of yours.

    A subclass may compute something else, so it has none.

    Example:
        >>> import torch
        >>> solve = solver_of(jd.MGDA())
        >>> solve(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.2000, 0.8000], dtype=torch.float64)
    """
    weighting = getattr(aggregator, "gramian_weighting", getattr(aggregator, "weighting", aggregator))
    solve = _SOLVERS.get(type(aggregator))
    if solve is None or weighting._forward_hooks or weighting._forward_pre_hooks:
        return None
    return partial(solve, weighting)


def _mgda(of: Any, gramian: Tensor) -> Tensor | None:
    return shortest_combination(gramian)


def _cagrad(of: Any, gramian: Tensor) -> Tensor | None:
    if float(gramian.trace()) < of.norm_eps:  # TorchJD's bound for short gradients, an absolute one
        return torch.zeros(len(gramian))
    return conflict_averse(gramian, of.c, of.norm_eps)


def _fairgrad(of: Any, gramian: Tensor) -> Tensor | None:
    return fair_shares(gramian, of.alpha) if of.alpha > 0 else None


def _nash_mtl(of: Any, gramian: Tensor) -> Tensor | None:
    weights = bargain(of, gramian)
    if weights is None and of.step > 0 and not hasattr(of, "prob"):
        of._init_optim_problem()  # TorchJD's would do so in its first call only
    return weights


_SOLVERS: Mapping[type[nn.Module], Callable[[Any, Tensor], Tensor | None]] = {
    jd.CAGrad: _cagrad,
    jd.CAGradWeighting: _cagrad,
    jd.FairGrad: _fairgrad,
    jd.FairGradWeighting: _fairgrad,
    jd.MGDA: _mgda,
    jd.MGDAWeighting: _mgda,
    jd.NashMTL: _nash_mtl,
}
