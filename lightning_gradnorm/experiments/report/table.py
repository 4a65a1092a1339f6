"""Tables for the terminal: the tasks of one run, or several runs side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from lightning_gradnorm.experiments.report.comparison import Comparison
from lightning_gradnorm.experiments.report.delta_m import Chosen, delta_m_or_none, single_task_results
from lightning_gradnorm.experiments.report.metric_direction import higher_is_better
from lightning_gradnorm.experiments.report.results import ALL_TASKS, Run, by_task, tasks_of
from lightning_gradnorm.experiments.report.summary import Cell, sheets, title_of

_WIDEST = 8
"""Number of metric columns that fit in a terminal."""


def task_table(
    metrics: Mapping[str, float], weights: Mapping[str, float] | None = None, *, title: str = "Test metrics by task"
) -> Table:
    """Return a table with one row per task and one column per metric, transposed if there are many metrics.

    A metric that equals the loss of every task shares the loss's column.

    Args:
        metrics: ``test/<metric>/<task>`` → value.
        weights: loss weight by task, for the last column.
        title: title above the table.

    Example:
        >>> table = task_table({"test/loss/left": 1.0, "test/loss/right": 2.0}, weights={"left": 0.8, "right": 1.2})
        >>> [column.header for column in table.columns], table.row_count
        (['task', 'loss', 'weight'], 2)
    """
    rows = by_task(metrics)
    names = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    twin = next((name for name in names if name != "loss" and _is_loss(name, rows)), None)
    if twin is not None:
        names.remove(twin)
    lines = {task: [_number(row.get(name)) for name in names] for task, row in rows.items()}
    names = [f"loss = {twin}" if name == "loss" and twin is not None else name for name in names]
    if weights:
        names.append("weight")
        lines = {task: [*line, _number(weights.get(task))] for task, line in lines.items()}
    corner = "task"
    if len(names) > max(_WIDEST, len(lines)):
        corner, names, lines = (
            "metric",
            list(lines),
            {name: [*line] for name, line in zip(names, zip(*lines.values(), strict=True), strict=True)},
        )
    table = Table(
        title=title, title_justify="left", caption=_caption("loss" in rows.get(ALL_TASKS, {})), caption_justify="left"
    )
    table.add_column(corner)
    for name in names:
        table.add_column(name, justify="right")
    for name, line in lines.items():
        if name == ALL_TASKS:
            table.add_section()
        table.add_row(name, *line)
    return table


def _is_loss(name: str, rows: Mapping[str, Mapping[str, float]]) -> bool:
    """Return True if a metric equals the loss of each task."""
    return name not in rows.get(ALL_TASKS, {}) and all(
        name in row and "loss" in row and math.isclose(row[name], row["loss"], rel_tol=1e-5)
        for task, row in rows.items()
        if task != ALL_TASKS
    )


def _caption(has_sum: bool) -> str | None:
    return f"{ALL_TASKS}: its loss is the plain sum of the tasks' losses" if has_sum else None


def results_table(comparison: Comparison) -> Table | None:
    """Return the first table of a report for the terminal, or ``None`` if it has no results.

    Methods are columns if they are fewer than the numbers of each.
    """
    found = next((sheet for sheet in sheets(comparison) if sheet.title == "Results"), None)
    if found is None:
        return None
    lines = [list(found.header), *([_in_terminal(cell) for cell in row] for row in found.rows)]
    if len(found.rows) < len(found.header):
        lines = [list(line) for line in zip(*lines, strict=True)]
    table = Table(title=title_of(comparison), title_justify="left", caption_justify="left")
    has_sum = any(metric.task == ALL_TASKS and metric.short == "loss" for metric in comparison.shown)
    table.caption = "; ".join(filter(None, ["* best mean, perhaps by chance", _caption(has_sum)]))
    for number, name in enumerate(lines[0]):
        table.add_column(escape(name), justify="right" if number else "left")
    for line in lines[1:]:
        table.add_row(escape(line[0]), *line[1:])
    return table


def _in_terminal(cell: Cell) -> str:
    shown = escape(" ".join(filter(None, [cell.text, cell.note])))
    return f"[bold green]{shown} *[/]" if cell.strong and shown else shown


def comparison_table(
    runs: Sequence[Run],
    *,
    title: str = "Test metrics",
    single_task: Mapping[str, float] | None = None,
    chosen: Chosen | None = None,
) -> Table:
    """Return a table with one row per task and metric and one column per run; ``*`` marks the best.

    Only common metrics have a known better direction. Others are not marked, and neither are ties of all runs. The last row
    is Δm over single-task networks, if any run has it: see `delta_m`.

    Args:
        runs: the columns.
        title: title above the table.
        single_task: metrics of single-task networks; by default those of the single-task runs among ``runs``, which
            then have no Δm themselves.
        chosen: the metrics that count for Δm, such as `COMMUNITY`; by default all except the losses.

    Raises:
        ValueError: there are no runs.

    Example:
        >>> equal, gradnorm = Run("equal", {"test/loss/left": 1.0}), Run("gradnorm", {"test/loss/left": 0.5})
        >>> table = comparison_table([equal, gradnorm])
        >>> [[str(cell) for cell in column.cells] for column in table.columns]
        [['left'], ['loss ↓'], ['1'], ['[bold green]0.5 *[/]']]
    """
    if not runs:
        raise ValueError("comparison_table: runs should be one or more; got none.")
    has_sum = any("loss" in by_task(run.metrics).get(ALL_TASKS, {}) for run in runs)
    table = Table(title=title, title_justify="left", caption=_caption(has_sum), caption_justify="left")
    table.add_column("task")
    table.add_column("metric")
    for run in runs:
        table.add_column(run.name, justify="right")
    by_run = [by_task(run.metrics) for run in runs]
    rows = dict.fromkeys((task, metric) for run in by_run for task, row in run.items() for metric in row)
    last = None
    for task, metric in rows:
        if last not in (None, task):
            table.add_section()
        values = [run.get(task, {}).get(metric) for run in by_run]
        table.add_row(task if task != last else "", f"{metric}{_arrow(metric)}", *_cells(metric, values))
        last = task
    _add_delta_m(table, runs, single_task, chosen)
    return table


def _add_delta_m(
    table: Table, runs: Sequence[Run], single_task: Mapping[str, float] | None, chosen: Chosen | None
) -> None:
    baseline = single_task_results(runs) if single_task is None else single_task
    values = [
        None
        if single_task is None and len(tasks_of(run.metrics)) == 1
        else delta_m_or_none(run.metrics, baseline, chosen)
        for run in runs
    ]
    if any(value is not None for value in values):
        table.add_section()
        table.add_row("Δm", f"%{_arrow('delta_m')}", *_cells("delta_m", values, form="+.2f"))


def _cells(metric: str, values: Sequence[float | None], form: str = ".4g") -> list[str]:
    """Return the values as text, with the best one marked."""
    best = _best(metric, values)
    shown = [_number(value, form) for value in values]
    return [
        cell if best is None or value != best else f"[bold green]{cell} *[/]"
        for cell, value in zip(shown, values, strict=True)
    ]


def _best(metric: str, values: Sequence[float | None]) -> float | None:
    """Return the best value, or ``None`` if all are equal or the better direction is unknown."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if len(set(known)) < 2 or not _arrow(metric):
        return None
    return max(known) if higher_is_better(metric) else min(known)


def _arrow(metric: str) -> str:
    return {True: " ↑", False: " ↓", None: ""}[higher_is_better(metric)]


def _number(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else f"{value:{form}}"
