"""Reads the folder prepared by the authors of MTAN: one ``.npy`` per image and kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradnorm.experiments.problems.dense.nyuv2.errors import COPY_AGAIN, existing, expect, wrong
from lightning_gradnorm.experiments.problems.dense.nyuv2.frame import (
    Frame,
    as_depth,
    as_image,
    as_normals,
    as_segmentation,
)

Array = npt.NDArray[Any]

FOLDERS = {"train": "train", "test": "val"}
"""The folder of each split. ``val`` is the official test split."""
KINDS = ("image", "label", "depth", "normal")


class MTAN:
    """Reads ``root/{train,val}/{image,label,depth,normal}/{0..N-1}.npy``, as used by MTAN, LibMTL, CAGrad and Nash-MTL.

    ``image`` (H, W, 3) in [0, 1], ``label`` (H, W) with -1 for no class, ``depth`` (H, W, 1) in meters with 0 for unknown,
    ``normal`` (H, W, 3) with zero for unknown. Their floating-point types vary between copies. The headers and lengths of
    all files are checked first, their values on reading.

    Args:
        root: The folder with ``train`` and ``val``.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is truncated, or has the wrong shape or type.
    """

    form = "MTAN folder"

    def __init__(self, root: Path) -> None:
        self.root = root
        self._counts = {split: self._count(split) for split in FOLDERS}
        height_width: tuple[int, ...] = self._header(self._path("train", "image", 0))[0][:2]
        self.size: tuple[int, int] = (height_width[0], height_width[1])
        for split, count in self._counts.items():
            for index in range(count):
                for kind in KINDS:
                    self._check(self._path(split, kind, index), kind)

    def count(self, split: str) -> int:
        """Return the number of images of ``"train"`` or ``"test"``."""
        return self._counts[split]

    def scenes(self, split: str) -> None:
        """Return None, because this format does not tell which images show the same scene."""
        return

    def read(self, split: str, index: int) -> Frame:
        """Read the ``index``-th image of a split.

        Raises:
            ValueError: A value is out of range.
        """
        files = {kind: self._path(split, kind, index) for kind in KINDS}
        values = {kind: np.load(file) for kind, file in files.items()}
        return Frame(
            image=as_image(np.ascontiguousarray(values["image"].transpose(2, 0, 1)), files["image"]),
            segmentation=as_segmentation(values["label"].reshape(self.size), files["label"]),
            depth=as_depth(values["depth"].reshape(self.size), files["depth"]),
            normals=as_normals(np.ascontiguousarray(values["normal"].transpose(2, 0, 1)), files["normal"]),
        )

    def _path(self, split: str, kind: str, index: int) -> Path:
        return self.root / FOLDERS[split] / kind / f"{index}.npy"

    def _count(self, split: str) -> int:
        """Count a split's images: the highest file number plus one. All files up to it must exist."""
        numbers: dict[str, set[int]] = {}
        for kind in KINDS:
            folder = self.root / FOLDERS[split] / kind
            if not folder.is_dir():
                raise FileNotFoundError(f"NYUv2: the MTAN format should have the folder {folder}; no such folder.")
            numbers[kind] = {int(file.stem) for file in folder.glob("*.npy") if file.stem.isdigit()}
        count = max((number + 1 for found in numbers.values() for number in found), default=0)
        folder = self.root / FOLDERS[split]
        expect(count > 0, folder, "the images", "0.npy, 1.npy, …", "none")
        for kind, found in numbers.items():
            missing = sorted(set(range(count)) - found)
            if missing:
                existing(self._path(split, kind, missing[0]), f"the {kind} of image {missing[0]} of {count}")
        return count

    def _check(self, file: Path, kind: str) -> None:
        shape, dtype, data_bytes = self._header(file)
        kinds = "fiu" if kind == "label" else "f"
        expected = "numbers" if kind == "label" else "floating-point numbers"
        expect(dtype.kind in kinds, file, kind, expected, f"dtype {dtype}")
        shapes: dict[str, list[tuple[int, ...]]] = {
            "image": [(*self.size, 3)],
            "normal": [(*self.size, 3)],
            "depth": [(*self.size, 1), self.size],
            "label": [self.size, (*self.size, 1)],
        }
        expect(shape in shapes[kind], file, kind, f"of shape {shapes[kind][0]}", f"shape {shape}")
        wanted = int(np.prod(shape)) * dtype.itemsize
        expect(data_bytes == wanted, file, kind, f"{wanted} bytes of data", f"{data_bytes}", COPY_AGAIN)

    def _header(self, file: Path) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        """Return shape, type and the number of data bytes that follow."""
        with file.open("rb") as stream:
            try:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(stream)
            except ValueError as error:
                wrong(file, "the header", "that of a .npy file", error, COPY_AGAIN)
            return shape, dtype, file.stat().st_size - stream.tell()
