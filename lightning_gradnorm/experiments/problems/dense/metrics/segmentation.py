"""Metrics of segmentation: torchmetrics with the options for dense tasks.

Pixels without a label do not count. Intersections and unions of a class are summed over the whole set before they are
divided, as in LibMTL (MTAN's first code averaged over images instead). The mean is over the classes that occur in the
target or the prediction. A class that occurs in neither counts neither as right nor as wrong (LibMTL's mean is then NaN;
in the test set of NYUv2, all 13 occur).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from typing_extensions import override

from lightning_gradnorm.experiments.problems.dense.targets import IGNORED


class MeanIoU(MulticlassJaccardIndex):
    """Mean intersection over union, in [0, 1].

    Args:
        num_classes: number of classes.
        ignore_index: the label of pixels without a class.
        kwargs: options of `torchmetrics.Metric`.

    Shape: logits ``(batch, classes, h, w)``, labels ``(batch, h, w)``.

    Example:
        >>> import torch
        >>> logits = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 1]]]), 13).movedim(-1, 1).float()
        >>> MeanIoU(num_classes=13)(logits, torch.tensor([[[0, 1, 0]]]))  # one of two pixels, twice
        tensor(0.5000)
    """

    def __init__(self, num_classes: int, ignore_index: int | None = IGNORED, **kwargs: Any) -> None:
        # No validation: it would sort all pixels to find labels out of range, which the loss already refuses.
        super().__init__(num_classes, average="macro", ignore_index=ignore_index, validate_args=False, **kwargs)

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(_most_likely(preds), target)


class SegmentationError(MeanIoU):
    """``1 - mIoU``, in [0, 1]: the GradNorm paper's segmentation error, printed there as ``100 - IoU``.

    Args:
        num_classes: number of classes.
        ignore_index: the label of pixels without a class.
        kwargs: options of `torchmetrics.Metric`.

    Shape: logits ``(batch, classes, h, w)``, labels ``(batch, h, w)``.

    Example:
        >>> import torch
        >>> logits = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 1]]]), 13).movedim(-1, 1).float()
        >>> SegmentationError(num_classes=13)(logits, torch.tensor([[[0, 1, -1]]]))
        tensor(0.)
    """

    higher_is_better = False

    @override
    def compute(self) -> Tensor:
        return 1 - super().compute()


class PixelAccuracy(MulticlassAccuracy):
    """Fraction of the labeled pixels that are right, over all classes; 0 if none is labeled.

    Args:
        num_classes: number of classes.
        ignore_index: the label of pixels without a class.
        kwargs: options of `torchmetrics.Metric`.

    Shape: logits ``(batch, classes, h, w)``, labels ``(batch, h, w)``.

    Example:
        >>> import torch
        >>> logits = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 1]]]), 13).movedim(-1, 1).float()
        >>> PixelAccuracy(num_classes=13)(logits, torch.tensor([[[0, 0, -1]]]))
        tensor(0.5000)
    """

    def __init__(self, num_classes: int, ignore_index: int | None = IGNORED, **kwargs: Any) -> None:
        super().__init__(num_classes, average="micro", ignore_index=ignore_index, validate_args=False, **kwargs)

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(_most_likely(preds), target)


def _most_likely(logits: Tensor) -> Tensor:
    """Return the labels. On a CPU, this is five times as fast as torchmetrics' ``argmax`` over this dimension."""
    return logits.max(dim=1).indices
