"""A keypoint's heat map is a Gaussian around it, pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_gradnorm.experiments.problems.dense.targets import heat_maps


@pytest.mark.parametrize("sigma", [0.7, 2.0])
def test_each_pixel_is_the_gaussian_of_its_centers_distance(sigma: float) -> None:
    keypoints = torch.tensor([[3.2, 1.9, 1.0], [7.0, 0.0, 1.0], [2.0, 2.0, 0.0]], dtype=torch.float64)
    maps = heat_maps(keypoints, (5, 7), sigma)
    assert maps.shape == (3, 5, 7)
    for kind, (x, y, visible) in enumerate(keypoints.tolist()):
        for row in range(5):
            for column in range(7):
                square = (column + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2
                assert maps[kind, row, column] == pytest.approx(visible * math.exp(-square / (2 * sigma**2)), abs=1e-12)


def test_batches_are_as_single_tables() -> None:
    keypoints = torch.rand(2, 3, 48, 3) * 9
    maps = heat_maps(keypoints, (6, 9), sigma=2.0)
    assert maps.shape == (2, 3, 48, 6, 9)
    assert maps.dtype == torch.float32
    assert torch.equal(maps[1, 2], heat_maps(keypoints[1, 2], (6, 9), sigma=2.0))


def test_the_peak_is_the_keypoints_pixel() -> None:
    maps = heat_maps(torch.tensor([[4.5, 2.5, 1.0]]), (6, 9), sigma=1.5)
    assert maps.max() == maps[0, 2, 4] == 1
