"""Reads and writes the test metrics in a run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "test_metrics.json"
"""Name of the file in the run's folder: ``{"test/loss": …, "test/<metric>/<task>": …}``."""

ALL_TASKS = "all"
"""The row for metrics of all tasks, such as the sum of the losses."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    name: str
    metrics: dict[str, float]


def write_whole(file: Path, record: Mapping[str, Any]) -> None:
    """Write the record as JSON atomically. A process killed meanwhile leaves the old file, never half a file."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(dict(record), indent=2) + "\n")
    part.replace(file)


def write_metrics(folder: str | Path, metrics: Mapping[str, float]) -> Path:
    """Write the metrics to the run's folder, and return the file."""
    path = Path(folder) / FILE
    write_whole(path, metrics)
    return path


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Return the run in that folder.

    Args:
        folder: the folder that `write_metrics` wrote to.
        name: the run's name in tables; by default the folder's name.

    Raises:
        FileNotFoundError: the folder has no test metrics.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = write_metrics(folder, {"test/loss": 0.5})
        ...     read_run(folder, name="equal")
        Run(name='equal', metrics={'test/loss': 0.5})
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} should exist once a run is finished; found none. Use the folder of a run with a test (test=true)."
        )
    return Run(
        name or Path(folder).name, {metric: float(value) for metric, value in json.loads(path.read_text()).items()}
    )


def read_runs(folder: str | Path) -> list[Run]:
    """Return the run in that folder, or the finished runs below it, such as those of a sweep.

    Runs below are named by their path from the folder.

    Raises:
        FileNotFoundError: there are no finished runs in or below the folder.
    """
    folder = Path(folder)
    below = [] if (folder / FILE).is_file() else sorted(file.parent for file in folder.rglob(FILE))
    return [read_run(one, name=str(one.relative_to(folder))) for one in below] or [read_run(folder)]


def tasks_of(metrics: Mapping[str, float]) -> list[str]:
    """Return the tasks that have metrics.

    Example:
        >>> tasks_of({"test/loss": 3.0, "test/loss/left": 1.0, "test/accuracy/left": 0.9})
        ['left']
    """
    return [task for task in by_task(metrics) if task != ALL_TASKS]


def by_task(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return task → metric → value. Names without a task (``stage/metric``) belong to all tasks and come last.

    Example:
        >>> by_task({"test/loss": 3.0, "test/loss/left": 1.0, "test/accuracy/left": 0.9})
        {'left': {'loss': 1.0, 'accuracy': 0.9}, 'all': {'loss': 3.0}}
    """
    rows: dict[str, dict[str, float]] = {}
    of_all: dict[str, float] = {}
    for name, value in metrics.items():
        _, metric, *task = name.split("/", 2)
        (rows.setdefault(task[0], {}) if task else of_all)[metric] = value
    return {**rows, ALL_TASKS: of_all} if of_all else rows
