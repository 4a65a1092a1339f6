"""Resizes arrays: images by area averaging, targets with invalid pixels by the nearest pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def area_average(image: Array, size: tuple[int, int]) -> Array:
    """Resize an image. Each new pixel is the mean of the area that it covers.

    All sums use integers, so the result is the same on every machine. Halves are rounded up.

    Args:
        image: ``uint8``, shape ``(channels, height, width)``.
        size: New height and width, which may be larger than the old.

    Example:
        >>> area_average(np.array([[[0, 10, 20, 31]]], dtype=np.uint8), (1, 2))
        array([[[ 5, 26]]], dtype=uint8)
    """
    height, width = image.shape[1:]
    if (height, width) == tuple(size):
        return image
    sums = _overlaps(height, size[0]) @ image.astype(np.float64) @ _overlaps(width, size[1]).T
    area = height * width
    rounded: Array = (2 * sums.astype(np.int64) + area) // (2 * area)
    return rounded.astype(np.uint8)


def nearest(size: int, to: int) -> Array:
    """Return, for each of ``to`` new rows (or columns), the one of the ``size`` old ones under its center.

    Labels, depth and normals all come from these pixels. This never averages a valid and an invalid value, two classes or
    two surfaces, and the three targets of a new pixel belong to the same point of the scene.

    Example:
        >>> nearest(6, 3)
        array([1, 3, 5])
    """
    return (2 * np.arange(to) + 1) * size // (2 * to)


def _overlaps(size: int, to: int) -> Array:
    """Return the overlaps of new and old pixels, shape ``(to, size)``, in units such that each row sums to ``size``."""
    # In these units, an old pixel has length `to` and a new one `size`.
    new, old = np.arange(to)[:, None] * size, np.arange(size)[None, :] * to
    overlaps: Array = np.maximum(np.minimum(new + size, old + to) - np.maximum(new, old), 0)
    return overlaps.astype(np.float64)
