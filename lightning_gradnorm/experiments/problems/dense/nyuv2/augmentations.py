"""Geometric augmentations of an image that also transform its targets.

Contains functions on one `Sample`, and `Augmentations`, which draws them at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradnorm._messages import check, is_number
from lightning_gradnorm.experiments.problems.dense.nyuv2.frame import KEYPOINT_TYPES
from lightning_gradnorm.experiments.problems.dense.nyuv2.storage_format import Sample

Array = npt.NDArray[Any]


def flip(sample: Sample, mirrored_types: Sequence[int] | None = None) -> Sample:
    """Mirror a scene left to right. Normals change their horizontal direction.

    Args:
        sample: Image and targets.
        mirrored_types: For each keypoint type, its mirrored type (a left corner becomes a right one); None if all types
            stay the same.
    """
    normals = sample.normals[:, :, ::-1].copy()
    normals[0] = 0.0 - normals[0]  # not -0.0 for unknown pixels
    points = None
    if sample.keypoints is not None:
        x, y, visible = sample.keypoints.T
        points = np.stack([np.where(visible > 0, sample.depth.shape[2] - x, 0), y, visible], axis=1)
        if mirrored_types is not None:
            points[list(mirrored_types)] = points.copy()
    return Sample(
        image=np.ascontiguousarray(sample.image[:, :, ::-1]),
        segmentation=np.ascontiguousarray(sample.segmentation[:, ::-1]),
        depth=np.ascontiguousarray(sample.depth[:, :, ::-1]),
        normals=normals,
        keypoints=points,
    )


def zoom(sample: Sample, scale: float, top: float, left: float, turn_normals: bool = True) -> Sample:
    """Crop a part of the image and enlarge it ``scale`` times to the original size.

    For the same camera, this scene is ``scale`` times nearer, so depth is divided by it. The scene is also flatter by the
    same factor, so normals turn toward the camera: n_z is multiplied by ``scale`` (Eigen and Fergus, ICCV 2015, section
    4.3). The common code leaves the normals unchanged.

    The image is interpolated linearly. Labels, depth and normals come from the pixel under the new pixel's
    center, so invalid pixels stay invalid and do not spread.

    Args:
        sample: Image and targets.
        scale: Enlargement, at least 1.
        top: Position of the part from the top (0) to the bottom (1).
        left: Position of the part from the left (0) to the right (1).
        turn_normals: Turn the normals, as the geometry requires.
    """
    height, width = sample.segmentation.shape
    rows = _nearest(height, scale, top)[:, None]
    columns = _nearest(width, scale, left)
    normals = sample.normals[:, rows, columns]
    if turn_normals:
        normals = normals * np.array([1, 1, scale], dtype=np.float32)[:, None, None]
        length = np.sqrt((normals**2).sum(axis=0))
        normals /= np.where(length > 0, length, 1)
    points = None
    if sample.keypoints is not None:
        x, y, visible = sample.keypoints.T
        x = (x - left * (width - width / scale)) * scale
        y = (y - top * (height - height / scale)) * scale
        inside = (visible > 0) & (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
        points = (np.stack([x, y, np.ones_like(x)], axis=1) * inside[:, None]).astype(np.float32)
    image = _linear(_linear(sample.image, 1, scale, top), 2, scale, left)
    return Sample(
        image=image,
        segmentation=sample.segmentation[rows, columns],
        depth=sample.depth[:, rows, columns] / np.float32(scale),
        normals=normals,
        keypoints=points,
    )


class Augmentations:
    """Random augmentations of each training image, different in every epoch.

    The draw depends only on the seed, the epoch and the image's number, not on the number of workers or on
    earlier images.

    Args:
        flip: Probability of mirroring an image.
        scales: Zoom factors to choose from, each at least 1, such as MTAN's (1.0, 1.2, 1.5); empty for no zoom.
        turn_normals: Turn normals when zooming, as the geometry requires. The common code leaves them unchanged.
        mirrored_types: For each of the 48 keypoint types, its mirrored type; None if all stay the same.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> augmentations = Augmentations(flip=0.5, scales=(1.0, 1.2, 1.5))
        >>> draws = [augmentations.draw(seed=0, epoch=epoch, index=7) for epoch in (0, 0, 1)]
        >>> draws[0] == draws[1], draws[0] == draws[2]
        (True, False)
    """

    def __init__(
        self,
        flip: float = 0.0,
        scales: Sequence[float] = (),
        turn_normals: bool = True,
        mirrored_types: Sequence[int] | None = None,
    ) -> None:
        check("Augmentations", is_number(flip) and 0 <= flip <= 1, "flip", "a probability", flip)
        scales = tuple(scales)
        fits = all(is_number(scale) and 1 <= scale < float("inf") for scale in scales)
        check("Augmentations", fits, "scales", "numbers of at least 1", scales)
        if mirrored_types is not None:
            pairs = dict(enumerate(mirrored_types))
            fits = len(pairs) == KEYPOINT_TYPES and all(pairs.get(pairs[one]) == one for one in pairs)
            check("Augmentations", fits, "mirrored_types", "48 numbers that undo each other", list(mirrored_types))
        self.flip = flip
        self.scales = scales
        self.turn_normals = turn_normals
        self.mirrored_types = None if mirrored_types is None else tuple(mirrored_types)

    def draw(self, seed: int, epoch: int, index: int) -> tuple[bool, float, float, float]:
        """Draw the mirroring, the scale, and the top and left position of the part."""
        stream = np.random.default_rng([seed, epoch, index])
        chance, top, left, which = stream.uniform(size=4)
        scale = self.scales[int(which * len(self.scales))] if self.scales else 1.0
        return bool(chance < self.flip), float(scale), float(top), float(left)

    def __call__(self, sample: Sample, seed: int, epoch: int, index: int) -> Sample:
        """Draw and apply the augmentation of one sample."""
        mirrored, scale, top, left = self.draw(seed, epoch, index)
        if scale != 1:
            sample = zoom(sample, scale, top, left, self.turn_normals)
        return flip(sample, self.mirrored_types) if mirrored else replace(sample)


def _places(size: int, scale: float, start: float) -> Array:
    """Return the centers of the new pixels, in old pixels from the edge."""
    return start * (size - size / scale) + (np.arange(size) + 0.5) / scale


def _nearest(size: int, scale: float, start: float) -> Array:
    return np.minimum(_places(size, scale, start).astype(np.int64), size - 1)


def _linear(image: Array, axis: int, scale: float, start: float) -> Array:
    size = image.shape[axis]
    places = np.clip(_places(size, scale, start) - 0.5, 0, size - 1)
    below = np.minimum(places.astype(np.int64), max(size - 2, 0))
    above = np.minimum(below + 1, size - 1)
    share = (places - below).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(3)])
    result: Array = image.take(below, axis) * (1 - share) + image.take(above, axis) * share
    return result
