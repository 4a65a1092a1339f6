"""Errors of predicted surface normals over pixels with a true normal.

Angles are between directions, in degrees from 0 to 180. A prediction need not have length 1, and one of length 0 counts as
perpendicular to everything. All metrics are over the pixels of the whole set at once, and NaN if there are none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_gradnorm._messages import check, is_number
from lightning_gradnorm.experiments.problems.dense.targets import valid_normals


class _MeanOverPixels(Metric, ABC):
    """The mean of a value over all pixels with a normal."""

    full_state_update = False
    sum_of_all: Tensor
    pixels: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sum_of_all", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("pixels", torch.tensor(0), dist_reduce_fx="sum")

    @abstractmethod
    def of_each(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the value of each pixel, ``(batch, h, w)``, from unit vectors ``(batch, 3, h, w)``."""

    @override
    def update(self, prediction: Tensor, target: Tensor) -> None:
        numbers, valid = self.of_each(*_directions(self, prediction, target)), valid_normals(target)
        self.sum_of_all += torch.where(valid, numbers, 0.0).sum()
        self.pixels += valid.sum()

    @override
    def compute(self) -> Tensor:
        return self.sum_of_all / self.pixels


class CosineError(_MeanOverPixels):
    """Mean of ``1 - |cos|``, the GradNorm paper's error of normals. A normal with the opposite direction counts as correct.

    Shape: ``(batch, 3, h, w)`` both.

    Example:
        >>> up, wall = torch.eye(3)[1].reshape(1, 3, 1, 1), torch.eye(3)[2].reshape(1, 3, 1, 1)
        >>> CosineError()(up, wall), CosineError()(-wall, wall)
        (tensor(1.), tensor(0.))
    """

    higher_is_better = False

    @override
    def of_each(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 1 - (prediction * target).sum(dim=1).abs()


class MeanAngle(_MeanOverPixels):
    """Mean angle in degrees.

    Shape: ``(batch, 3, h, w)`` both.

    Example:
        >>> up, wall = torch.eye(3)[1].reshape(1, 3, 1, 1), torch.eye(3)[2].reshape(1, 3, 1, 1)
        >>> MeanAngle()(up + wall, wall)
        tensor(45.)
    """

    higher_is_better = False

    @override
    def of_each(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _angles(prediction, target)


class WithinAngle(_MeanOverPixels):
    """Fraction of the pixels with an angle below a bound: 11.25, 22.5 and 30 degrees in the literature.

    Args:
        degrees: the bound.
        kwargs: options of `torchmetrics.Metric`.

    Shape: ``(batch, 3, h, w)`` both.

    Example:
        >>> up, wall = torch.eye(3)[1].reshape(1, 3, 1, 1), torch.eye(3)[2].reshape(1, 3, 1, 1)
        >>> WithinAngle(30)(up + wall, wall), WithinAngle(60)(up + wall, wall)
        (tensor(0.), tensor(1.))
    """

    higher_is_better = True

    def __init__(self, degrees: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        is_angle = is_number(degrees) and 0 < degrees <= 180
        check("WithinAngle", is_angle, "degrees", "a number above 0, at most 180", degrees)
        self.degrees = degrees

    @override
    def of_each(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (_angles(prediction, target) < self.degrees).float()


class MedianAngle(Metric):
    """Median angle in degrees, accurate to 0.0005°, from a histogram in steps of 0.001° instead of a list of all pixels.

    The test set of NYUv2 at 288 x 384 has 72 million pixels. The histogram has 1.4 MB for any set, and ranks add theirs up.
    Like in numpy, the median is the mean of the two middle values if there are two. NaN angles count among the largest.

    Shape: ``(batch, 3, h, w)`` both.

    Example:
        >>> up, wall = torch.eye(3)[1].reshape(1, 3, 1, 1), torch.eye(3)[2].reshape(1, 3, 1, 1)
        >>> median = MedianAngle()
        >>> for prediction in (wall, up + wall, up):
        ...     median.update(prediction, wall)
        >>> round(median.compute().item(), 3)
        45.0
    """

    full_state_update = False
    higher_is_better = False
    counts: Tensor

    BINS_PER_DEGREE = 1000

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zeros = torch.zeros(180 * self.BINS_PER_DEGREE, dtype=torch.int64)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    @override
    def update(self, prediction: Tensor, target: Tensor) -> None:
        angles = _angles(*_directions(self, prediction, target))[valid_normals(target)].nan_to_num(nan=180.0)
        bins = (angles * self.BINS_PER_DEGREE).long().clamp(max=len(self.counts) - 1)
        self.counts += torch.bincount(bins, minlength=len(self.counts))

    @override
    def compute(self) -> Tensor:
        up_to = self.counts.cumsum(dim=0)
        total = up_to[-1]
        middle = torch.stack([(total + 1) // 2, total // 2 + 1])  # counted from 1; both are the same if total is odd
        median = (torch.searchsorted(up_to, middle).float().mean() + 0.5) / self.BINS_PER_DEGREE
        return torch.where(total > 0, median, torch.nan)


def _directions(metric: Metric, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as unit vectors. Zero vectors stay zero."""
    if prediction.shape != target.shape:
        raise ValueError(
            f"{type(metric).__name__}: the prediction should have the target's shape, {tuple(target.shape)}; "
            f"got {tuple(prediction.shape)}."
        )
    return _of_length_1(prediction.float()), _of_length_1(target.float())


# Along the second dimension of an image, sums of products take a tenth of the time of `norm` and `cross` on a CPU.
def _of_length_1(vectors: Tensor) -> Tensor:
    return vectors / vectors.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-12)


def _angles(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the angles in degrees from atan2, because the arc cosine is inaccurate at small angles (0.02° in float32)."""
    (x, y, z), (u, v, w) = prediction.unbind(dim=1), target.unbind(dim=1)
    across = ((y * w - z * v).square() + (z * u - x * w).square() + (x * v - y * u).square()).sqrt()
    along = x * u + y * v + z * w
    angles = torch.atan2(across, along).rad2deg()
    return torch.where((across == 0) & (along == 0), 90.0, angles)
