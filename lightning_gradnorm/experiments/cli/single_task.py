"""The single-task runs that a run is compared with, and what the comparison cannot do without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_gradnorm.experiments.report import delta_m_or_none, read_runs, single_task_results, tasks_of


def results_in(folders: Any) -> dict[str, float] | None:
    """Return the metrics of the single-task runs in these folders; ``None`` if none are given.

    Raises:
        FileNotFoundError: there is no finished run in one of them.
        ValueError: there is none of one task alone.
    """
    if folders is None:
        return None
    given = [folders] if isinstance(folders, str) else list(folders)
    if not given or not all(given):
        raise ValueError("single_task should name the folders of runs of one task each, or be null; got nothing.")
    found = single_task_results(run for folder in given for run in read_runs(folder))
    if not found:
        raise ValueError(
            f"single_task should be the folders of runs of one task each; in {', '.join(given)} there is none. Make some: "
            "gradnorm-train … 'tasks=[TASK]'."
        )
    return found


def refuse_half_a_comparison(metrics: Mapping[str, float], single_task: Mapping[str, float]) -> None:
    """Say why there is no Δm.

    Raises:
        ValueError: a task has no single-task run, or has no metric in both.
    """
    missing = [task for task in tasks_of(metrics) if task not in tasks_of(single_task)]
    if missing:
        raise ValueError(
            f"single_task should have a run of each task, for Δm; there is none of {', '.join(missing)} alone, but of "
            f"{', '.join(tasks_of(single_task))}."
        )
    if delta_m_or_none(metrics, single_task) is None:
        raise ValueError(
            "single_task: there is no Δm without metrics of each task, the same ones in both, beside the losses."
        )
