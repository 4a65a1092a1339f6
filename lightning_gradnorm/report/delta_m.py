"""One number for a multi-task run: how much better it is than one network for each task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from lightning_gradnorm.report.direction import higher_is_better
from lightning_gradnorm.report.results import ALL_TASKS, by_task

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

    ``Δm = 100 · mean ± (M − M_single) / M_single``, minus where lower is better (Maninis et al., CVPR 2019). The gains of a
    task's metrics are averaged first and then the tasks, as LibMTL does, so that a task does not count more for having
    more metrics. The tables since Nash-MTL average over all metrics instead, and print the loss rather than the gain:
    theirs is ``-delta_m(…, COMMUNITY, average="metrics")``. The two can differ in sign.

    Args:
        metrics: of the run, ``stage/<metric>/<task>`` → value.
        single_task: of the networks for one task each, in one mapping with the same names.
        chosen: the metrics that count, by task, such as `PAPER` or `COMMUNITY`, of which the tasks that the run has are
            taken; by default all but the losses.
        average: ``"tasks"`` or ``"metrics"``.

    Raises:
        ValueError: nothing to compare, a number that is missing or not finite, a single-task value of 0, or a metric of which
            it is not known which way is better.

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
        task: [name for name in row if name != "loss"] if chosen is None else chosen.get(task, ())
        for task, row in found.items()
        if task != ALL_TASKS
    }
    gains = [
        [_gain(task, name, found[task], baseline.get(task, {})) for name in names] for task, names in wanted.items()
    ]
    gains = [of_task for of_task in gains if of_task]
    if not gains:
        raise ValueError(f"delta_m: the run should have metrics of tasks to compare; it has {sorted(metrics)}.")
    if average == "metrics":
        return fmean(gain for of_task in gains for gain in of_task)
    return fmean(map(fmean, gains))


def _gain(task: str, name: str, found: Mapping[str, float], baseline: Mapping[str, float]) -> float:
    """Return the relative gain of one metric in percent."""
    for source, row in (("run", found), ("single-task results", baseline)):
        if not math.isfinite(row.get(name, math.nan)):
            raise ValueError(
                f"delta_m: the {source} should have a finite {name} of task '{task}'; "
                f"got {row.get(name, 'none')} (of this task there is {sorted(row)})."
            )
    if baseline[name] == 0:
        raise ValueError(
            f"delta_m: relative to a single-task {name} of task '{task}' of 0 there is no gain. Leave it out."
        )
    upwards = higher_is_better(name)
    if upwards is None:
        raise ValueError(
            f"delta_m: it is not known which way {name} of task '{task}' is better. Leave it out by chosen=."
        )
    gain = 100 * (found[name] - baseline[name]) / abs(baseline[name])
    return gain if upwards else -gain
