"""The compact form: memory-mapped arrays at the sizes wanted, and a file that says what they are.

    nyuv2.json           version, sizes, where it came from and in which convention its normals were, scenes; length and
                         SHA-256 of every array file
    train_image.npy      uint8    (N, 3, H, W)
    train_segmentation.npy  int8  (N, h, w)
    train_depth.npy      float16  (N, h, w)
    train_normals.npy    int16    (N, 3, h, w)
    test_image.npy, ...  the official test images; keypoints (N, 48, 3) float32 if the source has them

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
"""What is said of normals that are left as they are."""
DERIVED = "derived from the depth"
"""What is said of normals that are in our convention from the start."""
SPLITS = ("train", "test")
_PREPARE_AGAIN = "Delete the folder and prepare the data again."


class Stored(Protocol):
    """Images in the compact types, whether read from the compact form or made of a source on the way.

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
        """Return the scene of each image, or None where it is not known."""

    def arrays(self, split: str, index: int) -> dict[str, Array]:
        """Return the arrays of one image."""


class Direct:
    """A source as it was downloaded, each image brought to the wanted sizes and its normals to our convention when it is read.

    The convention of the source's normals is found in the same few training images in every process, so that all agree.

    Args:
        source: The source.
        input_size: Height and width of the images; None for the source's own.
        output_size: Height and width of labels, depth and normals; None for the source's own.
        normals_convention: What the channels of the source's normals point to, such as ``"right away up"``; ``"auto"`` to
            find out from the depth and say so; None to leave the normals as they are.

    Attributes:
        normals: In which convention the source's normals are, in words.

    Raises:
        ValueError: ``normals_convention`` is none, or the source has no normals to which it applies.
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
        """Return the scene of each image, or None where it is not known."""
        return self.source.scenes(split)

    def arrays(self, split: str, index: int) -> dict[str, Array]:
        """Read one image and bring it to the wanted sizes and the compact types."""
        frame = self.source.read(split, index)
        if isinstance(frame.normals, np.ndarray):
            frame = replace(frame, normals=self._convention.to_ours(frame.normals))
        return compact(frame, self.input_size, self.output_size)

    def _find_convention(self, first: Frame, given: str | None) -> tuple[Convention, str]:
        """Return the convention, ours if none is known, and what it is in words."""
        if isinstance(first.normals, Intrinsics):
            if given not in (AUTO, None):
                raise ValueError(
                    f"NYUv2: normals_convention should be 'auto' for the {self.source.form} form, whose normals are derived "
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
                f"NYUv2: what the channels of the normals in {self.source.root} point to should show in the depth; it does "
                f"not: {compared}. The normals are left as they are. Give normals_convention, {HOW_TO_SAY}."
            )
            return OURS, UNKNOWN
        rank_zero_info(
            f"NYUv2: the channels of the normals in {self.source.root} point {', '.join(found.channels)}"
            f"{'' if found == OURS else ' and are turned to right, up, towards the camera'}: {compared}."
        )
        return found, str(found)


class Prepared:
    """Reads the compact form. Nothing is in memory but what is being read.

    Args:
        root: The folder with ``nyuv2.json``.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or not what ``nyuv2.json`` says.
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
        """Return the scene of each image, or None where it is not known."""
        scenes: list[str] | None = self._scenes[split]
        return scenes

    def arrays(self, split: str, index: int) -> dict[str, Array]:
        """Return one image's arrays, views of the memory maps."""
        maps = self._maps()
        return {kind: maps[file_of(split, kind)][index] for kind in self.kinds}

    def verify(self) -> None:
        """Read every byte and compare the checksums.

        Raises:
            ValueError: A file is not as it was written.
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
    """Name the file of one array."""
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
