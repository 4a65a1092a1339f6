"""The score for NASA's C-MAPSS data: a cost for errors of the remaining life, higher for late than for early warnings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class NASAScore(Metric):
    """``Σ exp(−d/13) − 1`` over ``d < 0`` (too early) and ``Σ exp(d/10) − 1`` over ``d ≥ 0`` (too late); lower is better.

    ``d`` is prediction minus truth, in cycles. The score is a sum, usually over one window per engine, so you cannot compare
    scores of sets of different size. A single prediction that is 100 cycles late costs 22,025.

    Source: Saxena, Goebel, Simon, Eklund, *Damage Propagation Modeling for Aircraft Engine Run-to-Failure Simulation*,
    PHM 2008.

    Args:
        kwargs: options of `torchmetrics.Metric`.

    Shape: any, the same for both.

    Example:
        >>> NASAScore()(torch.tensor([90.0]), torch.tensor([100.0])), NASAScore()(torch.tensor([110.0]), torch.tensor([100.0]))
        (tensor(1.1581), tensor(1.7183))
    """

    higher_is_better = False
    is_differentiable = True
    full_state_update = False

    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        if preds.shape != target.shape:
            raise ValueError(
                f"NASAScore: prediction and target should have the same shape; got {tuple(preds.shape)} and "
                f"{tuple(target.shape)}. Squeeze or unsqueeze one of them."
            )
        difference = preds.float() - target.float()
        self.total = self.total + torch.expm1(torch.where(difference < 0, -difference / 13, difference / 10)).sum()

    @override
    def compute(self) -> Tensor:
        return self.total
