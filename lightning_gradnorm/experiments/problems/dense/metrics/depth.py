"""Depth errors over pixels of known depth: torchmetrics computes the sums, we add the mask.

The mean is over all such pixels in the whole set, not over images or batches first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics.regression import MeanAbsoluteError, MeanAbsolutePercentageError, MeanSquaredError
from typing_extensions import override

from lightning_gradnorm.experiments.problems.dense.targets import valid_depth


class DepthRMSError(MeanSquaredError):
    """Root mean squared depth error, in the unit of depth (meters).

    Shape: ``(batch, 1, h, w)`` both.

    Example:
        >>> import torch
        >>> DepthRMSError()(torch.tensor([5.0, 5.0, 3.0]), torch.tensor([2.0, 0.0, 2.0]))  # the second is not known; √5
        tensor(2.2361)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(squared=False, **kwargs)

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(*_known(preds, target))


class DepthAbsoluteError(MeanAbsoluteError):
    """Mean absolute depth error, in the unit of depth (meters); "Abs Err" in the literature.

    Shape: ``(batch, 1, h, w)`` both.

    Example:
        >>> import torch
        >>> DepthAbsoluteError()(torch.tensor([5.0, 5.0, 3.0]), torch.tensor([2.0, 0.0, 2.0]))
        tensor(2.)
    """

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(*_known(preds, target))


class DepthRelativeError(MeanAbsolutePercentageError):
    """Mean error divided by true depth, as a fraction (not in percent); "Rel Err" in the literature.

    Shape: ``(batch, 1, h, w)`` both.

    Example:
        >>> import torch
        >>> DepthRelativeError()(torch.tensor([5.0, 5.0, 3.0]), torch.tensor([2.0, 0.0, 2.0]))
        tensor(1.)
    """

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(*_known(preds, target))


def _known(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    valid = valid_depth(target)
    return prediction[valid].float(), target[valid].float()
