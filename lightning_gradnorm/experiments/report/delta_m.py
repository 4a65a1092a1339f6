"""Δm: one number for how much better a multi-task run is than single-task networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from lightning_gradnorm.experiments.report.metric_direction import higher_is_better
from lightning_gradnorm.experiments.report.results import Run, by_task, tasks_of

DELTA_M = "test/delta_m"
"""The name it is logged under."""

Chosen = Mapping[str, Sequence[str]]

PAPER: Chosen = {
    "segmentation": ("error",),
    "depth": ("rmse",),
    "normals": ("cosine_error",),
    "keypoints": ("keypoint_error",),
}
"""The errors of the GradNorm paper's tables, by task."""

COMMUNITY: Chosen = {
    "segmentation": ("miou", "pixel_accuracy"),
    "depth": ("absolute_error", "relative_error"),
    "normals": ("mean_angle", "median_angle", "within_11", "within_22", "within_30"),
}
"""The nine metrics of the tables since MTAN, by task."""


def delta_m(
    metrics: Mapping[str, float],
    single_task: Mapping[str, float],
    chosen: Chosen | None = None,
    *,
    average: str = "tasks",
) -> float:
    """Return the mean relative gain over single-task networks, in percent; positive is better.

    ``Δm = 100 · mean ± (M − M_single) / M_single``, with a minus if lower is better (Maninis et al., CVPR 2019). It averages
    the gains over the metrics of a task first and then over the tasks, like LibMTL, so a task does not count more because
    it has more metrics. The tables since Nash-MTL average over all metrics instead, and print the loss rather than the gain:
    theirs is ``-delta_m(…, COMMUNITY, average="metrics")``. The two can differ in sign.

    Args:
        metrics: metrics of the run, ``stage/<metric>/<task>`` → value.
        single_task: metrics of the single-task networks, in one mapping with the same names.
        chosen: the metrics that count, by task, such as `PAPER` or `COMMUNITY`. Tasks that the run does not have are
            ignored. By default all metrics except the losses.
        average: ``"tasks"`` or ``"metrics"``.

    Raises:
        ValueError: there is nothing to compare, a number is missing or not finite, a single-task value is 0, or the better
            direction of a metric is unknown.

    Example:
        >>> run = {"test/rmse/depth": 0.9, "test/miou/segmentation": 0.42, "test/pixel_accuracy/segmentation": 0.6}
        >>> single = {"test/rmse/depth": 1.0, "test/miou/segmentation": 0.4, "test/pixel_accuracy/segmentation": 0.6}
        >>> round(delta_m(run, single), 3)  # 10 % in depth, (5 % + 0 %) / 2 in segmentation
        6.25
    """
    if average not in ("tasks", "metrics"):
        raise ValueError(f"delta_m: average should be 'tasks' or 'metrics'; got {average!r}.")
    found, baseline = by_task(metrics), by_task(single_task)
    wanted = {
        task: [name for name in found[task] if name != "loss"] if chosen is None else chosen.get(task, ())
        for task in tasks_of(metrics)
    }
    gains = [
        [_gain(task, name, found[task], baseline.get(task, {})) for name in names] for task, names in wanted.items()
    ]
    gains = [of_task for of_task in gains if of_task]
    if not gains:
        raise ValueError(f"delta_m: the run should have metrics of tasks to compare; got {sorted(metrics)}.")
    if average == "metrics":
        return fmean(gain for of_task in gains for gain in of_task)
    return fmean(map(fmean, gains))


def single_task_results(runs: Iterable[Run]) -> dict[str, float]:
    """Return the metrics of the single-task runs. Several runs of one task, such as seeds, are averaged.

    Example:
        >>> alone = [Run("a", {"test/rmse/depth": 1.0}), Run("b", {"test/rmse/depth": 3.0})]
        >>> single_task_results([*alone, Run("c", {"test/rmse/depth": 1.5, "test/miou/segmentation": 0.4})])
        {'test/rmse/depth': 2.0}
    """
    values: dict[str, list[float]] = {}
    for run in runs:
        tasks = tasks_of(run.metrics)
        if len(tasks) == 1:
            for name, value in run.metrics.items():
                if name.endswith(f"/{tasks[0]}"):
                    values.setdefault(name, []).append(value)
    return {name: fmean(of_runs) for name, of_runs in values.items()}


def delta_m_or_none(
    metrics: Mapping[str, float], single_task: Mapping[str, float], chosen: Chosen | None = None
) -> float | None:
    """Return `delta_m` for a table. Never raises: returns ``None`` if it is undefined, NaN if a number is not finite.

    It is undefined if a task of the run, or one of its counting metrics, is missing on either side. Metrics with an unknown
    better direction or a single-task value of 0 do not count.

    Args:
        metrics: same as for `delta_m`.
        single_task: same as for `delta_m`.
        chosen: same as for `delta_m`.

    Example:
        >>> alone = {"test/rmse/depth": 2.0, "test/hue/depth": 0.3}
        >>> delta_m_or_none({"test/rmse/depth": 1.5, "test/hue/depth": 0.1}, alone)
        25.0
        >>> delta_m_or_none({"test/rmse/depth": 1.5, "test/miou/segmentation": 0.4}, alone)
    """
    found, baseline = by_task(metrics), by_task(single_task)
    counting: dict[str, list[str]] = {}
    for task in tasks_of(metrics):
        of_task = baseline.get(task, {})
        names = of_task if chosen is None else chosen.get(task, ())
        counting[task] = [
            name for name in names if name != "loss" and higher_is_better(name) is not None and of_task.get(name) != 0
        ]
    if chosen is not None:  # keep the chosen tasks that the run has
        counting = {task: names for task, names in counting.items() if task in chosen}
    values = [row.get(task, {}).get(name) for task in counting for name in counting[task] for row in (found, baseline)]
    if None in values or not all(counting.values()) or not values:
        return None
    if not all(math.isfinite(value) for value in values if value is not None):
        return math.nan
    return delta_m(metrics, single_task, counting)


def _gain(task: str, name: str, found: Mapping[str, float], baseline: Mapping[str, float]) -> float:
    """Return the relative gain of one metric in percent."""
    for source, row in (("run", found), ("single-task results", baseline)):
        if not math.isfinite(row.get(name, math.nan)):
            raise ValueError(
                f"delta_m: the {source} should have a finite {name} of task '{task}'; "
                f"got {row.get(name, 'none')} (this task has {sorted(row)})."
            )
    if baseline[name] == 0:
        raise ValueError(
            f"delta_m: the gain relative to a single-task {name} of 0 of task '{task}' is undefined. Leave it out."
        )
    upwards = higher_is_better(name)
    if upwards is None:
        raise ValueError(f"delta_m: {name} of task '{task}' has no known better direction. Leave it out with chosen=.")
    gain = 100 * (found[name] - baseline[name]) / abs(baseline[name])
    return gain if upwards else -gain
