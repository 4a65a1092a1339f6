"""Reads the single-task runs to compare a run with, and checks that the comparison is complete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_gradnorm.experiments.report import delta_m_or_none, read_runs, single_task_results, tasks_of


def results_in(folders: Any) -> dict[str, float] | None:
    """Return the metrics of the single-task runs in these folders, or ``None`` without folders.

    Raises:
        FileNotFoundError: a folder has no finished run.
        ValueError: the folders have no single-task run.
    """
    if folders is None:
        return None
    given = [folders] if isinstance(folders, str) else list(folders)
    if not given or not all(given):
        raise ValueError("single_task should name the folders of single-task runs, or be null; got nothing.")
    found = single_task_results(run for folder in given for run in read_runs(folder))
    if not found:
        raise ValueError(
            f"single_task should name the folders of single-task runs; there are none in {', '.join(given)}. Train some: "
            "gradnorm-train … 'tasks=[TASK]'."
        )
    return found


def refuse_half_a_comparison(metrics: Mapping[str, float], single_task: Mapping[str, float]) -> None:
    """Check that Δm can be computed.

    Raises:
        ValueError: a task has no single-task run, or no metric in common with it.
    """
    missing = [task for task in tasks_of(metrics) if task not in tasks_of(single_task)]
    if missing:
        raise ValueError(
            f"single_task should have a run of each task, for Δm; there are none of {', '.join(missing)} alone, only of "
            f"{', '.join(tasks_of(single_task))}."
        )
    if delta_m_or_none(metrics, single_task) is None:
        raise ValueError("single_task: Δm needs metrics of each task besides the losses, the same ones in both.")
