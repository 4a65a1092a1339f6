"""New sizes against counting by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from indoor import frame

from lightning_gradnorm.experiments.problems.dense.nyuv2.resize import area_average, nearest
from lightning_gradnorm.experiments.problems.dense.nyuv2.storage_format import compact


def by_hand(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mean over each new pixel's area, in fractions, halves rounded up."""
    channels, height, width = image.shape
    result = np.zeros((channels, *size), dtype=np.uint8)

    def shares(old: int, new: int, at: int) -> list[tuple[int, Fraction]]:
        low, high = Fraction(at * old, new), Fraction((at + 1) * old, new)
        return [(i, min(high, Fraction(i + 1)) - max(low, Fraction(i))) for i in range(int(low), -(-high // 1))]

    for channel, row, column in np.ndindex(channels, *size):
        total = sum(
            int(image[channel, y, x]) * down * across
            for y, down in shares(height, size[0], row)
            for x, across in shares(width, size[1], column)
        )
        mean = total / (Fraction(height, size[0]) * Fraction(width, size[1]))
        result[channel, row, column] = int(mean + Fraction(1, 2))
    return result


@pytest.mark.parametrize("size", [(12, 16), (4, 4), (1, 1), (7, 5), (13, 16), (12, 31), (24, 32), (5, 40)])
def test_images_are_averaged_over_areas(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, size=(2, 12, 16), dtype=np.uint8)
    assert np.array_equal(area_average(image, size), by_hand(image, size))


def test_white_stays_white_and_black_black_at_every_size() -> None:
    for value in (0, 255):
        image = np.full((3, 480, 640), value, dtype=np.uint8)
        assert (area_average(image, (320, 320)) == value).all()
        assert (area_average(image, (73, 801)) == value).all()


@pytest.mark.parametrize(("size", "to"), [(480, 80), (288, 80), (6, 6), (5, 7), (7, 5), (3, 1), (1, 4)])
def test_the_nearest_pixel_lies_under_the_center(size: int, to: int) -> None:
    assert nearest(size, to).tolist() == [int(Fraction(2 * i + 1, 2) * Fraction(size, to)) for i in range(to)]


@pytest.mark.parametrize("size", [(12, 16), (7, 9), (48, 64), (100, 30)])
def test_invalid_pixels_do_not_bleed_into_valid_ones(size: tuple[int, int]) -> None:
    """Each label, depth and normal of the new size is one of the old, all three of the same pixel."""
    source = frame(3)
    small = compact(source, (8, 8), size)
    rows, columns = nearest(48, size[0]), nearest(64, size[1])
    for row, column in np.ndindex(*size):
        y, x = rows[row], columns[column]
        assert small["segmentation"][row, column] == source.segmentation[y, x]
        assert small["depth"][row, column] == np.float16(source.depth[y, x])
        assert np.abs(small["normals"][:, row, column] / 32767 - source.normals[:, y, x]).max() < 1 / 65000
    assert (small["depth"] == 0).any()
    assert (small["segmentation"] == -1).any()


def test_keypoints_move_with_the_size() -> None:
    source = frame(3)
    points = np.zeros((48, 3), dtype=np.float32)
    points[5] = (32.0, 48.0, 1)
    points[7] = (64.0, 12.0, 1)
    with_points = type(source)(source.image, source.segmentation, source.depth, source.normals, points)
    small = compact(with_points, (8, 8), (24, 16))["keypoints"]
    assert small[5].tolist() == [8.0, 24.0, 1.0]
    assert small[7].tolist() == [16.0, 6.0, 1.0]
    assert (small[[0, 6, 47]] == 0).all()
