"""Windows of an engine's cycles, with its remaining life after the last one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradnorm.experiments.loading.splits import Batch
from lightning_gradnorm.experiments.loading.tensors import TaskTensors


def health_of(rul: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Return the health class: the number of thresholds that the remaining life has reached or fallen below.

    Args:
        rul: Remaining useful life in cycles, any shape.
        thresholds: Thresholds in cycles. Each is the longest life of the next class.

    Returns:
        ``int64`` of the same shape: 0 is the healthiest class, ``len(thresholds)`` the most critical.

    Example:
        >>> health_of(torch.tensor([125.0, 81.0, 80.0, 31.0, 30.0, 0.0]), (80, 30)).tolist()
        [0, 0, 1, 1, 2, 2]
    """
    return sum((rul <= threshold for threshold in thresholds), torch.zeros_like(rul, dtype=torch.int64))


class Windows(TaskTensors):
    """Windows of engines' cycles. Each is cut out on access, so no windows are stored.

    A window that begins before its engine's first cycle is padded in front with that cycle.

    Args:
        cycles: The concatenated cycles of all engines, ``float32``, shape ``(cycles, features)``.
        first: Row of the first cycle of the engine of each window, shape ``(windows,)``.
        last: Row of the last cycle of each window, shape ``(windows,)``.
        units: Number of the engine of each window, shape ``(windows,)``.
        window: Cycles in a window.
        targets: By task name, each of shape ``(windows, ...)``.

    Example:
        >>> cycles, one = torch.arange(5.0)[:, None], torch.tensor([1])
        >>> Windows(cycles, first=one, last=3 * one, units=one, window=2, targets={})[0][0].flatten().tolist()
        [2.0, 3.0]
        >>> Windows(cycles, first=one, last=3 * one, units=one, window=4, targets={})[0][0].flatten().tolist()
        [1.0, 1.0, 2.0, 3.0]
    """

    def __init__(
        self, cycles: Tensor, first: Tensor, last: Tensor, units: Tensor, window: int, targets: dict[str, Tensor]
    ) -> None:
        super().__init__(last, targets)
        self.cycles = cycles
        self.first = first
        self.units = units
        self._back = torch.arange(window - 1, -1, -1)

    def _at(self, index: Tensor) -> Batch:
        last, targets = super()._at(index)
        rows = torch.maximum(last[..., None] - self._back, self.first[index][..., None])
        return self.cycles[rows], targets
