"""The compact format: memory-mapped arrays at the wanted sizes, and a file that describes them.

    nyuv2.json           version, sizes, source and convention of its normals, scenes; length and
                         SHA-256 of every array file
    train_image.npy      uint8    (N, 3, H, W)
    train_segmentation.npy  int8  (N, h, w)
    train_depth.npy      float16  (N, h, w)
    train_normals.npy    int16    (N, 3, h, w)
    test_image.npy, ...  the official test images; also keypoints (N, 48, 3) float32 if the source has them

`lightning_gradnorm.experiments.problems.dense.nyuv2.storage_format` documents the types and their errors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_gradnorm.experiments.problems.dense.nyuv2.errors import existing, expect, wrong
from lightning_gradnorm.experiments.problems.dense.nyuv2.frame import Frame
from lightning_gradnorm.experiments.problems.dense.nyuv2.normals_convention import (
    AUTO,
    HOW_TO_SAY,
    IMAGES,
    OURS,
    Convention,
    compare_with_depth,
)
from lightning_gradnorm.experiments.problems.dense.nyuv2.normals_from_depth import Intrinsics
from lightning_gradnorm.experiments.problems.dense.nyuv2.per_process import PerProcess
from lightning_gradnorm.experiments.problems.dense.nyuv2.source import MANIFEST, Source
from lightning_gradnorm.experiments.problems.dense.nyuv2.storage_format import TYPES, Size, compact, shapes

Array = npt.NDArray[Any]

VERSION = 2
UNKNOWN = "unknown"
"""The description of unchanged normals."""
DERIVED = "derived from the depth"
"""The description of normals that are already in our convention."""
SPLITS = ("train", "test")
_PREPARE_AGAIN = "Delete the folder and prepare the data again."


class Stored(Protocol):
    """Images in the compact types, read from the compact format or converted from a source.

    Attributes:
        input_size: Height and width of the images.
        output_size: Height and width of labels, depth and normals.
        kinds: The arrays that each image has.
    """

    input_size: Size
    output_size: Size
    kinds: tuple[str, ...]

    def count(self, split: str) -> int:
        """Return the number of images of ``"train"`` or ``"test"``."""

    def scenes(self, split: str) -> list[str] | None:
        """Return the scene of each image, or None if unknown."""

    def arrays(self, split: str, index: int) -> dict[str, Array]:
        """Return the arrays of one image."""


class Direct:
    """A source as downloaded. Each image is converted to the wanted sizes and our normals convention when it is read.

    Every process detects the convention of the source's normals from the same few training images, so all agree.

    Args:
        source: The source.
        input_size: Height and width of the images; None for those of the source.
        output_size: Height and width of labels, depth and normals; None for those of the source.
        normals_convention: Directions of the channels of the source's normals, such as ``"right away up"``; ``"auto"`` to
            detect and print them from the depth; None to leave the normals unchanged.

    Attributes:
        normals: The convention of the source's normals as text.

    Raises:
        ValueError: ``normals_convention`` is invalid, or does not apply because the source has no normals.
    """

    def __init__(
        self,
        source: Source,
        input_size: Size | None = None,
        output_size: Size | None = None,
        normals_convention: str | None = AUTO,
    ) -> None:
        self.source = source
        self.input_size = input_size or source.size
        self.output_size = output_size or source.size
        first = source.read("train", 0)
        self._convention, self.normals = self._find_convention(first, normals_convention)
        self.kinds = tuple(compact(first, self.input_size, self.output_size))

    def count(self, split: str) -> int:
        """Return the number of images of ``"train"`` or ``"test"``."""
        return self.source.count(split)

    def scenes(self, split: str) -> list[str] | None:
        """Return the scene of each image, or None if unknown."""
        return self.source.scenes(split)

    def arrays(self, split: str, index: int) -> dict[str, Array]:
        """Read one image and convert it to the wanted sizes and the compact types."""
        frame = self.source.read(split, index)
        if isinstance(frame.normals, np.ndarray):
            frame = replace(frame, normals=self._convention.to_ours(frame.normals))
        return compact(frame, self.input_size, self.output_size)

    def _find_convention(self, first: Frame, given: str | None) -> tuple[Convention, str]:
        """Return the convention (ours if it is unknown) and its description."""
        if isinstance(first.normals, Intrinsics):
            if given not in (AUTO, None):
                raise ValueError(
                    f"NYUv2: normals_convention should be 'auto' for the {self.source.form} format, whose normals are derived "
                    f"from its depth; got {given!r}."
                )
            return OURS, DERIVED
        if given is None:
            return OURS, UNKNOWN
        if given != AUTO:
            convention = Convention.parse(given)
            return convention, str(convention)
        count = self.source.count("train")
        others = sorted({i * count // IMAGES for i in range(IMAGES)} - {0})
        compared = compare_with_depth(chain([first], (self.source.read("train", i) for i in others)))
        found = compared.convention
        if found is None:
            rank_zero_warn(
                f"NYUv2: the directions of the normals' channels in {self.source.root} should show in the depth; they do "
                f"not: {compared}. The normals stay unchanged. Set normals_convention, {HOW_TO_SAY}."
            )
            return OURS, UNKNOWN
        rank_zero_info(
            f"NYUv2: the channels of the normals in {self.source.root} point {', '.join(found.channels)}"
            f"{'' if found == OURS else ' and are turned to right, up, towards the camera'}: {compared}."
        )
        return found, str(found)


class Prepared:
    """Reads the compact format. Only the data being read are in memory.

    Args:
        root: The folder with ``nyuv2.json``.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or does not match ``nyuv2.json``.
    """

    form = "prepared"

    def __init__(self, root: Path) -> None:
        self.root = root
        self._file = existing(root / MANIFEST, "what the prepared data are")
        try:
            manifest = json.loads(self._file.read_text())
            expect(
                manifest["version"] == VERSION, self._file, "version", f"{VERSION}", manifest["version"], _PREPARE_AGAIN
            )
            self.input_size: Size = _size(manifest["input_size"])
            self.output_size: Size = _size(manifest["output_size"])
            self.kinds: tuple[str, ...] = tuple(manifest["kinds"])
            self.source: dict[str, Any] = manifest["source"]
            self._counts = {split: int(manifest["splits"][split]["count"]) for split in SPLITS}
            self._scenes = {split: manifest["splits"][split]["scenes"] for split in SPLITS}
            self._files = {name: (int(of["bytes"]), str(of["sha256"])) for name, of in manifest["files"].items()}
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            wrong(self._file, "the description", "complete", f"{type(error).__name__}: {error}", _PREPARE_AGAIN)
        self._maps = PerProcess(self._open)
        self._open()

    def count(self, split: str) -> int:
        """Return the number of images of ``"train"`` or ``"test"``."""
        return self._counts[split]

    def scenes(self, split: str) -> list[str] | None:
        """Return the scene of each image, or None if unknown."""
        scenes: list[str] | None = self._scenes[split]
        return scenes

    def arrays(self, split: str, index: int) -> dict[str, Array]:
        """Return one image's arrays, views of the memory maps."""
        maps = self._maps()
        return {kind: maps[file_of(split, kind)][index] for kind in self.kinds}

    def verify(self) -> None:
        """Read every byte and compare the checksums.

        Raises:
            ValueError: A file has changed since it was written.
        """
        for name, (_, digest) in self._files.items():
            found = checksum(self.root / name)
            expect(found == digest, self.root / name, "the SHA-256", digest, found, _PREPARE_AGAIN)

    def _open(self) -> dict[str, Array]:
        every = shapes(self.input_size, self.output_size)
        maps = {}
        for split in SPLITS:
            for kind in self.kinds:
                name = file_of(split, kind)
                file = existing(self.root / name, f"{kind} of the {split} images")
                expect(name in self._files, self._file, "files", f"with {name}", ", ".join(self._files), _PREPARE_AGAIN)
                length = self._files[name][0]
                found = file.stat().st_size
                expect(found == length, file, kind, f"{length} bytes", found, _PREPARE_AGAIN)
                try:
                    maps[name] = np.load(file, mmap_mode="r")
                except ValueError as error:
                    wrong(file, kind, "a .npy file", error, _PREPARE_AGAIN)
                shape = (self._counts[split], *every[kind])
                expect(
                    maps[name].shape == shape, file, kind, f"of shape {shape}", f"{maps[name].shape}", _PREPARE_AGAIN
                )
                expect(maps[name].dtype == TYPES[kind], file, kind, f"{TYPES[kind]}", maps[name].dtype, _PREPARE_AGAIN)
        return maps


def file_of(split: str, kind: str) -> str:
    """Return the file name of one array."""
    return f"{split}_{kind}.npy"


def checksum(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(stream)


def _sha256(stream: Iterable[bytes]) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    for part in stream:
        digest.update(part)
    return digest.hexdigest()


def _size(values: Any) -> Size:
    height, width = values
    return int(height), int(width)
