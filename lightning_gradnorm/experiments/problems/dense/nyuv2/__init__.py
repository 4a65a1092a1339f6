"""NYUv2: readers for its three common formats, our own compact format, augmentations, and the data module."""

from lightning_gradnorm.experiments.problems.dense.nyuv2.augmentations import Augmentations
from lightning_gradnorm.experiments.problems.dense.nyuv2.convert import prepare
from lightning_gradnorm.experiments.problems.dense.nyuv2.frame import CLASSES, Frame
from lightning_gradnorm.experiments.problems.dense.nyuv2.images import Images
from lightning_gradnorm.experiments.problems.dense.nyuv2.module import NYUv2
from lightning_gradnorm.experiments.problems.dense.nyuv2.normals_from_depth import (
    KINECT,
    Intrinsics,
    normals_from_depth,
)
from lightning_gradnorm.experiments.problems.dense.nyuv2.prepared import Prepared
from lightning_gradnorm.experiments.problems.dense.nyuv2.source import Source, find_source

__all__ = [
    "CLASSES",
    "KINECT",
    "Augmentations",
    "Frame",
    "Images",
    "Intrinsics",
    "NYUv2",
    "Prepared",
    "Source",
    "find_source",
    "normals_from_depth",
    "prepare",
]
