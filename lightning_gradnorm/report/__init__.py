"""Reads finished runs and writes tables of them."""

from lightning_gradnorm.report.results import Run, by_task, read_run, write_metrics
from lightning_gradnorm.report.table import comparison_table, task_table

__all__ = ["Run", "by_task", "comparison_table", "read_run", "task_table", "write_metrics"]
