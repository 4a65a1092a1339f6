"""Δm by hand, and as in the tables of the literature."""

from __future__ import annotations

import math

import pytest

from lightning_gradnorm.experiments.problems.dense.tasks import OUT_CHANNELS, nyuv2_metrics
from lightning_gradnorm.experiments.report import COMMUNITY, PAPER, Run, delta_m, delta_m_or_none, single_task_results

NINE = [(metric, task) for task, metrics in COMMUNITY.items() for metric in metrics]


def row(*numbers: float) -> dict[str, float]:
    """A row of a table of NYUv2: mIoU, pixel accuracy, absolute and relative error, mean, median, within 11, 22, 30."""
    return {f"test/{metric}/{task}": number for (metric, task), number in zip(NINE, numbers, strict=True)}


# As printed in the tables since Nash-MTL (Navon et al., ICML 2022).
SINGLE = row(38.30, 63.76, 0.6754, 0.2780, 25.01, 19.21, 30.14, 57.20, 69.15)
EQUAL = row(39.29, 65.33, 0.5493, 0.2263, 28.15, 23.96, 22.09, 47.50, 61.08)


def test_the_tables_since_nash_mtl_print_its_negative_over_all_metrics() -> None:
    assert -delta_m(EQUAL, SINGLE, COMMUNITY, average="metrics") == pytest.approx(5.59, abs=5e-3)


def test_a_task_with_more_metrics_does_not_count_more() -> None:
    gain = {name: EQUAL[name] / SINGLE[name] - 1 for name in SINGLE}
    segmentation = (gain["test/miou/segmentation"] + gain["test/pixel_accuracy/segmentation"]) / 2
    depth = -(gain["test/absolute_error/depth"] + gain["test/relative_error/depth"]) / 2
    within = sum(gain[f"test/within_{degrees}/normals"] for degrees in (11, 22, 30))
    normals = (within - gain["test/mean_angle/normals"] - gain["test/median_angle/normals"]) / 5
    expected = 100 * (segmentation + depth + normals) / 3
    assert expected > 0  # and yet the mean over all nine is a loss of 5.59 %
    assert delta_m(EQUAL, SINGLE) == pytest.approx(expected)


@pytest.mark.parametrize(("metric", "value", "expected"), [("miou", 0.5, 25.0), ("miou", 0.3, -25.0)])
def test_an_increase_of_a_metric_that_should_be_high_is_a_gain(metric: str, value: float, expected: float) -> None:
    assert delta_m({f"test/{metric}/a": value}, {f"test/{metric}/a": 0.4}) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "expected"), [(0.5, -25.0), (0.3, 25.0)])
def test_an_increase_of_a_metric_that_should_be_low_is_a_loss(value: float, expected: float) -> None:
    assert delta_m({"test/rmse/a": value}, {"test/rmse/a": 0.4}) == pytest.approx(expected)


def test_a_negative_baseline_does_not_turn_a_gain_into_a_loss() -> None:
    assert delta_m({"test/r2/a": 0.1}, {"test/r2/a": -0.1}) == pytest.approx(200)


def test_losses_do_not_count_and_stages_need_not_be_the_same() -> None:
    run = {"test/loss": 9.0, "test/loss/a": 9.0, "test/rmse/a": 1.0}
    assert delta_m(run, {"val/loss/a": 1.0, "val/rmse/a": 2.0}) == pytest.approx(50)


def test_only_the_chosen_metrics_of_the_tasks_there_are_count() -> None:
    run = {
        "test/rmse/depth": 1.0,
        "test/absolute_error/depth": 5.0,
        "test/cosine_error/normals": 0.1,
        "test/hue/sky": 1.0,
    }
    single = {"test/rmse/depth": 2.0, "test/cosine_error/normals": 0.1}
    assert delta_m(run, single, PAPER) == pytest.approx(25)


@pytest.mark.parametrize("chosen", [PAPER, COMMUNITY], ids=["paper", "community"])
def test_the_chosen_metrics_exist(chosen: dict[str, list[str]]) -> None:
    assert chosen.keys() <= OUT_CHANNELS.keys()
    for task, names in chosen.items():
        assert set(names) <= nyuv2_metrics(task).keys()


@pytest.mark.parametrize(
    ("run", "single", "says"),
    [
        (
            {"test/rmse/a": 1.0},
            {"test/rmse/b": 1.0},
            "single-task results should have a finite rmse of task 'a'; got none",
        ),
        ({"test/rmse/a": math.nan}, {"test/rmse/a": 1.0}, "the run should have a finite rmse of task 'a'; got nan"),
        ({"test/rmse/a": 1.0}, {"test/rmse/a": 0.0}, "single-task rmse of 0 of task 'a'"),
        ({"test/hue/a": 1.0}, {"test/hue/a": 1.0}, "hue of task 'a' has no known better direction"),
        ({"test/loss": 1.0, "test/loss/a": 1.0}, {"test/loss/a": 1.0}, "metrics of tasks to compare"),
    ],
)
def test_the_error_names_what_cannot_be_compared(run: dict[str, float], single: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        delta_m(run, single)


def test_an_average_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="average should be 'tasks' or 'metrics'; got 'task'"):
        delta_m(EQUAL, SINGLE, average="task")


def test_single_task_results_are_of_runs_of_one_task_averaged_over_seeds() -> None:
    runs = [
        Run("a", {"test/loss": 1.0, "test/rmse/scene/depth": 1.0}),
        Run("b", {"test/loss": 9.0, "test/rmse/scene/depth": 2.0}),
        Run("c", {"test/loss": 5.0, "test/miou/sky": 0.5}),
        Run("both", {"test/rmse/scene/depth": 100.0, "test/miou/sky": 100.0}),
        Run("none", {"test/loss": 5.0}),
    ]
    assert single_task_results(runs) == {"test/rmse/scene/depth": 1.5, "test/miou/sky": 0.5}
    assert single_task_results(runs[3:]) == {}


@pytest.mark.parametrize("chosen", [None, PAPER, COMMUNITY], ids=["all", "paper", "community"])
def test_in_a_table_it_is_the_same_number(chosen: dict[str, list[str]] | None) -> None:
    run = {**EQUAL, "test/error/segmentation": 0.6, "test/rmse/depth": 0.7, "test/cosine_error/normals": 0.1}
    single = {**SINGLE, "test/error/segmentation": 0.5, "test/rmse/depth": 0.8, "test/cosine_error/normals": 0.2}
    expected = delta_m(run, single, chosen)
    assert abs(expected) > 0.1
    assert delta_m_or_none({**run, "test/loss": 1.0}, single, chosen) == expected


@pytest.mark.parametrize(
    ("run", "single", "expected"),
    [
        ({"test/rmse/a": 1.0, "test/hue/a": 1.0}, {"test/rmse/a": 2.0, "test/hue/a": 1.0}, 50.0),
        ({"test/rmse/a": 1.0, "test/mse/a": 1.0}, {"test/rmse/a": 2.0, "test/mse/a": 0.0}, 50.0),
        ({"test/rmse/a": 1.0}, {"test/rmse/b": 1.0}, None),
        ({"test/rmse/a": 1.0, "test/rmse/b": 1.0}, {"test/rmse/a": 2.0}, None),
        ({"test/rmse/a": 1.0}, {"test/rmse/a": 1.0, "test/mse/a": 1.0}, None),
        ({"test/rmse/a": 1.0}, {}, None),
        ({"test/loss": 1.0, "test/loss/a": 1.0}, {"test/loss/a": 1.0}, None),
        ({"test/rmse/a": math.nan}, {"test/rmse/a": 1.0}, math.nan),
        ({"test/rmse/a": 1.0}, {"test/rmse/a": math.inf}, math.nan),
    ],
)
def test_in_a_table_nothing_is_an_error(
    run: dict[str, float], single: dict[str, float], expected: float | None
) -> None:
    assert delta_m_or_none(run, single) == (None if expected is None else pytest.approx(expected, nan_ok=True))
