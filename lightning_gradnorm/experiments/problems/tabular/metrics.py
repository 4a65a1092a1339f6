"""Metrics of a target in its original units, independent of the units in training. Missing targets do not count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.regression import MeanSquaredError, R2Score
from typing_extensions import override


def _present(preds: Tensor, target: Tensor, mean: float, unit: float) -> tuple[Tensor, Tensor]:
    """Return the pairs whose target is not NaN, minus ``mean`` and times ``unit``.

    The mean is subtracted because squares of numbers far from zero lose the digits of their deviations.
    """
    if preds.shape != target.shape:
        raise ValueError(
            f"tabular metrics: prediction and target should have the same shape; got {tuple(preds.shape)} and "
            f"{tuple(target.shape)}. Squeeze or unsqueeze one of them."
        )
    there = ~target.isnan()
    return (preds[there].float() - mean) * unit, (target[there].float() - mean) * unit


class RMSE(MeanSquaredError):  # noqa: N818  not an exception
    """Root mean squared error in the target's original units.

    Args:
        mean: The target's mean over the training rows, in the units of predictions and targets.
        unit: Factor that converts them to the target's original units.
        kwargs: Options of `torchmetrics.Metric`.

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
    """r²: 1 minus the squared error over that of predicting the mean of these targets.

    Same arguments and shape as `RMSE`. NaN for fewer than two targets.

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
    """The RMSE over that of always predicting the mean of the training rows. 0 is perfect, 1 is no better than the mean.

    Source: aRRMSE is its mean over the targets in Spyromitros-Xioufis et al., *Multi-target regression via input space
    expansion*, Machine Learning 104, 2016, section 4.2.

    Same arguments and shape as `RMSE`.

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
