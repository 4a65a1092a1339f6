"""An augmented sample is consistent: image and targets match what a camera would see in such a scene."""

from __future__ import annotations

import numpy as np
import pytest
from indoor import SIZE, frame, frames, inside, room

from lightning_gradnorm.experiments.problems.dense.nyuv2 import (
    KINECT,
    Augmentations,
    Images,
    Intrinsics,
    normals_from_depth,
)
from lightning_gradnorm.experiments.problems.dense.nyuv2.augmentations import flip, zoom
from lightning_gradnorm.experiments.problems.dense.nyuv2.storage_format import Sample, compact, expand

CAMERA = KINECT.scaled(SIZE[1] / 640, SIZE[0] / 480)


def sample(seed: int = 0) -> Sample:
    made = expand(compact(frame(seed), (96, 128), SIZE))
    points = np.zeros((48, 3), dtype=np.float32)
    points[0], points[1], points[2] = (10.5, 20.5, 1), (40.5, 30.5, 1), (63.5, 0.5, 1)
    return Sample(made.image, made.segmentation, made.depth, made.normals, points)


def empty_room() -> Sample:
    depth, normals, surface = room(SIZE, 2.0, 1.4, 1.2, 4.0)
    image = np.zeros((3, *SIZE), dtype=np.float32)
    return Sample(image, surface.astype(np.int64), depth[None].astype(np.float32), normals)


def agreement(normals: np.ndarray, wanted: np.ndarray, where: np.ndarray) -> float:
    return float((normals * wanted).sum(axis=0)[where].min())


def test_a_mirrored_scene_has_the_normals_of_its_mirrored_depth() -> None:
    mirrored = flip(empty_room())
    camera = Intrinsics(CAMERA.fx, CAMERA.fy, SIZE[1] - CAMERA.cx, CAMERA.cy)
    derived = normals_from_depth(mirrored.depth[0], camera)
    where = inside(mirrored.segmentation)
    assert where.mean() > 0.7
    assert agreement(mirrored.normals, derived, where) > 1 - 1e-5
    assert (np.abs(mirrored.normals[0][where]) > 0.9).any()  # side walls: where it matters


def test_flipping_negates_the_normals_horizontally_and_nothing_else() -> None:
    before = sample()
    after = flip(before)
    assert np.array_equal(after.image[:, :, 0], before.image[:, :, -1])
    assert np.array_equal(after.segmentation, before.segmentation[:, ::-1])
    assert np.array_equal(after.depth, before.depth[:, :, ::-1])
    assert np.array_equal(after.normals, before.normals[:, :, ::-1] * np.array([-1, 1, 1])[:, None, None])
    assert after.keypoints[:3].tolist() == [[53.5, 20.5, 1], [23.5, 30.5, 1], [0.5, 0.5, 1]]
    assert (after.keypoints[3:] == 0).all()
    again = flip(after)
    for name in ("image", "segmentation", "depth", "normals", "keypoints"):
        assert np.array_equal(getattr(again, name), getattr(before, name))


def test_flipping_turns_left_corners_into_right_ones() -> None:
    mirrored_types = list(range(48))
    mirrored_types[0], mirrored_types[1] = 1, 0
    after = flip(sample(), mirrored_types)
    assert after.keypoints[:3].tolist() == [[23.5, 30.5, 1], [53.5, 20.5, 1], [0.5, 0.5, 1]]


def test_keypoints_stay_at_their_pixels() -> None:
    """A marked pixel and the keypoint at its center are still at the same place."""
    before = sample()
    labels = np.zeros(SIZE, dtype=np.int64)
    labels[20, 10] = 1
    before = Sample(before.image, labels, before.depth, before.normals, before.keypoints)
    for after in (flip(before), zoom(before, 2.0, 0.3, 0.1), flip(zoom(before, 1.5, 0.5, 0.0))):
        rows, columns = np.nonzero(after.segmentation)
        x, y, visible = after.keypoints[0]
        assert visible == 1
        assert abs(rows.mean() + 0.5 - y) < 0.51
        assert abs(columns.mean() + 0.5 - x) < 0.51


@pytest.mark.parametrize(("scale", "top", "left"), [(2.0, 0.0, 1.0), (1.5, 0.4, 0.3), (1.2, 1.0, 0.0)])
def test_a_zoomed_scene_has_the_normals_of_its_zoomed_depth(scale: float, top: float, left: float) -> None:
    zoomed = zoom(empty_room(), scale, top, left)
    height, width = SIZE
    # The same camera, whose axis now meets the enlarged part elsewhere.
    camera = Intrinsics(
        CAMERA.fx, CAMERA.fy,
        (CAMERA.cx - left * (width - width / scale)) * scale, (CAMERA.cy - top * (height - height / scale)) * scale,
    )  # fmt: skip
    # Taken by nearest pixels the depth has little steps; a room rendered through that camera has not.
    rows, columns = np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5
    x, y = (columns - camera.cx) / camera.fx + 0 * rows, (rows - camera.cy) / camera.fy + 0 * columns
    with np.errstate(divide="ignore"):
        walls = [
            np.where(x < 0, 2.0 / -x, np.inf), np.where(x > 0, 2.0 / x, np.inf),
            np.where(y > 0, 1.4 / y, np.inf), np.where(y < 0, 1.2 / -y, np.inf), np.full(SIZE, 4.0 / scale),
        ]  # fmt: skip
    exact = np.stack(walls)
    surface = exact.argmin(axis=0)
    where = inside(surface) & inside(zoomed.segmentation) & (surface == zoomed.segmentation)
    assert where.mean() > 0.6
    assert np.median(np.abs(zoomed.depth[0] / exact.min(axis=0) - 1)[where]) < 0.02
    derived = normals_from_depth(exact.min(axis=0), camera)
    assert agreement(zoomed.normals, derived, where) > 1 - 1e-4


def test_zooming_a_slanted_plane_turns_its_normal_towards_the_camera() -> None:
    normal = np.array([0.6, 0.0, 0.8], dtype=np.float32)
    before = empty_room()
    before = Sample(before.image, before.segmentation, before.depth, np.broadcast_to(normal[:, None, None], (3, *SIZE)))
    turned = zoom(before, 2.0, 0, 0).normals[:, 5, 5]
    assert turned == pytest.approx(np.array([0.6, 0, 1.6]) / np.hypot(0.6, 1.6), abs=1e-6)
    assert zoom(before, 2.0, 0, 0, turn_normals=False).normals[:, 5, 5] == pytest.approx(normal)


def test_zooming_by_two_doubles_pixels_and_halves_depth() -> None:
    before = sample()
    after = zoom(before, 2.0, 0.0, 1.0)
    part = (slice(0, SIZE[0] // 2), slice(SIZE[1] // 2, SIZE[1]))
    double = np.ones((2, 2))
    assert np.array_equal(after.segmentation, np.kron(before.segmentation[part], double))
    assert np.array_equal(after.depth[0], np.kron(before.depth[0][part], double) / 2)
    known = (before.normals != 0).any(axis=0)[part]
    assert np.array_equal((after.normals != 0).any(axis=0), np.kron(known, double))
    lengths = np.linalg.norm(after.normals, axis=0)
    assert np.abs(lengths[lengths > 0] - 1).max() < 1e-6


def test_images_are_interpolated_linearly() -> None:
    ramp = np.broadcast_to((np.arange(128, dtype=np.float32) + 0.5) / 128, (3, 96, 128))
    before = sample()
    after = zoom(Sample(ramp, before.segmentation, before.depth, before.normals), 1.5, 0.5, 0.25)
    places = 0.25 * (1 - 1 / 1.5) + (np.arange(128) + 0.5) / 128 / 1.5
    assert np.abs(after.image - places).max() < 1e-6


def test_image_and_targets_show_the_same_part() -> None:
    """The image is twice as large as the targets; its bright half is still where the labels say."""
    labels = np.zeros(SIZE, dtype=np.int64)
    labels[:, 40:] = 1
    image = np.broadcast_to((np.arange(128) >= 80).astype(np.float32), (3, 96, 128))
    before = sample()
    for scale, left in ((1.2, 0.7), (1.5, 1.0), (1.7, 0.5)):
        after = zoom(Sample(image, labels, before.depth, before.normals), scale, 0.5, left)
        edge_of_image = (after.image[0, 0] > 0.5).argmax() / 2
        assert abs(edge_of_image - after.segmentation[0].argmax()) <= 1


def test_points_that_leave_the_image_are_not_visible() -> None:
    after = zoom(sample(), 2.0, 0.0, 0.0)
    assert after.keypoints[:, 2].tolist()[:3] == [1, 0, 0]
    assert (after.keypoints[1:] == 0).all()
    assert after.keypoints[0].tolist() == [21.0, 41.0, 1.0]


def test_draws_follow_from_seed_epoch_and_image_alone() -> None:
    augmentations = Augmentations(flip=0.5, scales=(1.0, 1.2, 1.5))
    draws = {
        (seed, epoch, index): augmentations.draw(seed, epoch, index)
        for seed in range(3)
        for epoch in range(10)
        for index in range(50)
    }
    assert draws[2, 7, 31] == augmentations.draw(2, 7, 31)
    assert len(set(draws.values())) == len(draws)
    mirrored, scales, tops, lefts = zip(*draws.values(), strict=True)
    assert abs(np.mean(mirrored) - 0.5) < 0.04
    assert all(abs(scales.count(scale) / len(scales) - 1 / 3) < 0.04 for scale in (1.0, 1.2, 1.5))
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.1
    assert max(tops) > 0.99
    assert min(lefts) < 0.01


def test_nothing_is_augmented_by_default() -> None:
    before = sample()
    after = Augmentations()(before, seed=0, epoch=0, index=0)
    assert all(np.array_equal(getattr(after, name), getattr(before, name)) for name in vars(before))


class _Stored:
    input_size = output_size = SIZE

    def arrays(self, split: str, index: int) -> dict[str, np.ndarray]:
        return compact(frames(1, first=index)[0], SIZE, SIZE)


def test_an_image_is_augmented_anew_in_each_epoch() -> None:
    images = Images(_Stored(), "train", [3, 5], augmentations=Augmentations(flip=0.5), seed=1)
    seen = {epoch: images[(epoch, 1)][0].numpy().tobytes() for epoch in range(8)}
    assert len(set(seen.values())) == 2  # mirrored and not
    assert seen[4] == images[(4, 1)][0].numpy().tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, "flip should be a probability; got 1.5"),
        ({"flip": True}, "flip should be a probability; got True"),
        ({"scales": (0.8,)}, r"scales should be numbers of at least 1; got \(0.8,\)"),
        ({"mirrored_types": [0, 1]}, "mirrored_types should be 48 numbers that undo each other"),
        ({"mirrored_types": [1, 2, 0, *range(3, 48)]}, "mirrored_types should be 48 numbers that undo each other"),
    ],
)
def test_wrong_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"Augmentations: {message}"):
        Augmentations(**options)
