"""Reads finished runs, and compares them in tables and charts."""

from lightning_gradnorm.experiments.report.delta_m import (
    COMMUNITY,
    DELTA_M,
    PAPER,
    delta_m,
    delta_m_or_none,
    single_task_results,
)
from lightning_gradnorm.experiments.report.metric_direction import higher_is_better
from lightning_gradnorm.experiments.report.results import Run, by_task, read_run, read_runs, tasks_of, write_metrics
from lightning_gradnorm.experiments.report.table import comparison_table, task_table
from lightning_gradnorm.experiments.report.write import write_report

__all__ = [
    "COMMUNITY",
    "DELTA_M",
    "PAPER",
    "Run",
    "by_task",
    "comparison_table",
    "delta_m",
    "delta_m_or_none",
    "higher_is_better",
    "read_run",
    "read_runs",
    "single_task_results",
    "task_table",
    "tasks_of",
    "write_metrics",
    "write_report",
]
