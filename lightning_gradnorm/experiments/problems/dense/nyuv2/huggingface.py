"""Reads the Hugging Face copy: shards of a parquet table."""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradnorm.experiments.problems.dense.nyuv2.errors import COPY_AGAIN, expect, needed, wrong
from lightning_gradnorm.experiments.problems.dense.nyuv2.frame import (
    Frame,
    as_depth,
    as_image,
    as_normals,
    as_segmentation,
)
from lightning_gradnorm.experiments.problems.dense.nyuv2.per_process import PerProcess

Array = npt.NDArray[Any]

PREFIXES = {"train": ("train",), "test": ("val", "test")}
"""Prefixes of each split's shards, or of their folders. ``val`` is the official test split."""
COLUMNS = ("image", "segmentation", "depth", "normal")
_CHANNELS = {"image": 3, "segmentation": 0, "depth": 1, "normal": 3}


def shards(root: Path, split: str) -> list[Path]:
    """Return a split's shards in order: ``data/train-00000-of-00008.parquet``, …, or ``default/train/0000.parquet``, ….

    Raises:
        FileNotFoundError: A shard is missing, according to the names of the others.
    """
    found: list[Path] = []
    for folder in (root, root / "data", root / "default"):
        for prefix in PREFIXES[split]:
            found = sorted([*folder.glob(f"{prefix}-*.parquet"), *folder.glob(f"{prefix}/*.parquet")])
            if found:
                break
        if found:
            break
    names = {file.name for file in found}
    for file in found:
        if match := re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.parquet", file.name):
            prefix, _, total = match.groups()
            for number in range(int(total)):
                name = f"{prefix}-{number:05}-of-{total}.parquet"
                if name not in names:
                    raise FileNotFoundError(
                        f"NYUv2: {file.parent} should have {int(total)} shards of {prefix}; {name} is missing."
                    )
    return found


class HuggingFace:
    """Reads the parquet shards of ``tanganke/nyuv2`` as downloaded.

    Their columns are nested lists: ``image`` (3, H, W) in [0, 1], ``segmentation`` (H, W) with -1 for no class, ``depth``
    (1, H, W) in meters, ``normal`` (3, H, W), and ``noise``, which is ignored.

    Parquet is read by groups of rows. The last group stays in memory, so reading in order is fast. In random order, every
    image reads a whole group. Train on a prepared copy.

    Args:
        root: The folder with the shards, or its parent if they are in ``data`` or ``default``.

    Raises:
        FileNotFoundError: There are no shards, or one is missing.
        ValueError: A shard is damaged, or a column is missing or has the wrong shape or type.
        ModuleNotFoundError: pyarrow is not installed.
    """

    form = "Hugging Face parquet"

    def __init__(self, root: Path) -> None:
        self.root = root
        self._shards = {split: shards(root, split) for split in PREFIXES}
        for split, files in self._shards.items():
            if not files:
                raise FileNotFoundError(f"NYUv2: {root} should have parquet shards of {split}; found none.")
        self._opened = PerProcess(_RowGroup)
        # For each split and group of rows: its file, its number in the file, and the number of rows up to its end.
        self._groups: dict[str, list[tuple[Path, int]]] = {}
        self._ends: dict[str, list[int]] = {}
        for split, files in self._shards.items():
            rows: list[int] = []
            self._groups[split] = []
            for file in files:
                opened = _open(file)
                self._check(file, opened.schema_arrow)
                for group in range(opened.num_row_groups):
                    self._groups[split].append((file, group))
                    rows.append(opened.metadata.row_group(group).num_rows)
            self._ends[split] = list(accumulate(rows))
            expect(bool(rows) and sum(rows) > 0, files[0], "the table", "of at least one row", "none")
        self.size = self._size()

    def count(self, split: str) -> int:
        """Return the number of images of ``"train"`` or ``"test"``."""
        return self._ends[split][-1]

    def scenes(self, split: str) -> None:
        """Return None, because this format does not tell which images show the same scene."""
        return

    def read(self, split: str, index: int) -> Frame:
        """Read the ``index``-th image of a split.

        Raises:
            ValueError: A value is out of range, or a shard is damaged at this place.
        """
        values, where = self._row(split, index)
        height, width = self.size
        for column, array in values.items():
            shape = tuple(n for n in (_CHANNELS[column], height, width) if n)
            expect(array.shape == shape, where, column, f"of shape {shape}", f"shape {array.shape}")
        return Frame(
            image=as_image(values["image"], where),
            segmentation=as_segmentation(values["segmentation"], where),
            depth=as_depth(values["depth"][0], where),
            normals=as_normals(values["normal"], where),
        )

    def _row(self, split: str, index: int) -> tuple[dict[str, Array], str]:
        number = bisect_right(self._ends[split], index)
        file, group = self._groups[split][number]
        row = index - (self._ends[split][number - 1] if number else 0)
        where = f"{file} at row {row} of group {group}"
        table = self._opened().table(file, group)
        return {column: _array(table.column(column).slice(row, 1), where, column) for column in COLUMNS}, where

    def _size(self) -> tuple[int, int]:
        values, where = self._row("train", 0)
        shape = values["segmentation"].shape
        expect(len(shape) == 2, where, "segmentation", "of shape (height, width)", f"shape {shape}")
        return shape[0], shape[1]

    def _check(self, file: Path, schema: Any) -> None:
        types = needed("pyarrow").types
        for column, channels in _CHANNELS.items():
            expect(column in schema.names, file, column, "a column", f"only {', '.join(schema.names)}")
            leaf, levels = schema.field(column).type, 0
            while hasattr(leaf, "value_type") or hasattr(leaf, "storage_type"):
                levels += hasattr(leaf, "value_type")
                leaf = leaf.value_type if hasattr(leaf, "value_type") else leaf.storage_type
            wanted = 3 if channels else 2
            expect(levels == wanted, file, column, f"lists nested {wanted} deep", f"{schema.field(column).type}")
            fits = types.is_floating(leaf) or (column == "segmentation" and types.is_integer(leaf))
            expected = "integers" if column == "segmentation" else "floating-point numbers"
            expect(fits, file, column, expected, f"{leaf}")


class _RowGroup:
    """The last group of rows read."""

    def __init__(self) -> None:
        self._read: tuple[Path, int] | None = None
        self._table: Any = None

    def table(self, file: Path, group: int) -> Any:
        if self._read != (file, group):
            self._table = None  # free it before reading the next one: two of them may not fit into memory
            try:
                self._table = _open(file).read_row_group(group, columns=list(COLUMNS))
            except (OSError, ValueError) as error:  # pyarrow's errors are these
                wrong(file, f"row group {group}", "readable", error, COPY_AGAIN)
            self._read = (file, group)
        return self._table


def _open(file: Path) -> Any:
    parquet = needed("pyarrow.parquet")
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        wrong(file, "the file", "a parquet table", error, COPY_AGAIN)


def _array(cell: Any, where: str, column: str) -> Array:
    """Convert one cell of nested lists to an array without Python lists."""
    values = cell.combine_chunks() if hasattr(cell, "combine_chunks") else cell
    lengths = []
    while True:
        values = getattr(values, "storage", values)
        if not hasattr(values, "flatten") or not hasattr(values.type, "value_type"):
            break
        items = np.asarray(values.value_lengths())
        expect(
            values.null_count == 0 and len(items) > 0 and bool((items == items[0]).all()), where, column,
            "lists of equal length", "some that are missing or have another length",
        )  # fmt: skip
        lengths.append(int(items[0]))
        values = values.flatten()
    expect(values.null_count == 0, where, column, "without nulls", f"{values.null_count}")
    return np.asarray(values).reshape(lengths)
