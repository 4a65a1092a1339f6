"""One image of a source with everything known about it, at the source's own size, and what makes it valid."""

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
"""The 13 classes in the order of their numbers, 0 to 12."""
IGNORED = -1
"""The label of a pixel that has none."""
KEYPOINT_TYPES = 48
MAX_DEPTH = 1000.0
"""Meters. The sensor sees ten; a depth map in millimeters is found out by it."""

SHORTEST_NORMAL = 0.5
"""A vector that is shorter is no normal; see `as_normals`."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Frame:
    """One image and its annotation. What is not valid is marked: label -1, depth 0, normal (0, 0, 0).

    Attributes:
        image: ``uint8``, shape ``(3, H, W)``.
        segmentation: ``int8``, shape ``(h, w)``, 0 to 12 or -1.
        depth: ``float32``, shape ``(h, w)``, meters along the optical axis; 0 where unknown.
        normals: ``float32``, shape ``(3, h, w)``, unit vectors in the source's own `Convention`, zero where unknown; or the
            camera's `Intrinsics`, of which and the depth they are derived.
        keypoints: ``float32``, shape ``(48, 3)``: x and y in pixels of the segmentation, visible (1) or not (0); or None.
    """

    image: Array
    segmentation: Array
    depth: Array
    normals: Array | Intrinsics
    keypoints: Array | None = None


def as_image(values: Array, file: object) -> Array:
    """Turn an image of floats in [0, 1] into ``uint8``: exact if they are multiples of 1/255, as those of NYUv2 are."""
    _expect_floats(values, file, "image")
    lowest, highest = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    # The comparison is written so that a NaN fails it.
    expect(
        lowest >= 0 and highest <= 1, str(file), "image", "within [0, 1]", f"{lowest:g} to {highest:g}",
        "Divide it by 255 if it counts from 0 to 255.",
    )  # fmt: skip
    return np.rint(values.astype(np.float64) * 255).astype(np.uint8)


def as_segmentation(values: Array, file: object) -> Array:
    """Turn labels of whatever type into ``int8``: 0 to 12, and -1 for a pixel that has none."""
    expect(values.dtype.kind in "iuf", str(file), "label", "integers", f"dtype {values.dtype}")
    outside = ~np.isin(values, np.arange(IGNORED, len(CLASSES)))
    if outside.any():
        expected = f"one of the classes 0 to {len(CLASSES) - 1}, or {IGNORED} for none"
        fix = "The 40-class labels have to be mapped to 13 first." if values[outside].max() <= 40 else ""
        wrong(str(file), "label", expected, f"{values[outside][0]} ({outside.sum()} pixels)", fix)
    return values.astype(np.int8)


def as_depth(values: Array, file: object) -> Array:
    """Turn depths of whatever floating type into ``float32`` meters; 0 where unknown."""
    _expect_floats(values, file, "depth")
    lowest, highest = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    expect(
        lowest >= 0 and highest <= MAX_DEPTH, str(file), "depth", f"meters within [0, {MAX_DEPTH:g}], 0 where unknown",
        f"{lowest:g} to {highest:g}",
    )  # fmt: skip
    return values.astype(np.float32)


def as_normals(values: Array, file: object) -> Array:
    """Turn normals, component first, into ``float32`` of length 1, or 0 where unknown.

    Unknown is what is shorter than 0.5 or has a NaN. Zero is, and what pictures of 8 bits have for it: 127 stands for a
    component of -0.004. The known ones that 8 bits have rounded are between 0.98 and 1.02 long, and a mean of two walls at
    right angles, as resizing makes them, is 0.71; one of a wall and of unknown pixels counts if the wall is the larger part.
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
        ValueError: It is another.
    """
    expect(values.shape == shape, str(file), field, f"of shape {shape}", f"shape {values.shape}")


def _expect_floats(values: Array, file: object, field: str) -> None:
    expect(values.dtype.kind == "f", str(file), field, "floating-point numbers", f"dtype {values.dtype}")
