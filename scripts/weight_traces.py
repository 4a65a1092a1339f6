"""Analyzes GradNorm's weights in finished runs: how stable they are, and how close the gradient norms are to their targets."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

WEIGHT, NORM, L_GRAD = "gradnorm/weight/", "gradnorm/grad_norm/", "gradnorm/loss"


@dataclass(frozen=True)
class Trace:
    """The last third of a training.

    Attributes:
        spread: Standard deviation of each task's log w, over the logged steps.
        distance: Σ |G_i - target_i| / Σ G_i, averaged over the logged steps. With smoothing, both use the averages.
    """

    spread: dict[str, float]
    distance: float


def read_rows(folder: Path, metric: str = L_GRAD) -> list[dict[str, str]]:
    """Return the rows of a run's CSV log with a metric, by default GradNorm's."""
    (file,) = folder.rglob("metrics.csv")
    with file.open() as lines:
        return [row for row in csv.DictReader(lines) if row.get(metric)]


def read_weights(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return the logged steps and their weights, by task."""
    rows = read_rows(folder)
    names = [name for name in rows[0] if name.startswith(WEIGHT)]
    steps = [int(row["step"]) for row in rows]
    return {name.removeprefix(WEIGHT): (steps, [float(row[name]) for row in rows]) for name in names}


def read_trace(folder: Path) -> Trace:
    """Read the trace of a run that logged with CSVLogger. Its single ``metrics.csv`` may be in a subfolder."""
    rows = read_rows(folder)
    last = rows[2 * len(rows) // 3 :]
    tasks = [name.removeprefix(WEIGHT) for name in last[0] if name.startswith(WEIGHT)]
    spread = {task: statistics.stdev(math.log(float(row[WEIGHT + task])) for row in last) for task in tasks}
    norms = [sum(float(row[NORM + task]) for task in tasks if row[NORM + task]) for row in last]
    distance = statistics.mean(float(row[L_GRAD]) / norm for row, norm in zip(last, norms, strict=True))
    return Trace(spread, distance)


def traces_table(of_ways: Mapping[str, Sequence[Path]]) -> str:
    """Return a table of the means over runs.

    Args:
        of_ways: The folders with the runs of each way.
    """
    found = {way: [read_trace(folder) for folder in folders] for way, folders in of_ways.items()}
    tasks = list(next(iter(found.values()))[0].spread)
    head = ["", *(f"sd of log w, {task}" for task in tasks), "distance of the norms from their targets"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(tasks) + 1) + "|"]
    for way, traces in found.items():
        cells = [f"{statistics.mean(trace.spread[task] for trace in traces):.3f}" for task in tasks]
        cells.append(f"{statistics.mean(trace.distance for trace in traces):.2f}")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)
