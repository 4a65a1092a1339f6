"""What is painted where, and colors that color-blind people can distinguish."""

from __future__ import annotations

import dense
import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_gradnorm.experiments.problems.dense.pictures import (
    DEPTH_COLORS,
    GAP,
    PALETTE,
    paint_depth,
    paint_keypoints,
    paint_labels,
    paint_normals,
    strip,
)
from lightning_gradnorm.experiments.problems.dense.targets import heat_maps

TASKS = ["segmentation", "depth", "normals", "keypoints"]
BLACK = [0, 0, 0]

# Machado, Oliveira, Fernandes (2009): what linear RGB looks like to those who lack one kind of cone.
SIGHT = {
    "all cones": np.eye(3),
    "no red cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green cones": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no blue cones": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def cielab(colors: object, sight: object = SIGHT["all cones"]) -> np.ndarray:
    """(n, 3) in 0 … 255 to lightness, a, b (D65)."""
    srgb = np.asarray(colors) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.asarray(sight).T, 0, 1)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = linear @ to_xyz.T / [0.95047, 1, 1.08883]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def at(picture: Tensor, row: int, column: int) -> list[int]:
    return picture[:, row, column].tolist()


@pytest.mark.parametrize("sight", SIGHT)
def test_every_two_classes_can_be_told_apart(sight: str) -> None:
    seen = cielab([*PALETTE, BLACK], SIGHT[sight])
    distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    assert len(PALETTE) == 13
    assert distances[~np.eye(14, dtype=bool)].min() > 28


def test_depth_gets_lighter_in_equal_steps() -> None:
    steps = np.diff(cielab(DEPTH_COLORS)[:, 0])
    assert steps == pytest.approx(np.full(len(steps), 9.0), abs=0.5)


def test_labels_have_their_colors_and_black_is_none() -> None:
    painted = paint_labels(torch.tensor([[0, 12, -1, 13]]))
    assert [at(painted, 0, column) for column in range(4)] == [
        list(PALETTE[0]),
        list(PALETTE[12]),
        BLACK,
        list(PALETTE[0]),
    ]


def test_depth_is_painted_from_near_to_far_and_holes_are_black() -> None:
    painted = paint_depth(torch.tensor([[[2.0, 3.0, 4.0, 9.0, 0.0, torch.nan]]]), nearest=2, farthest=4)
    first, middle, last = (list(DEPTH_COLORS[i]) for i in (0, 4, 8))
    assert [at(painted, 0, column) for column in range(6)] == [first, middle, last, last, BLACK, BLACK]


def test_normals_are_red_to_the_right_green_up_blue_towards_the_camera() -> None:
    normals = torch.tensor([[0.5, 0, 0], [0, -7, 0], [0, 0, 1], [0, 0, 0]]).T.reshape(3, 1, 4)
    painted = paint_normals(normals)
    assert [at(painted, 0, i) for i in range(4)] == [[255, 128, 128], [128, 0, 128], [128, 128, 255], BLACK]


def test_keypoints_are_spots_over_the_dimmed_picture() -> None:
    maps = heat_maps(torch.tensor([[2.5, 1.5, 1.0], [0.0, 0.0, 0.0]]), (4, 5), 0.3)
    painted = paint_keypoints(torch.full((3, 4, 5), 100, dtype=torch.uint8), maps)
    assert at(painted, 1, 2) == [color // 2 + 127 for color in PALETTE[0]]
    assert at(painted, 3, 4) == [50, 50, 50]


@pytest.mark.parametrize("task", TASKS)
def test_a_strip_is_image_prediction_and_target_of_one_size(task: str) -> None:
    image = torch.rand(3, 20, 24)
    prediction, target = dense.predictions()[task][0], dense.targets()[task][0]  # 5 x 6, a quarter of the image
    picture = strip(task, image, prediction.requires_grad_(), target)
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 20, 3 * 24 + 2 * GAP)
    assert torch.equal(picture[:, :, :24], (255 * image).round().to(torch.uint8))
    assert (picture[:, :, 24 : 24 + GAP] == 255).all()
    perfect = target
    if task == "segmentation":
        perfect = torch.nn.functional.one_hot(target.clamp(min=0), 13).movedim(-1, 0)
    if task == "keypoints":
        perfect = heat_maps(target, dense.SIZE, 1.0)
    found, true = strip(task, image, perfect, target)[:, :, 24 + GAP :].split([24 + GAP, 24], dim=2)
    known = (true != 0).any(dim=0)
    assert 0 < known.float().mean() <= 1
    assert torch.equal(found[:, :, :24][:, known], true[:, known])
    assert not torch.equal(picture[:, :, 24 + GAP : 48 + GAP][:, known], true[:, known])


def test_pixels_are_repeated_not_blended() -> None:
    labels = torch.tensor([[0, 1]])
    logits = torch.nn.functional.one_hot(labels, 13).movedim(-1, 0).float()
    target = strip("segmentation", torch.zeros(3, 2, 6), logits, labels)[:, :, 2 * (6 + GAP) :]
    assert [at(target, 1, column) for column in range(6)] == [list(PALETTE[0])] * 3 + [list(PALETTE[1])] * 3


def test_prediction_and_target_of_depth_share_one_range() -> None:
    target, prediction = torch.tensor([[[2.0, 4.0]]]), torch.tensor([[[4.0, 40.0]]])
    picture = strip("depth", torch.zeros(3, 1, 2), prediction, target)
    assert at(picture, 0, 2 + GAP) == at(picture, 0, -1) == list(DEPTH_COLORS[-1])


def test_maps_of_keypoints_that_cannot_be_seen_are_not_shown() -> None:
    prediction = torch.ones(2, 4, 4)
    nothing = strip("keypoints", torch.zeros(3, 4, 4), prediction, torch.zeros(2, 3))
    assert (nothing[:, :, 4 + GAP : 8 + GAP] == 0).all()


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_without_known_targets_can_be_painted(task: str) -> None:
    target = torch.full_like(dense.targets()[task][0], -1 if task == "segmentation" else 0)
    prediction = dense.predictions()[task][0]
    for found in (prediction, torch.full_like(prediction, torch.nan)):
        picture = strip(task, torch.zeros(3, *dense.SIZE), found, target)
        assert (picture[:, :, -6:] == 0).all()


def test_a_task_without_a_picture_is_named() -> None:
    with pytest.raises(ValueError, match="no picture of a task 'normal'; did you mean 'normals'"):
        strip("normal", torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), torch.zeros(3, 4, 4))
