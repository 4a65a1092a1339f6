"""Metrics of a target in its own units, whatever units it is trained in; missing targets do not count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.regression import MeanSquaredError, R2Score
from typing_extensions import override


def _present(preds: Tensor, target: Tensor, mean: float, unit: float) -> tuple[Tensor, Tensor]:
    """Return the pairs whose target is not NaN, less ``mean`` and times ``unit``.

    Less the mean, for squares of a number far from zero have no digits left for its deviations.
    """
    if preds.shape != target.shape:
        raise ValueError(
            f"tabular metrics: prediction and target should have the same shape; got {tuple(preds.shape)} and "
            f"{tuple(target.shape)}. Squeeze or unsqueeze one of them."
        )
    there = ~target.isnan()
    return (preds[there].float() - mean) * unit, (target[there].float() - mean) * unit


class RMSE(MeanSquaredError):  # noqa: N818  not an exception
    """Root of the mean squared error, in the target's own units.

    Args:
        mean: The target's mean over the training rows, in the units of predictions and targets.
        unit: What these are multiplied by to be in the target's own units.
        kwargs: As for `torchmetrics.Metric`.

    Shape: Any, the same for both.

    Example:
        >>> RMSE(unit=10.0)(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.5, 2.5, float("nan")]))
        tensor(5.)
    """

    def __init__(self, mean: float = 0.0, unit: float = 1.0, **kwargs: Any) -> None:
        super().__init__(squared=False, **kwargs)
        self.mean, self.unit = mean, unit

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(*_present(preds, target, self.mean, self.unit))


class CoefficientOfDetermination(R2Score):
    """r²: 1 less the squared error over that of the mean of the very targets that are predicted.

    Arguments and shape as of `RMSE`; NaN for fewer than two targets.

    Example:
        >>> CoefficientOfDetermination()(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 4.0]))
        tensor(0.7857)
    """

    def __init__(self, mean: float = 0.0, unit: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mean, self.unit = mean, unit

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(*_present(preds, target, self.mean, self.unit))

    @override
    def compute(self) -> Tensor:
        return super().compute() if self.total > 1 else torch.full_like(self.sum_squared_error, torch.nan)


class RelativeRMSE(Metric):
    """The RMSE over that of always predicting the training rows' mean; 0 is perfect, 1 is no better than that.

    Source: aRRMSE is its mean over the targets in Spyromitros-Xioufis et al., *Multi-target regression via input space
    expansion*, Machine Learning 104, 2016, section 4.2.

    Arguments and shape as of `RMSE`.

    Example:
        >>> RelativeRMSE(mean=1.0)(torch.tensor([4.0, 4.0]), torch.tensor([4.0, 5.0]))
        tensor(0.2000)
    """

    higher_is_better = False
    is_differentiable = True
    full_state_update = False

    error: Tensor
    deviation: Tensor

    def __init__(self, mean: float = 0.0, unit: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mean, self.unit = mean, unit
        self.add_state("error", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("deviation", torch.tensor(0.0), dist_reduce_fx="sum")

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        preds, target = _present(preds, target, self.mean, self.unit)
        self.error = self.error + ((preds - target) ** 2).sum()
        self.deviation = self.deviation + (target**2).sum()

    @override
    def compute(self) -> Tensor:
        return (self.error / self.deviation).sqrt()
