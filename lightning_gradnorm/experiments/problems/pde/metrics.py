"""Error of a function relative to the exact solution."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class RelativeL2(Metric):
    """The relative L2 error ‖u − u*‖ / ‖u*‖ over all points. 0 is exact, 1 is no better than zero everywhere.

    Shape: Any, the same for both.

    Example:
        >>> RelativeL2()(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]))
        tensor(0.2000)
    """

    higher_is_better = False
    is_differentiable = True
    full_state_update = False

    difference: Tensor
    size: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("difference", "size"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        self.difference = self.difference + (preds - target).square().sum()
        self.size = self.size + target.square().sum()

    @override
    def compute(self) -> Tensor:
        return (self.difference / self.size).sqrt().float()
