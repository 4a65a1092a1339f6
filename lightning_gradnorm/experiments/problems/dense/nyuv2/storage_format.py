"""Converts one image to its storage types, and back.

================  =========  ====================================================================
array             type       storage error
================  =========  ====================================================================
``image``         uint8      none at the source's size; 1/510 if resizing created other values
``segmentation``  int8       none
``depth``         float16    1/2048 of the depth: 1 mm at 2 m, 5 mm at 10 m (the sensor's is 1 cm and 30 cm there)
``normals``       int16      0.002 degrees: components in steps of 1/32767
``keypoints``     float32    none
================  =========  ====================================================================

A source that is read directly uses the same types, so training on it is bit-identical.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradnorm.experiments.problems.dense.nyuv2.frame import KEYPOINT_TYPES, Frame
from lightning_gradnorm.experiments.problems.dense.nyuv2.normals_from_depth import Intrinsics, normals_from_depth
from lightning_gradnorm.experiments.problems.dense.nyuv2.resize import area_average, nearest

Array = npt.NDArray[Any]
Size = tuple[int, int]

TYPES: dict[str, np.dtype[Any]] = {
    "image": np.dtype(np.uint8),
    "segmentation": np.dtype(np.int8),
    "depth": np.dtype(np.float16),
    "normals": np.dtype(np.int16),
    "keypoints": np.dtype(np.float32),
}
NORMAL_STEPS = 32767
SMALLEST_DEPTH = 6e-5
"""Meters. Anything nearer counts as unknown, because half precision cannot represent it."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One image as used in training.

    Attributes:
        image: ``float32``, shape ``(3, H, W)``, in [0, 1].
        segmentation: ``int64``, shape ``(h, w)``, 0 to 12; -1 to ignore.
        depth: ``float32``, shape ``(1, h, w)``, meters; 0 is unknown.
        normals: ``float32``, shape ``(3, h, w)``, unit vectors, x right, y up, z toward the camera; zero is unknown.
        keypoints: ``float32``, shape ``(48, 3)``: x, y in output pixels, visible or not; or None.
    """

    image: Array
    segmentation: Array
    depth: Array
    normals: Array
    keypoints: Array | None = None


def shapes(input_size: Size, output_size: Size) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of one image."""
    return {
        "image": (3, *input_size),
        "segmentation": output_size,
        "depth": output_size,
        "normals": (3, *output_size),
        "keypoints": (KEYPOINT_TYPES, 3),
    }


def compact(frame: Frame, input_size: Size, output_size: Size) -> dict[str, Array]:
    """Convert a frame to the wanted sizes and the types in `TYPES`. Derives the normals if it has none."""
    height, width = frame.segmentation.shape
    rows, columns = nearest(height, output_size[0]), nearest(width, output_size[1])
    at = np.ix_(rows, columns)
    depth = frame.depth[at]
    if isinstance(frame.normals, Intrinsics):
        normals = normals_from_depth(frame.depth, frame.normals, rows, columns)
    else:
        normals = frame.normals[:, rows[:, None], columns]
    arrays: dict[str, Array] = {
        "image": area_average(frame.image, input_size),
        "segmentation": frame.segmentation[at],
        "depth": np.where(depth < SMALLEST_DEPTH, 0, depth),
        "normals": np.rint(normals * NORMAL_STEPS),
    }
    if frame.keypoints is not None:
        arrays["keypoints"] = frame.keypoints * np.array([output_size[1] / width, output_size[0] / height, 1])
    return {name: np.ascontiguousarray(array, dtype=TYPES[name]) for name, array in arrays.items()}


def expand(arrays: dict[str, Array]) -> Sample:
    """Convert the stored arrays of one image to a training sample."""
    normals = arrays["normals"].astype(np.float32)
    length = np.sqrt((normals**2).sum(axis=0, dtype=np.float32))
    return Sample(
        image=arrays["image"].astype(np.float32) / np.float32(255),
        segmentation=arrays["segmentation"].astype(np.int64),
        depth=arrays["depth"].astype(np.float32)[None],
        normals=normals / np.where(length > 0, length, np.float32(1)),
        keypoints=np.array(arrays["keypoints"]) if "keypoints" in arrays else None,
    )
