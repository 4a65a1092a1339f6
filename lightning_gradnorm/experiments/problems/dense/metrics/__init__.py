"""Metrics of dense tasks: additions to torchmetrics, and its metrics with masks for holes in dense targets."""

from lightning_gradnorm.experiments.problems.dense.metrics.depth import (
    DepthAbsoluteError,
    DepthRelativeError,
    DepthRMSError,
)
from lightning_gradnorm.experiments.problems.dense.metrics.keypoints import KeypointError
from lightning_gradnorm.experiments.problems.dense.metrics.normals import (
    CosineError,
    MeanAngle,
    MedianAngle,
    WithinAngle,
)
from lightning_gradnorm.experiments.problems.dense.metrics.segmentation import MeanIoU, PixelAccuracy, SegmentationError

__all__ = [
    "CosineError",
    "DepthAbsoluteError",
    "DepthRMSError",
    "DepthRelativeError",
    "KeypointError",
    "MeanAngle",
    "MeanIoU",
    "MedianAngle",
    "PixelAccuracy",
    "SegmentationError",
    "WithinAngle",
]
