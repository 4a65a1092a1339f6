"""The contents of the tables of finished runs."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from lightning_gradnorm.experiments.report import (
    Run,
    by_task,
    comparison_table,
    read_run,
    read_runs,
    task_table,
    write_metrics,
)

EQUAL = Run("equal", {"test/loss": 5.0, "test/loss/left": 1.0, "test/accuracy/left": 0.7, "test/hue/left": 1.0})
GRADNORM = Run("gradnorm", {"test/loss": 5.0, "test/loss/left": 2.0, "test/accuracy/left": 0.8, "test/hue/left": 2.0})


def printed(table: object) -> list[list[str]]:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    lines = console.export_text().splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


def test_metrics_survive_the_file(tmp_path: Path) -> None:
    write_metrics(tmp_path, EQUAL.metrics)
    assert read_run(tmp_path, name="equal") == EQUAL
    assert read_run(tmp_path).name == tmp_path.name


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"test_metrics\.json should exist"):
        read_run(tmp_path)


def test_the_runs_of_a_folder_are_itself_or_those_below(tmp_path: Path) -> None:
    for name in ("sweep/1", "sweep/0", "sweep/unfinished"):
        (tmp_path / name).mkdir(parents=True)
    write_metrics(tmp_path / "sweep/0", EQUAL.metrics)
    write_metrics(tmp_path / "sweep/1", GRADNORM.metrics)
    assert read_runs(tmp_path / "sweep") == [Run("0", EQUAL.metrics), Run("1", GRADNORM.metrics)]
    assert [run.name for run in read_runs(tmp_path)] == ["sweep/0", "sweep/1"]
    assert read_runs(tmp_path / "sweep/1") == [Run("1", GRADNORM.metrics)]
    with pytest.raises(FileNotFoundError, match=r"unfinished/test_metrics\.json should exist"):
        read_runs(tmp_path / "sweep/unfinished")


def test_a_task_whose_name_has_a_slash_stays_whole() -> None:
    assert by_task({"test/loss/scene/depth": 1.0}) == {"scene/depth": {"loss": 1.0}}


def test_rows_are_tasks_and_columns_metrics() -> None:
    metrics = {"test/loss": 3.0, "test/loss/left": 1.0, "test/loss/sum": 2.0, "test/r2/sum": 0.123456}
    assert printed(task_table(metrics, weights={"left": 1.5, "sum": 0.5})) == [
        ["left", "1", "", "1.5"],
        ["sum", "2", "0.1235", "0.5"],
        ["all", "3", "", ""],
    ]


def test_a_metric_that_equals_the_loss_of_every_task_shares_its_column() -> None:
    metrics = {"test/loss": 3.0, "test/loss/a": 1.0, "test/mse/a": 1.0 + 1e-7, "test/loss/b": 2.0, "test/mse/b": 2.0}
    table = task_table(metrics)
    assert [column.header for column in table.columns] == ["task", "loss = mse"]
    assert printed(table) == [["a", "1"], ["b", "2"], ["all", "3"]]
    assert table.caption == "all: its loss is the plain sum of the tasks' losses"
    apart = task_table({**metrics, "test/mse/b": 2.1})
    assert [column.header for column in apart.columns] == ["task", "loss", "mse"]


def test_the_better_run_is_marked_by_the_metrics_direction() -> None:
    assert printed(comparison_table([EQUAL, GRADNORM])) == [
        ["left", "loss ↓", "1 *", "2"],
        ["", "accuracy ↑", "0.7", "0.8 *"],
        ["", "hue", "1", "2"],
        ["all", "loss ↓", "5", "5"],
    ]


def test_a_metric_that_one_run_lacks_is_left_empty() -> None:
    other = Run("other", {"test/mse/right": 4.0})
    assert printed(comparison_table([EQUAL, other]))[3:] == [["all", "loss ↓", "5", ""], ["right", "mse ↓", "", "4"]]


@pytest.mark.parametrize("diverged_first", [False, True])
def test_a_run_that_diverged_is_not_the_best(diverged_first: bool) -> None:
    runs = [
        Run("fine", {"test/r2/sum": 0.5}),
        Run("poor", {"test/r2/sum": 0.1}),
        Run("lost", {"test/r2/sum": math.nan}),
    ]
    ((_, _, *values),) = printed(comparison_table(runs[::-1] if diverged_first else runs))
    assert values == (["nan", "0.1", "0.5 *"] if diverged_first else ["0.5 *", "0.1", "nan"])


LEFT, RIGHT = Run("left", {"test/loss/left": 1.0, "test/mse/left": 2.0}), Run("right", {"test/mse/right": 4.0})
FIRST = Run("first", {"test/mse/left": 1.0, "test/mse/right": 4.0})  # 50 % and 0 % better
SECOND = Run("second", {"test/mse/left": 3.0, "test/mse/right": 1.0})  # 50 % worse, 75 % better


def test_delta_m_is_the_last_row_if_single_task_runs_are_among_those_compared() -> None:
    last = printed(comparison_table([LEFT, FIRST, RIGHT, SECOND]))[-1]
    assert last == ["Δm", "% ↑", "", "+25.00 *", "", "+12.50"]
    for too_few in ([FIRST, SECOND], [LEFT, FIRST, SECOND], [LEFT, RIGHT]):
        assert "Δm" not in {row[0] for row in printed(comparison_table(too_few))}


def test_single_task_results_can_be_given_and_metrics_chosen() -> None:
    single = {**LEFT.metrics, **RIGHT.metrics}
    last = printed(comparison_table([Run("alone", single), FIRST, SECOND], single_task=single))[-1]
    assert last == ["Δm", "% ↑", "+0.00", "+25.00 *", "+12.50"]
    of_right = printed(comparison_table([FIRST, SECOND], single_task=single, chosen={"right": ["mse"]}))[-1]
    assert of_right == ["Δm", "% ↑", "+0.00", "+75.00 *"]


def test_comparing_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="one or more"):
        comparison_table([])


def test_many_metrics_are_rows_and_tasks_are_columns() -> None:
    metrics = {f"test/m{i}/depth": float(i) for i in range(8)} | {"test/m9/normals": 9.0}
    table = task_table(metrics, {"depth": 1.5, "normals": 0.5})
    assert [column.header for column in table.columns] == ["metric", "depth", "normals"]
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [cells[1], cells[-2], cells[-1]] == [("m1", "1", ""), ("m9", "", "9"), ("weight", "1.5", "0.5")]
