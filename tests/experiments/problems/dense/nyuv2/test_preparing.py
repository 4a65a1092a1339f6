"""An interrupted preparation continues; later damage is detected."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from indoor import digests, frame, frames
from nyuv2_writers import write_mtan

from lightning_gradnorm.experiments.problems.dense.nyuv2 import Frame, NYUv2, Prepared, convert, prepare
from lightning_gradnorm.experiments.problems.dense.nyuv2.source import find_source

SMALL = (12, 16)
SIZES = {"input_size": (10, 12), "output_size": (6, 8)}
SCRIPT = Path(__file__).parents[5] / "scripts" / "prepare_nyuv2.py"


class Rooms:
    """A source made of memory that fails, once, when it has been asked so many times."""

    form, size, root = "made-up", SMALL, Path("nowhere")

    def __init__(self, fail_after: int | None = None, first: int = 0, keypoints: bool = False) -> None:
        self.left, self.first, self.keypoints = fail_after, first, keypoints

    def count(self, split: str) -> int:
        return {"train": 70, "test": 40}[split]

    def scenes(self, split: str) -> None:
        return None

    def read(self, split: str, index: int) -> Frame:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        made = frame(self.first + index + 1000 * (split == "test"), SMALL)
        if not self.keypoints:
            return made
        points = np.random.default_rng(index).uniform(size=(48, 3)).round().astype(np.float32)
        return Frame(made.image, made.segmentation, made.depth, made.normals, points)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    prepare(Rooms(), folder, **SIZES)
    return digests(folder)


@pytest.mark.parametrize("after", [1, 2, 33, 40, 65, 72, 100, 110])
def test_an_interrupted_preparation_ends_with_the_same_bytes(
    after: int, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(Rooms(fail_after=after), tmp_path, **SIZES)
    assert not (tmp_path / "nyuv2.json").exists()
    second = Rooms(fail_after=1000)
    prepare(second, tmp_path, **SIZES)
    assert digests(tmp_path) == undisturbed
    # It continued: one image to find out the kinds, and at most one again for each split and those since the last note.
    assert 1000 - second.left <= 110 - (after - 1) + 3 + convert.NOTE_EVERY


def test_a_preparation_interrupted_again_and_again_comes_to_an_end(undisturbed: dict[str, str], tmp_path: Path) -> None:
    interruptions = 0
    while not (tmp_path / "nyuv2.json").exists():
        try:
            prepare(Rooms(fail_after=40), tmp_path, **SIZES)
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions >= 2
    assert digests(tmp_path) == undisturbed


def test_worker_processes_write_the_same_bytes(undisturbed: dict[str, str], tmp_path: Path) -> None:
    prepare(Rooms(), tmp_path, **SIZES, num_workers=2)
    assert digests(tmp_path) == undisturbed


def _kill_in_the_middle(pid: int, target: Path, poll: Callable[[], object]) -> None:
    """Kill a process, by a signal that it cannot catch, when some of its training images are done."""
    progress = target / "nyuv2.progress.json"
    while poll() is None:
        if progress.exists() and json.loads(progress.read_text())["done"]["train"] > 0:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.01)


def _expect_begun(target: Path) -> None:
    done = json.loads((target / "nyuv2.progress.json").read_text())["done"]
    assert 0 < done["train"] < 70
    assert done["test"] == 0
    with pytest.raises(
        ValueError, match=r"should be prepared completely; they are not\. Run scripts/prepare_nyuv2.py again"
    ):
        NYUv2(target).setup()


class SlowRooms(Rooms):
    def read(self, split: str, index: int) -> Frame:
        time.sleep(0.02)
        return super().read(split, index)


def test_a_killed_preparation_ends_with_the_same_bytes(undisturbed: dict[str, str], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=prepare, args=(SlowRooms(), tmp_path), kwargs=SIZES)
    process.start()
    _kill_in_the_middle(process.pid, tmp_path, lambda: process.exitcode)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    _expect_begun(tmp_path)
    prepare(Rooms(), tmp_path, **SIZES)
    assert digests(tmp_path) == undisturbed


SLOWLY = """
import runpy, sys, time
from lightning_gradnorm.experiments.problems.dense.nyuv2 import mtan
read = mtan.MTAN.read
mtan.MTAN.read = lambda *arguments: (time.sleep(0.02), read(*arguments))[1]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_killed_script_ends_with_the_same_bytes(tmp_path: Path) -> None:
    write_mtan(tmp_path / "source", frames(69, size=SMALL), frames(40, first=90, size=SMALL))
    prepare(find_source(tmp_path / "source"), tmp_path / "undisturbed", **SIZES)
    target = tmp_path / "target"
    arguments = [SCRIPT, tmp_path / "source", target, "--input-size", "10", "12", "--output-size", "6", "8"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, *arguments], env=environment)
    _kill_in_the_middle(process.pid, target, process.poll)
    assert process.wait() == -signal.SIGKILL
    _expect_begun(target)
    again = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True)
    assert "is in the MTAN folder format: 69 train and 40 test images of 12 x 16." in again.stdout
    assert "prepare train" in again.stdout
    assert digests(target) == digests(tmp_path / "undisturbed")


def test_a_complete_preparation_does_not_change(tmp_path: Path) -> None:
    prepare(Rooms(), tmp_path, **SIZES)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    asked = Rooms(fail_after=1)
    prepare(asked, tmp_path, **SIZES)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("complete", [True, False])
def test_a_folder_prepared_otherwise_is_not_written_over(complete: bool, tmp_path: Path) -> None:
    if complete:
        prepare(Rooms(), tmp_path, **SIZES)
    else:
        with pytest.raises(KeyboardInterrupt):
            prepare(Rooms(fail_after=50), tmp_path, **SIZES)
    before = digests(tmp_path)
    with pytest.raises(
        ValueError, match=r"input_size in .*json should be \[12, 16\]; got \[10, 12\]. Choose another folder"
    ):
        prepare(Rooms(), tmp_path, output_size=(6, 8))
    with pytest.raises(ValueError, match=r"kinds in .*json should be"):
        prepare(Rooms(keypoints=True), tmp_path, **SIZES)
    assert digests(tmp_path) == before


def test_another_source_of_the_same_shape_is_detected_when_continuing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(Rooms(fail_after=50), tmp_path, **SIZES)
    with pytest.raises(ValueError, match=r"train image 31 in .* should be the same as before; got another"):
        prepare(Rooms(first=5), tmp_path, **SIZES)


def test_keypoints_are_kept_where_there_are_any(tmp_path: Path) -> None:
    source = Rooms(keypoints=True)
    prepare(source, tmp_path, **SIZES)
    data = NYUv2(tmp_path, tasks=("depth", "keypoints"), batch_size=2, val_share=0)
    data.setup()
    _, targets = next(iter(data.test_dataloader()))
    assert list(targets) == ["depth", "keypoints"]
    assert (targets["keypoints"].shape, targets["keypoints"].dtype) == ((2, 48, 3), torch.float32)
    for points, index in zip(targets["keypoints"].numpy(), (0, 1), strict=True):
        stored = source.read("test", index).keypoints
        assert points == pytest.approx(stored * [0.5, 0.5, 1])  # half as many pixels


FILES = [f"{split}_{kind}.npy" for split in ("train", "test") for kind in ("image", "segmentation", "depth", "normals")]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found(name: str, tmp_path: Path) -> None:
    prepare(Rooms(), tmp_path, **SIZES)
    Prepared(tmp_path).verify()
    file = tmp_path / name
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    file.write_bytes(content)
    stored = Prepared(tmp_path)  # nothing to be seen from outside
    with pytest.raises(ValueError, match=f"the SHA-256 in .*{name} should be"):
        stored.verify()
    with pytest.raises(ValueError, match=f"the SHA-256 in .*{name} should be"):
        NYUv2(tmp_path).prepare_data()
    NYUv2(tmp_path, check=False).prepare_data()


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _retype(file: Path) -> None:
    """Other values of the same number of bytes."""
    content = np.load(file)
    with file.open("wb") as stream:
        np.lib.format.write_array(stream, content.view({1: "V1", 2: "<u2"}[content.itemsize]), version=(1, 0))


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("train_depth.npy", _cut, r"depth in .*train_depth.npy should be \d+ bytes; got \d+"),
        (
            "test_normals.npy",
            Path.unlink,
            "normals of the test images should be in .*test_normals.npy; no such file",
        ),
        ("train_depth.npy", _retype, "depth in .*train_depth.npy should be float16; got uint16"),
        (
            "nyuv2.json",
            lambda file: file.write_text(file.read_text()[:300]),
            "description in .*nyuv2.json should be complete",
        ),
        ("nyuv2.json", lambda file: file.write_text("[]"), "description in .*nyuv2.json should be complete"),
        (
            "nyuv2.json",
            lambda file: file.write_text(file.read_text().replace('"count": 70', '"count": 71')),
            r"image in .*train_image.npy should be of shape \(71, 3, 10, 12\); got \(70, 3, 10, 12\)",
        ),
        (
            "nyuv2.json",
            lambda file: file.write_text(file.read_text().replace('"version": 2', '"version": 7')),
            "version in .*nyuv2.json should be 2; got 7",
        ),
    ],
)
def test_damaged_prepared_data_are_an_error_that_names_the_file(name, harm, message: str, tmp_path: Path) -> None:
    prepare(Rooms(), tmp_path, **SIZES)
    harm(tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        NYUv2(tmp_path).setup()


def test_the_script_verifies_and_names_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from prepare_nyuv2 import main
    finally:
        sys.path.remove(str(SCRIPT.parent))
    write_mtan(tmp_path / "source", frames(3, size=SMALL), frames(2, size=SMALL))
    main([str(tmp_path / "source"), str(tmp_path / "target"), "--output-size", "6", "8"])
    main(["--verify", str(tmp_path / "target")])
    assert "every byte is as it was written" in capsys.readouterr().out
    assert (Prepared(tmp_path / "target").input_size, Prepared(tmp_path / "target").output_size) == ((12, 16), (6, 8))
    _cut(tmp_path / "target" / "test_image.npy")
    with pytest.raises(SystemExit, match=r"image in .*test_image.npy should be"):
        main(["--verify", str(tmp_path / "target")])
    with pytest.raises(SystemExit, match="root should be a folder"):
        main([str(tmp_path / "nowhere"), str(tmp_path / "target")])
    (tmp_path / "source" / "val" / "label" / "1.npy").unlink()
    with pytest.raises(SystemExit, match=r"the label of image 1 of 2 should be in .*val/label/1.npy; no such file"):
        main([str(tmp_path / "source"), str(tmp_path / "other")])
