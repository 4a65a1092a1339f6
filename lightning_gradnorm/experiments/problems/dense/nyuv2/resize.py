"""Other sizes, (height, width): images by area averaging, whatever can be invalid by its nearest pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def area_average(image: Array, size: tuple[int, int]) -> Array:
    """Resize an image so that each new pixel is the mean of the area that it covers.

    All sums are of integers, so the result is the same on every machine; halves are rounded up.

    Args:
        image: ``uint8``, shape ``(channels, height, width)``.
        size: New height and width; may be larger than the old.

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
    """Return, for each of ``to`` new rows (or columns), which of the ``size`` old ones lies under its center.

    Labels, depth and normals are all taken at these pixels: no mean of a valid and an invalid value, of two classes or of
    two surfaces comes about, and the three targets of a new pixel belong to the same point of the scene.

    Example:
        >>> nearest(6, 3)
        array([1, 3, 5])
    """
    return (2 * np.arange(to) + 1) * size // (2 * to)


def _overlaps(size: int, to: int) -> Array:
    """Lengths that new and old pixels share, shape ``(to, size)``, in units in which each row sums to ``size``."""
    # In these units an old pixel is `to` long and a new one `size`.
    new, old = np.arange(to)[:, None] * size, np.arange(size)[None, :] * to
    overlaps: Array = np.maximum(np.minimum(new + size, old + to) - np.maximum(new, old), 0)
    return overlaps.astype(np.float64)
