"""One image of a source with its annotation at the source's size, and checks of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradnorm.experiments.problems.dense.nyuv2.errors import expect, wrong
from lightning_gradnorm.experiments.problems.dense.nyuv2.normals_from_depth import Intrinsics

CLASSES = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa", "table", "tv", "wall", "window"
)  # fmt: skip
"""The 13 classes, in the order of their numbers 0 to 12."""
IGNORED = -1
"""The label of pixels without a class."""
KEYPOINT_TYPES = 48
MAX_DEPTH = 1000.0
"""Limit in meters. The sensor reaches ten, so this detects a depth map in millimeters."""

SHORTEST_NORMAL = 0.5
"""Shorter vectors are not normals, see `as_normals`."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Frame:
    """One image and its annotation. Invalid pixels have label -1, depth 0, normal (0, 0, 0).

    Attributes:
        image: ``uint8``, shape ``(3, H, W)``.
        segmentation: ``int8``, shape ``(h, w)``, 0 to 12 or -1.
        depth: ``float32``, shape ``(h, w)``, meters along the optical axis; 0 where unknown.
        normals: ``float32``, shape ``(3, h, w)``, unit vectors in the source's own `Convention`, zero where unknown; or the
            camera's `Intrinsics`, to derive them from the depth.
        keypoints: ``float32``, shape ``(48, 3)``: x and y in pixels of the segmentation, visible (1) or not (0); or None.
    """

    image: Array
    segmentation: Array
    depth: Array
    normals: Array | Intrinsics
    keypoints: Array | None = None


def as_image(values: Array, file: object) -> Array:
    """Convert an image of floats in [0, 1] to ``uint8``. This is exact for multiples of 1/255, as in NYUv2."""
    _expect_floats(values, file, "image")
    lowest, highest = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    # A NaN fails this comparison.
    expect(
        lowest >= 0 and highest <= 1, str(file), "image", "within [0, 1]", f"{lowest:g} to {highest:g}",
        "Divide it by 255 if its range is 0 to 255.",
    )  # fmt: skip
    return np.rint(values.astype(np.float64) * 255).astype(np.uint8)


def as_segmentation(values: Array, file: object) -> Array:
    """Convert labels of any type to ``int8``: 0 to 12, and -1 for pixels without a class."""
    expect(values.dtype.kind in "iuf", str(file), "label", "integers", f"dtype {values.dtype}")
    outside = ~np.isin(values, np.arange(IGNORED, len(CLASSES)))
    if outside.any():
        expected = f"one of the classes 0 to {len(CLASSES) - 1}, or {IGNORED} for none"
        fix = "Map the 40-class labels to 13 first." if values[outside].max() <= 40 else ""
        wrong(str(file), "label", expected, f"{values[outside][0]} ({outside.sum()} pixels)", fix)
    return values.astype(np.int8)


def as_depth(values: Array, file: object) -> Array:
    """Convert depths of any floating-point type to ``float32`` meters, 0 where unknown."""
    _expect_floats(values, file, "depth")
    lowest, highest = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    expect(
        lowest >= 0 and highest <= MAX_DEPTH, str(file), "depth", f"meters within [0, {MAX_DEPTH:g}], 0 where unknown",
        f"{lowest:g} to {highest:g}",
    )  # fmt: skip
    return values.astype(np.float32)


def as_normals(values: Array, file: object) -> Array:
    """Convert normals, component first, to ``float32`` of length 1, or 0 where unknown.

    A normal is unknown if it is shorter than 0.5 or has a NaN. This includes zero and its value in 8-bit pictures, where 127
    is a component of -0.004. Known normals rounded to 8 bits have a length between 0.98 and 1.02. The mean of two walls at
    right angles, from resizing, has 0.71. A mean of a wall and unknown pixels counts if the wall is the larger part.
    """
    _expect_floats(values, file, "normal")
    normals = np.where(np.isnan(values).any(axis=0), 0, values).astype(np.float64)
    length = np.sqrt((normals**2).sum(axis=0))
    longest = float(length.max()) if length.size else 0.0
    expect(longest <= 1.05, str(file), "normal", "unit vectors, or zero where unknown", f"length up to {longest:g}")
    known = length >= SHORTEST_NORMAL
    return np.where(known, normals / np.where(known, length, 1), 0).astype(np.float32)


def expect_shape(values: Array, shape: tuple[int, ...], file: object, field: str) -> None:
    """Check the shape of one array.

    Raises:
        ValueError: The shape differs.
    """
    expect(values.shape == shape, str(file), field, f"of shape {shape}", f"shape {values.shape}")


def _expect_floats(values: Array, file: object, field: str) -> None:
    expect(values.dtype.kind == "f", str(file), field, "floating-point numbers", f"dtype {values.dtype}")
