"""The numbers of the report, recomputed from the files by other means."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from pathlib import Path

import pytest
from reporting import measured, write_run

from lightning_gradnorm.experiments.report.collect import collect
from lightning_gradnorm.experiments.report.comparison import Comparison, compare
from lightning_gradnorm.experiments.report.markdown import markdown
from lightning_gradnorm.experiments.report.plots import changes, figures, mean_curve
from lightning_gradnorm.experiments.report.summary import summary

SEEDS = range(4)


def compared(folder: Path, baseline: str | None = None) -> Comparison:
    return compare(collect([folder]), baseline)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Equal weights, GradNorm with two α, single-task runs, and draws of random weights, with numbers drawn at random."""
    draw = random.Random(3)

    def metrics() -> dict[str, float]:
        return measured(draw.uniform(0.5, 1.5), draw.uniform(0.3, 0.6))

    for seed in SEEDS:
        time = {"seconds": draw.uniform(5, 9), "steps": draw.randint(90, 110), "epochs": 4}
        write_run(tmp_path / f"equal/{seed}", seed=seed, metrics=metrics(), training=time)
        for alpha in (0.5, 1.5):
            weights = {
                "mean_weights": {"depth": draw.uniform(0.5, 1.5), "seg": 1.0},
                "weights": {"depth": 9.0, "seg": 9.0},
            }
            time = {"seconds": draw.uniform(5, 9), "steps": draw.randint(90, 110), "epochs": 4}
            options = {"balancing__alpha": alpha, "weights": weights, "training": time}
            write_run(tmp_path / f"gradnorm/{alpha}/{seed}", "gradnorm", seed, metrics(), **options)
        for task, name in (("depth", "rmse"), ("seg", "miou")):
            alone = {f"test/{name}/{task}": draw.uniform(0.4, 0.9), f"test/loss/{task}": 1.0}
            write_run(tmp_path / f"alone/{task}{seed}", seed=seed, metrics=alone, tasks=[task])
        weights = {"weights": {"depth": draw.uniform(0.2, 1.8), "seg": 0.7}}
        write_run(tmp_path / f"random/{seed}", "random_static", 0, metrics(), balancing__seed=seed, weights=weights)
    return tmp_path


def on_disk(folder: Path, name: str) -> list[float]:
    """Return a test metric of every seed of a method, by plain JSON."""
    return [json.loads((folder / str(seed) / "test_metrics.json").read_text())[name] for seed in SEEDS]


FOLDERS = {
    "equal": "equal",
    "gradnorm α=0.5": "gradnorm/0.5",
    "gradnorm α=1.5": "gradnorm/1.5",
    "random_static": "random",
}
NAMES = ("test/loss", "test/loss/depth", "test/rmse/depth", "test/miou/seg")


def test_means_and_deviations_match_the_files(study: Path) -> None:
    rows = compared(study).rows
    assert {row.method.name for row in rows} == set(FOLDERS)
    for row in rows:
        for name in NAMES:
            values = on_disk(study / FOLDERS[row.method.name], name)
            assert row.values[name].mean == pytest.approx(statistics.mean(values), rel=1e-12)
            assert row.values[name].deviation == pytest.approx(statistics.stdev(values), rel=1e-12)
            assert row.values[name].count == 4


def test_differences_are_scipys_paired_t_tests_of_the_files(study: Path) -> None:
    stats = pytest.importorskip("scipy.stats")
    for row in compared(study).rows:
        if not row.method.name.startswith("gradnorm"):
            continue
        for name in NAMES:
            expected = stats.ttest_rel(on_disk(study / FOLDERS[row.method.name], name), on_disk(study / "equal", name))
            assert row.tests[name].p == pytest.approx(expected.pvalue, rel=1e-9)
            assert row.tests[name].low == pytest.approx(expected.confidence_interval(0.95).low, rel=1e-9)


def test_delta_m_is_the_mean_gain_over_the_single_task_runs(study: Path) -> None:
    def alone(task: str, name: str) -> float:
        files = sorted((study / "alone").glob(f"{task}*/test_metrics.json"))
        return statistics.mean(json.loads(file.read_text())[f"test/{name}/{task}"] for file in files)

    rmse, miou = alone("depth", "rmse"), alone("seg", "miou")
    for row in compared(study).rows:
        folder = study / FOLDERS[row.method.name]
        pairs = zip(on_disk(folder, "test/rmse/depth"), on_disk(folder, "test/miou/seg"), strict=True)
        gains = [50 * ((1 - depth / rmse) + (seg / miou - 1)) for depth, seg in pairs]
        assert row.delta_m is not None
        assert row.delta_m.mean == pytest.approx(statistics.mean(gains), rel=1e-9)
        assert row.delta_m.deviation == pytest.approx(statistics.stdev(gains), rel=1e-9)


def test_mean_ranks_use_the_metrics_and_not_the_losses(study: Path) -> None:
    means = {
        name: (
            statistics.mean(on_disk(study / at, "test/rmse/depth")),
            statistics.mean(on_disk(study / at, "test/miou/seg")),
        )
        for name, at in FOLDERS.items()
    }
    by_depth = sorted(means, key=lambda name: means[name][0])
    by_seg = sorted(means, key=lambda name: -means[name][1])
    for row in compared(study).rows:
        assert row.rank == (by_depth.index(row.method.name) + by_seg.index(row.method.name) + 2) / 2


def test_equal_means_share_their_rank_and_nan_comes_last(tmp_path: Path) -> None:
    for number, (name, depth) in enumerate(
        [("equal", 1.0), ("gradnorm", 1.0), ("gradnorm_static", 2.0), ("random_static", math.nan)]
    ):
        write_run(tmp_path / str(number), name, metrics={"test/rmse/depth": depth}, weights={"weights": {"depth": 1.0}})
    ranks = {row.method.name: row.rank for row in compared(tmp_path).rows}
    assert ranks == {"equal": 1.5, "gradnorm": 1.5, "gradnorm_static": 3.0, "random_static": 4.0}


def test_the_loss_of_a_task_has_no_column_if_it_equals_a_metric_in_every_method(tmp_path: Path) -> None:
    for name, loss in (("equal", 1.0), ("gradnorm", 2.0)):
        write_run(tmp_path / name, name, metrics=measured(loss, 0.5))
    assert [metric.name for metric in compared(tmp_path).shown] == ["test/rmse/depth", "test/miou/seg", "test/loss"]
    write_run(tmp_path / "other", "gradnorm_static", metrics={**measured(1.0, 0.5), "test/loss/depth": 1.1})
    assert compared(tmp_path).shown == compared(tmp_path).metrics


def test_times_are_seconds_per_step_relative_to_the_same_seed(study: Path) -> None:
    def times(folder: Path) -> list[float]:
        found = [json.loads((folder / str(seed) / "training.json").read_text()) for seed in SEEDS]
        return [one["seconds"] / one["steps"] for one in found]

    for row in compared(study).rows:
        if row.method.strategy == "random_static":
            assert (row.time_ratio, row.seconds_per_step) == (None, None)
            continue
        ours, theirs = times(study / FOLDERS[row.method.name]), times(study / "equal")
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        assert row.time_ratio is not None
        assert row.time_ratio.mean == pytest.approx(statistics.mean(ratios), rel=1e-12)
        assert row.time_ratio.deviation == pytest.approx(statistics.stdev(ratios), rel=1e-9, abs=1e-15)


def test_the_alpha_sweep_has_the_mean_change_against_equal_weights(study: Path) -> None:
    comparison = compared(study)
    for method in comparison.methods:
        if method.strategy != "gradnorm":
            continue
        at = study / FOLDERS[method.name]
        expected = [
            50 * ((1 - a / b) + (c / d - 1))
            for a, b, c, d in zip(
                on_disk(at, "test/rmse/depth"),
                on_disk(study / "equal", "test/rmse/depth"),
                on_disk(at, "test/miou/seg"),
                on_disk(study / "equal", "test/miou/seg"),
                strict=True,
            )
        ]
        assert changes(comparison, method, comparison.baselines[method.name]) == pytest.approx(expected, rel=1e-9)


def test_every_picture_that_can_be_drawn_is_there(study: Path) -> None:
    titles = [figure.title for figure in figures(compared(study))]
    assert titles == [
        "α sweep: mean change against equal",
        "Static weights: distance to GradNorm's against change",
        "Pairs of tasks",
    ]


def test_runs_of_the_same_seed_are_averaged_before_they_are_counted(tmp_path: Path) -> None:
    for number, (seed, depth) in enumerate([(0, 1.0), (0, 3.0), (1, 4.0)]):
        write_run(tmp_path / str(number), seed=seed, metrics=measured(depth, 0.5))
    (row,) = compared(tmp_path).rows
    value = row.values["test/rmse/depth"]
    assert (value.mean, value.count, value.deviation) == (3.0, 2, pytest.approx(math.sqrt(2)))


def test_the_baseline_has_the_other_options_of_the_method(tmp_path: Path) -> None:
    for name, shift in (("equal", 0.0), ("gradnorm", 1.0)):
        for lr in (0.1, 0.2):
            write_run(tmp_path / f"{name}{lr}", name, metrics=measured(10 * lr + shift, 0.5), model__optimizer__lr=lr)
    rows = {row.method.name: row for row in compared(tmp_path).rows}
    for lr in (0.1, 0.2):
        assert rows[f"gradnorm lr={lr}"].tests["test/rmse/depth"].mean == pytest.approx(1.0)
        assert not rows[f"equal lr={lr}"].tests
    rows = {row.method.name: row for row in compared(tmp_path, "equal lr=0.1").rows}
    assert rows["gradnorm lr=0.2"].tests["test/rmse/depth"].mean == pytest.approx(2.0)


def test_a_missing_baseline_is_an_error_that_lists_what_exists(study: Path) -> None:
    with pytest.raises(ValueError, match="got 'equals'; did you mean 'equal'"):
        compared(study, "equals")
    with pytest.raises(
        ValueError, match=r"--baseline 'gradnorm' matches several methods: gradnorm α=0.5, gradnorm α=1.5"
    ):
        compared(study, "gradnorm")
    rows = {row.method.name: row for row in compared(study, "gradnorm α=0.5").rows}
    assert not rows["gradnorm α=0.5"].tests
    assert rows["equal"].tests


def test_without_equal_weights_there_are_no_differences(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "gradnorm", metrics=measured(1, 0.5), training={"seconds": 1.0, "steps": 10})
    comparison = compared(tmp_path)
    assert comparison.baseline is None
    assert not comparison.rows[0].tests
    assert comparison.rows[0].time_ratio is None


def test_without_a_comparable_run_the_error_lists_what_is_known(tmp_path: Path) -> None:
    run = write_run(tmp_path / "0", metrics=measured(1, 0.5))
    (run / "config.yaml").write_text("{")
    with pytest.raises(ValueError, match=r"none of the 1 runs can be compared \(0: .*config.yaml cannot be read"):
        compared(tmp_path)


def test_a_mean_curve_is_that_of_the_seeds_at_each_step() -> None:
    curves = [[(step, draw.gauss(step, 1)) for step in range(0, 100, 10)] for draw in map(random.Random, range(3))]
    for at, point in enumerate(mean_curve(curves)):
        values = [curve[at][1] for curve in curves]
        mean, wide = statistics.mean(values), statistics.stdev(values)
        assert point == pytest.approx((10 * at, mean, mean - wide, mean + wide))


def test_a_mean_curve_on_a_logarithmic_axis_is_geometric() -> None:
    (point,) = mean_curve([[(0, 1.0)], [(0, 100.0)]], log=True)
    wide = 10 ** math.sqrt(2)
    assert point == pytest.approx((0, 10.0, 10 / wide, 10 * wide))


def test_a_long_curve_is_thinned_without_losing_its_mean() -> None:
    values = [random.Random(0).random() for _ in range(1200)]
    points = mean_curve([list(enumerate(values))])
    assert len(points) == 120
    assert statistics.mean(point.y for point in points) == pytest.approx(statistics.mean(values))
    assert points[0].x == pytest.approx(4.5)
    short = mean_curve([list(enumerate(values)), list(enumerate(values[:600]))])
    assert (len(short), short[-1].x, short[-1].high) == (120, 597, short[-1].y)


def test_a_curve_ends_where_the_first_seed_ends_and_skips_values_that_are_not_finite() -> None:
    points = mean_curve([[(0, 1.0), (1, math.nan), (2, 3.0), (3, 4.0)], [(0, 3.0), (1, 2.0), (2, 1.0)], []])
    assert [(point.x, point.y) for point in points] == [(0, 2.0), (2, 2.0)]


def test_a_task_with_two_metrics_counts_once_in_the_mean_rank(tmp_path: Path) -> None:
    both = {
        "equal": (1.0, 1.0, 2.0),
        "gradnorm": (2.0, 2.0, 1.0),
    }  # twice first in depth, once in seg, and the other way round
    for name, (rmse, mae, loss) in both.items():
        write_run(
            tmp_path / name, name, metrics={"test/rmse/depth": rmse, "test/mae/depth": mae, "test/loss/seg": loss}
        )
    assert {row.method.name: row.rank for row in compared(tmp_path).rows} == {"equal": 1.5, "gradnorm": 1.5}


def write_pairs(folder: Path, scatter: list[float], *, rmse: float) -> Comparison:
    """Pairs of runs: mIoU better by 0.1 ± 0.044 times the scatter, depth by 0.5 ± ``rmse`` times the scatter."""
    for seed, wide in enumerate(scatter):
        write_run(folder / f"equal/{seed}", seed=seed, metrics=measured(1.0, 0.5))
        better = measured(0.5 + rmse * wide, 0.6 + 0.044 * wide)
        write_run(folder / f"gradnorm/{seed}", "gradnorm", seed=seed, metrics=better)
    return compared(folder)


@pytest.mark.parametrize("is_clear", [True, False])
def test_a_difference_is_called_significant_only_after_correction_for_the_number_of_tests(
    tmp_path: Path, is_clear: bool
) -> None:
    # Five seeds; p of the mIoU alone 0.032, and of the rmse below 0.0001 or 0.049: by Holm's method 0.032, or 0.065 of both.
    comparison = write_pairs(tmp_path, [-2.0, -1.0, 0.0, 1.0, 2.0], rmse=0.01 if is_clear else 0.253)
    (row,) = [row for row in comparison.rows if row.method.name == "gradnorm"]
    p_values = [row.tests[metric.name].p for metric in comparison.counting]
    assert all(row.tests[metric.name].is_significant for metric in comparison.counting), p_values  # taken one by one
    (line,) = [line for line in summary(comparison) if "significant" in line]
    how = "(p < 0.05 after Holm's correction for 2 tests"
    assert line == (
        f"gradnorm is significantly better in depth rmse, seg miou than equal {how}, 5 seeds)."
        if is_clear
        else f"No difference from equal is significant {how})."
    )


@pytest.mark.parametrize("seeds", [2, 4])
def test_below_five_seeds_nothing_is_called_significant(tmp_path: Path, seeds: int) -> None:
    comparison = write_pairs(tmp_path, [0.001 * seed for seed in range(seeds)], rmse=0.01)
    (row,) = [row for row in comparison.rows if row.method.name == "gradnorm"]
    p = row.tests["test/miou/seg"].p
    assert p is not None
    assert p < 0.001
    assert not row.tests["test/miou/seg"].is_significant
    text = "\n".join(summary(comparison))
    assert "significant" not in text
    assert (
        "With fewer than 5 seeds in common, the report cannot tell which differences from equal are more than chance"
        in text
    )
    shown = markdown(comparison, "here")
    assert not re.search("p [=<]|▲|▼", shown)
