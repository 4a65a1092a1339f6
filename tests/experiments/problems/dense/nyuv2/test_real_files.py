"""Published files of NYUv2, if available: the split, the class mappings, label images, and two frames."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from real_data import real_data

from lightning_gradnorm.experiments.problems.dense.nyuv2 import KINECT, Frame, NYUv2, find_source, normals_from_depth
from lightning_gradnorm.experiments.problems.dense.nyuv2.frame import as_depth, as_normals
from lightning_gradnorm.experiments.problems.dense.nyuv2.normals_convention import compare_with_depth
from lightning_gradnorm.experiments.problems.dense.nyuv2.official import DATA, SPLITS, TO_13, TO_40

h5py = pytest.importorskip("h5py", reason="needs the extra [nyuv2]")
scipy_io = pytest.importorskip("scipy.io", reason="needs the extra [nyuv2]")

SIZE = (480, 640)
FRAMES = (433, 464)
"""Numbers of the two frames among the 1449, from one. Both are test images."""
NO_CLASS = 255
"""In the label images of the two frames, which count their 40 classes from 0."""


def picture(*parts: str) -> np.ndarray:
    return np.asarray(Image.open(real_data("nyuv2", "frames", "refinenet", *parts)))


def depth_of(number: int) -> np.ndarray:
    """Meters; the steps of 0.2 mm are inferred from the range."""
    return picture(f"depth_gt_{number:06}.png") / 5000.0


def normals_of(number: int) -> np.ndarray:
    """As read, in the convention of the file."""
    decoded = picture(f"norm_gt_{number:06}.png").transpose(2, 0, 1) / 127.5 - 1
    return as_normals(decoded, "the picture")


class Published:
    """The published label images of the test images, by number."""

    def __init__(self, classes: int) -> None:
        archive = real_data("nyuv2", "meta", f"test_labels_{classes}", f"nyuv2_test_class{classes}.tgz")
        with tarfile.open(archive) as opened:
            files = {member.name: opened.extractfile(member) for member in opened if member.name.endswith(".png")}
            self._files = {int(Path(name).stem[-4:]): file.read() for name, file in files.items()}
        self.numbers = sorted(self._files)

    def image(self, number: int) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self._files[number])))


@pytest.fixture(scope="module")
def published() -> Published:
    return Published(13)


def official(root: Path, labels: dict[int, np.ndarray]) -> Any:
    """The official form of the real meta files and a data file of 1449 empty images, but for some label images.

    Args:
        root: Where to.
        labels: By the image's number, its 40 classes from 1, and 0 for none.
    """
    for name in (SPLITS, TO_40, TO_13):
        (root / name).symlink_to(real_data("nyuv2", "meta", name))
    to_40 = scipy_io.loadmat(root / TO_40)["mapClass"].ravel()
    one_of = np.array([0, *(np.flatnonzero(to_40 == number)[-1] + 1 for number in range(1, 41))], dtype=np.uint16)
    height, width = SIZE
    with h5py.File(root / DATA, "w") as file:
        file.create_dataset("images", (1449, 3, width, height), np.uint8, chunks=(1, 3, width, height))
        file.create_dataset("depths", (1449, width, height), np.float32, chunks=(1, width, height))
        made = file.create_dataset("labels", (1449, width, height), np.uint16, chunks=(1, width, height))
        for number, image in labels.items():
            made[number - 1] = one_of[image].T
        scene = file.create_dataset("scene", data=np.array([[ord("x")]], dtype=np.uint16))
        names = file.create_dataset("scenes", (1, 1449), h5py.ref_dtype)
        names[0] = [scene.ref] * 1449
    return find_source(root)


def test_the_split_is_the_published_one(tmp_path: Path, published: Published) -> None:
    source = official(tmp_path, {})
    assert (source.count("train"), source.count("test")) == (795, 654)
    content = scipy_io.loadmat(real_data("nyuv2", "meta", SPLITS))
    train, test = (content[field].ravel().tolist() for field in ("trainNdxs", "testNdxs"))
    assert sorted([*train, *test]) == list(range(1, 1450))
    assert published.numbers == test
    assert set(FRAMES) <= set(test)


def test_the_13_classes_of_the_two_frames_are_the_published_ones(tmp_path: Path, published: Published) -> None:
    """The reader maps 40 classes of one publisher to the 13 of another."""
    labels = {}
    for number in FRAMES:
        classes = picture(f"segm_gt_{number:06}.png").astype(np.int64)
        labels[number] = np.where(classes == NO_CLASS, 0, classes + 1)
        assert len(np.unique(labels[number])) > 8
    source = official(tmp_path, labels)
    for number in FRAMES:
        read = source.read("test", published.numbers.index(number)).segmentation
        assert read.shape == SIZE
        assert np.array_equal(read, published.image(number).astype(np.int64) - 1)


@pytest.mark.slow
def test_the_13_classes_of_all_test_images_are_the_published_ones(tmp_path: Path, published: Published) -> None:
    of_40 = Published(40)
    assert of_40.numbers == published.numbers
    source = official(tmp_path, {number: of_40.image(number) for number in of_40.numbers})
    for place, number in enumerate(published.numbers):
        assert np.array_equal(source.read("test", place).segmentation, published.image(number).astype(np.int64) - 1)


@pytest.mark.slow
def test_all_published_label_images_have_the_13_classes_and_none(published: Published) -> None:
    seen = np.zeros(256, dtype=np.int64)
    for number in published.numbers:
        image = published.image(number)
        assert (image.shape, image.dtype) == (SIZE, np.uint8)
        seen += np.bincount(image.ravel(), minlength=256)
    assert (seen[:14] > 0).all()
    assert (seen[14:] == 0).all()


@pytest.mark.parametrize("number", FRAMES)
def test_the_depth_of_the_frames_is_in_meters(number: int) -> None:
    depth = as_depth(depth_of(number), "the picture")
    assert 0.6 < (depth > 0).mean() < 1
    assert 1 < depth[depth > 0].min() < depth.max() < 6
    assert picture(f"{number:06}.png").shape == (*SIZE, 3)


def test_the_published_normals_are_known_where_they_are_known() -> None:
    assert (normals_of(433) != 0).any(axis=0).mean() == pytest.approx(0.779, abs=0.0005)


def test_the_convention_of_the_published_normals_is_found_by_far() -> None:
    depth = depth_of(433).astype(np.float32)
    found = compare_with_depth([Frame(np.zeros((3, *SIZE), np.uint8), np.zeros(SIZE, np.int8), depth, normals_of(433))])
    assert str(found.convention) == "right away up"
    (_, angle), (_, next_angle) = found.ranking[:2]
    assert angle < 7
    assert next_angle > 35
    assert found.pixels > 3000


@pytest.mark.parametrize("radius", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_normals_from_the_depth_are_the_published_ones(radius: int | None) -> None:
    """At most 7 degrees apart on average with the default window; 22 with one of 7 x 7, so the window matters."""
    rows, columns = np.arange(1, SIZE[0], 3), np.arange(1, SIZE[1], 3)
    derived = normals_from_depth(depth_of(433), KINECT, rows, columns, radius)
    given = normals_of(433)[:, rows[:, None], columns]
    given = np.stack([given[0], given[2], -given[1]])  # x, y, z are the first, the third, and the second turned round
    both = derived.any(axis=0) & given.any(axis=0)
    assert both.mean() > 0.6
    angles = np.degrees(np.arccos(np.clip((derived * given).sum(axis=0)[both], -1, 1)))
    assert angles.mean() <= 7 if radius is None else 20 < angles.mean() < 24


def test_a_folder_with_the_real_frame_is_read_and_turned(
    tmp_path: Path, published: Published, caplog: pytest.LogCaptureFixture
) -> None:
    """The frame in the layout of MTAN, normals as decoded and not cleaned, against the depth of the same batch."""
    arrays = {
        "image": picture("000433.png") / 255,
        "label": published.image(433).astype(np.int64) - 1,
        "depth": depth_of(433)[..., None],
        "normal": picture("norm_gt_000433.png") / 127.5 - 1,
    }
    for split in ("train", "val"):
        for kind, values in arrays.items():
            (tmp_path / split / kind).mkdir(parents=True)
            np.save(tmp_path / split / kind / "0.npy", values[4::8, 4::8])
    data = NYUv2(tmp_path, val_share=0, check=False)
    with caplog.at_level("INFO"):
        data.setup()
    assert "point right, away, up and are turned to right, up, towards the camera: 'right away up' is" in caplog.text
    _, targets = next(iter(data.test_dataloader()))
    normals, depth = targets["normals"][0].numpy(), targets["depth"][0, 0].numpy()
    assert (normals != 0).any(axis=0).mean() == pytest.approx(0.779, abs=0.01)
    derived = normals_from_depth(depth, KINECT.scaled(1 / 8, 1 / 8))
    both = derived.any(axis=0) & normals.any(axis=0)
    assert np.degrees(np.arccos(np.clip((derived * normals).sum(axis=0)[both], -1, 1))).mean() < 12
    floor = targets["segmentation"][0].numpy() == 4
    assert np.median(normals[1][floor & normals.any(axis=0)]) > 0.8
