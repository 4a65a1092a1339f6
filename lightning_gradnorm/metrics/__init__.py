"""What torchmetrics lacks, and what it has with the masks that holes in dense targets ask for."""

from lightning_gradnorm.metrics.depth import DepthAbsoluteError, DepthRelativeError, DepthRMSError
from lightning_gradnorm.metrics.keypoints import KeypointError
from lightning_gradnorm.metrics.nasa_score import NASAScore
from lightning_gradnorm.metrics.normals import CosineError, MeanAngle, MedianAngle, WithinAngle
from lightning_gradnorm.metrics.segmentation import MeanIoU, PixelAccuracy, SegmentationError

__all__ = [
    "CosineError",
    "DepthAbsoluteError",
    "DepthRMSError",
    "DepthRelativeError",
    "KeypointError",
    "MeanAngle",
    "MeanIoU",
    "MedianAngle",
    "NASAScore",
    "PixelAccuracy",
    "SegmentationError",
    "WithinAngle",
]
