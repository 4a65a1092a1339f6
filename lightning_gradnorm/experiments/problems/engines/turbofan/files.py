"""Writes simulated engines in C-MAPSS's file format."""

from __future__ import annotations

import shutil
from pathlib import Path
from uuid import uuid4

import numpy as np

from lightning_gradnorm.experiments.problems.engines.cmapss.files import Engines
from lightning_gradnorm.experiments.problems.engines.turbofan.engine import DECIMALS
from lightning_gradnorm.experiments.problems.engines.turbofan.simulator import cut_short, simulate

_LINE = ["%d", "%d", "%.4f", "%.4f", "%.1f", *(f"%.{digits}f" for digits in DECIMALS)]


def write_turbofan(folder: str | Path, subset: str, engines: int, test_engines: int, seed: int = 0) -> Path:
    """Simulate a subset and write ``train_FD001.txt``, ``test_FD001.txt`` and ``RUL_FD001.txt``, all of them or none.

    The same arguments give the same bytes.

    Args:
        folder: The folder to create. It must not exist yet, so nothing is overwritten. If another process creates it
            in the meantime, that one is kept.
        subset: ``"FD001"`` to ``"FD004"``.
        engines: Number of training engines, which run to failure.
        test_engines: Number of test engines, which are cut short.
        seed: Seed of all random draws.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder exists and is not empty.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as parent:
        ...     folder = write_turbofan(Path(parent, "made"), "FD001", engines=2, test_engines=1)
        ...     sorted(file.name for file in folder.iterdir())
        ['RUL_FD001.txt', 'test_FD001.txt', 'train_FD001.txt']
    """
    folder = Path(folder)
    names = {kind: f"{kind}_{subset}.txt" for kind in ("train", "test", "RUL")}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"write_turbofan: folder should not exist yet, or be empty; {folder} is neither. Delete it, or choose another."
        )
    test, left = cut_short(simulate(subset, test_engines, seed, "test"), subset, seed)
    begun = folder.with_name(f".{folder.name}.{uuid4().hex}")
    begun.mkdir(parents=True)
    try:
        _write(begun / names["train"], simulate(subset, engines, seed, "train").engines)
        _write(begun / names["test"], test)
        np.savetxt(begun / names["RUL"], left, fmt="%d ", newline="\n")
        try:
            begun.replace(folder)
        except OSError:
            if not all((folder / name).is_file() for name in names.values()):
                raise
    finally:
        shutil.rmtree(begun, ignore_errors=True)
    return folder


def _write(file: Path, engines: Engines) -> None:
    cycle = np.arange(len(engines.settings)) - engines.of_rows(engines.starts) + 1
    table = np.column_stack([engines.of_rows(engines.units), cycle, engines.settings, engines.sensors])
    # NASA's lines end with two blanks.
    np.savetxt(file, table, fmt=" ".join(_LINE) + "  ", newline="\n")
