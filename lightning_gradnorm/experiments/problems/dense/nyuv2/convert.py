"""Converts a source to the compact format, and resumes after an interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset

from lightning_gradnorm.experiments.problems.dense.nyuv2.errors import expect
from lightning_gradnorm.experiments.problems.dense.nyuv2.normals_convention import AUTO
from lightning_gradnorm.experiments.problems.dense.nyuv2.prepared import (
    DERIVED,
    SPLITS,
    UNKNOWN,
    VERSION,
    Direct,
    Prepared,
    checksum,
    file_of,
)
from lightning_gradnorm.experiments.problems.dense.nyuv2.source import MANIFEST, PROGRESS, Source
from lightning_gradnorm.experiments.problems.dense.nyuv2.storage_format import TYPES, Size, shapes

Array = npt.NDArray[Any]

NOTE_EVERY = 32
"""Number of images after which they are flushed to disk and counted as done."""


class _Conversion(Dataset[dict[str, Array]]):
    def __init__(self, direct: Direct, split: str) -> None:
        self.direct, self.split = direct, split

    def __getitem__(self, index: int) -> dict[str, Array]:
        return self.direct.arrays(self.split, index)


def prepare(
    source: Source,
    folder: Path,
    input_size: Size | None = None,
    output_size: Size | None = None,
    num_workers: int = 0,
    show_progress: bool = False,
    normals_convention: str = AUTO,
) -> Prepared:
    """Convert a source to the compact format.

    You can interrupt it at any moment. Called again with the same arguments, it continues after the last image recorded as
    done, and the files have the same bytes as after an undisturbed run. A complete folder stays unchanged.

    Args:
        source: The source.
        folder: The output folder; created if necessary.
        input_size: Height and width of the images; None for those of the source.
        output_size: Height and width of labels, depth and normals; None for those of the source.
        num_workers: Processes that read and convert; 0 for this process.
        show_progress: Show a progress bar.
        normals_convention: Directions of the channels of the source's normals, see `Direct`. They are stored in ours.

    Raises:
        ValueError: The folder was prepared or begun from another source or for other sizes, or a value in
            the source is out of range.
    """
    recorded = _recorded(folder)
    if recorded is not None and normals_convention == AUTO:
        # Detected once, so all later images are turned like the earlier ones.
        normals = recorded.get("source", {}).get("normals", UNKNOWN)
        direct = Direct(source, input_size, output_size, None if normals in (UNKNOWN, DERIVED) else normals)
    else:
        direct = Direct(source, input_size, output_size, normals_convention)
    plan: dict[str, Any] = {
        "version": VERSION,
        "input_size": list(direct.input_size),
        "output_size": list(direct.output_size),
        "kinds": list(direct.kinds),
        "types": {kind: str(TYPES[kind]) for kind in direct.kinds},
        "source": {"form": source.form, "size": list(source.size), "normals": direct.normals},
        "splits": {split: {"count": source.count(split), "scenes": source.scenes(split)} for split in SPLITS},
    }
    folder.mkdir(parents=True, exist_ok=True)
    if recorded is not None and (folder / MANIFEST).is_file():
        _expect_same_plan(plan, recorded, folder / MANIFEST)
        return Prepared(folder)
    done = _begin(folder, plan)
    with progress_bar(show_progress) as bar:
        for split in SPLITS:
            count = source.count(split)
            task = bar.add_task(f"prepare {split}", total=count, completed=done[split])
            maps = {kind: np.load(folder / file_of(split, kind), mmap_mode="r+") for kind in direct.kinds}
            # Convert the last finished image again. If it differs, the source has changed.
            first = max(done[split] - 1, 0)
            for index, arrays in enumerate(_convert(direct, split, first, count, num_workers), start=first):
                if index < done[split]:
                    same = all(np.array_equal(maps[kind][index], array) for kind, array in arrays.items())
                    fix = "Continue with the original source, or delete the folder."
                    expect(same, folder / PROGRESS, f"{split} image {index}", "the same as before", "another", fix)
                    continue
                for kind, array in arrays.items():
                    maps[kind][index] = array
                if (index + 1) % NOTE_EVERY == 0 or index + 1 == count:
                    for one in maps.values():
                        one.flush()
                    done[split] = index + 1
                    _write(folder / PROGRESS, {"plan": plan, "done": done})
                bar.update(task, completed=index + 1)
    names = [file_of(split, kind) for split in SPLITS for kind in direct.kinds]
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": checksum(folder / name)} for name in names}
    _write(folder / MANIFEST, {**plan, "files": files})
    (folder / PROGRESS).unlink()
    return Prepared(folder)


def _recorded(folder: Path) -> dict[str, Any] | None:
    """Return the plan of a prepared or begun folder, or None for a new one."""
    for name in (MANIFEST, PROGRESS):
        if (folder / name).is_file():
            content: dict[str, Any] = json.loads((folder / name).read_text())
            return content if name == MANIFEST else content["plan"]
    return None


def _begin(folder: Path, plan: dict[str, Any]) -> dict[str, int]:
    """Return how many images of each split are done. Create the files if there are none yet."""
    if (folder / PROGRESS).is_file():
        progress = json.loads((folder / PROGRESS).read_text())
        _expect_same_plan(plan, progress["plan"], folder / PROGRESS)
        return {split: int(progress["done"][split]) for split in SPLITS}
    every = shapes(tuple(plan["input_size"]), tuple(plan["output_size"]))
    for split in SPLITS:
        for kind in plan["kinds"]:
            shape = (plan["splits"][split]["count"], *every[kind])
            np.lib.format.open_memmap(folder / file_of(split, kind), mode="w+", dtype=TYPES[kind], shape=shape)
    done = dict.fromkeys(SPLITS, 0)
    _write(folder / PROGRESS, {"plan": plan, "done": done})
    return done


def _expect_same_plan(plan: dict[str, Any], found: dict[str, Any], file: Path) -> None:
    for key, wanted in plan.items():
        fix = "Choose another folder, or delete this one."
        expect(found.get(key) == wanted, file, key, _short(wanted), _short(found.get(key)), fix)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


def _convert(direct: Direct, split: str, first: int, count: int, num_workers: int) -> Iterator[dict[str, Array]]:
    loader = DataLoader(
        _Conversion(direct, split),
        sampler=range(first, count),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_same,
        generator=torch.Generator(),  # a separate one, so other random draws do not depend on the preparation
    )
    return iter(loader)


def _same(arrays: Any) -> Any:
    return arrays


def _write(file: Path, content: dict[str, Any]) -> None:
    """Write a file atomically."""
    partial = file.with_name(file.name + ".part")
    with partial.open("w") as stream:
        stream.write(json.dumps(content, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def progress_bar(show: bool) -> Progress:
    """Return a progress bar that counts images, hidden unless ``show``."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, disable=not show)
