"""`gradnorm-report`: runs of `gradnorm-train` side by side."""

from __future__ import annotations

import csv
import html
import json
import re
import shlex
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from reporting import measured, write_run

from lightning_gradnorm.experiments.cli import report, train
from lightning_gradnorm.experiments.report.collect import collect
from lightning_gradnorm.experiments.report.comparison import compare
from lightning_gradnorm.experiments.report.plots import figures

Call = Callable[..., str]
OPTIONS = [
    "data.train_size=400",
    "data.val_size=100",
    "data.test_size=100",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "callbacks=none",
    "logger=csv",
]
FAILS = "+callbacks.fails={_target_: reporting.FailsAtStep, step: 3}"


def test_a_sweep_becomes_a_page_with_the_numbers_of_its_logs(call: Call, tmp_path: Path) -> None:
    call(train.main, "-m", *OPTIONS, "balancing=equal,gradnorm", "seed=0,1", "hydra.sweep.dir=runs/sweep")
    said = call(report.main, "runs")
    assert "4 of 4 runs are finished, 2 methods" in said
    (ranks,) = re.findall(r"│ mean rank ↓ +│(.*)│(.*)│", said)
    assert sorted(float(one.strip(" *")) for one in ranks) in ([1, 2], [1.25, 1.75], [1.5, 1.5])
    assert_table_agrees_with_logs(tmp_path / "runs", ["equal", "gradnorm"])
    page = (tmp_path / "runs" / "report.html").read_text()
    for title in ("Metrics during training", "Task weights during training", "Gradient norms"):
        assert title in page


@pytest.mark.slow
def test_sweeps_single_tasks_and_a_failed_run_become_one_page(call: Call, tmp_path: Path) -> None:
    call(train.main, "-m", *OPTIONS, "balancing=equal,gradnorm,random_static", "seed=0,1", "hydra.sweep.dir=runs/sweep")
    call(train.main, "-m", *OPTIONS, "balancing.alpha=0.5", "seed=0,1", "hydra.sweep.dir=runs/alpha")
    call(train.main, "-m", *OPTIONS, "tasks=[task_0],[task_1]", "hydra.sweep.dir=runs/alone")
    with pytest.raises(RuntimeError, match="disk"):
        call(train.main, *OPTIONS, FAILS, "seed=2", "hydra.run.dir=runs/failed")
    said = call(report.main, "runs")
    assert "10 of 11 runs are finished, 4 methods" in said
    assert "failed: failed, step 3, epoch 1 of 2; RuntimeError: the <b>disk</b> is full" in said
    page = (tmp_path / "runs" / "report.html").read_text()
    assert "the &lt;b&gt;disk&lt;/b&gt; is full" in page

    assert_table_agrees_with_logs(tmp_path / "runs", ["equal", "gradnorm α=0.5", "gradnorm α=1.5", "random_static"])

    titles = [figure.title for figure in figures(compare(collect(["runs"])))]
    for title in (
        "Metrics during training",
        "Task weights during training",
        "Gradient norms",
        "Loss ratios",
        "Pairs of tasks",
        "α sweep: mean change against equal",
        "Static weights: distance to GradNorm's against change",
    ):
        assert title in titles
        assert html.escape(title) in page


def assert_table_agrees_with_logs(runs: Path, methods: list[str]) -> None:
    """Each mean and deviation in the report's table is that of the runs' CSV logs."""
    of_method: dict[str, list[Path]] = {}
    varies_alpha = (runs / "alpha").is_dir()
    for folder in [*runs.glob("sweep/*"), *runs.glob("alpha/*")]:
        given = folder / "overrides.yaml"
        if given.is_file():
            overrides = given.read_text()
            name = (re.findall(r"balancing=(\w+)", overrides) or ["gradnorm"])[0]
            alpha = " α=0.5" if "alpha=0.5" in overrides else " α=1.5" if name == "gradnorm" and varies_alpha else ""
            of_method.setdefault(name + alpha, []).append(folder)
    assert sorted(of_method) == methods
    text = (runs / "report.md").read_text()
    heading = [
        cell.strip() for cell in re.findall(r"^\| method \| runs \|.*$", text, flags=re.M)[0].strip("|").split("|")
    ]
    for name, folders in of_method.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {name.replace('_', chr(92) + '_')} | "))
        shown = dict(zip(heading, (cell.strip(" *") for cell in line.strip("|").split("|")), strict=True))
        assert not [one for one in heading if re.search(r"task_\d loss", one.replace("\\", ""))]  # the same as the mse
        for metric in ("mse", "r2"):
            for task in ("task_0", "task_1"):
                values = [logged_in_the_test(folder, f"test/{metric}/{task}") for folder in folders]
                cell = next(
                    v for k, v in shown.items() if html.unescape(k).replace("\\", "").startswith(f"{task} {metric}")
                )
                mean, _, wide = cell.replace("*", "").partition(" ± ")
                digits = len(mean.partition(".")[2])
                assert mean == f"{statistics.mean(values):.{digits}f}"
                assert wide == f"{statistics.stdev(values):.{digits}f}"


def logged_in_the_test(folder: Path, name: str) -> float:
    """Return a test metric from the CSV log, which must be that of test_metrics.json."""
    with (folder / "csv/version_0/metrics.csv").open() as file:
        (value,) = (float(row[name]) for row in csv.DictReader(file) if row.get(name))
    assert json.loads((folder / "test_metrics.json").read_text())[name] == pytest.approx(value, rel=1e-6)
    return value


def test_a_run_that_continues_after_its_failure_is_not_a_failed_run(call: Call, tmp_path: Path) -> None:
    options = [option for option in OPTIONS if option != "callbacks=none"]
    with pytest.raises(RuntimeError, match="disk"):
        call(train.main, *options, FAILS, "callbacks.last.every_n_train_steps=1", "hydra.run.dir=run")
    failure = json.loads((tmp_path / "run/failure.json").read_text())
    assert failure == {"error": "RuntimeError: the <b>disk</b> is full", "step": 3, "epoch": 0}
    call(train.main, "ckpt_path=run/checkpoints/last.ckpt", "callbacks.fails.step=-1")
    assert not (tmp_path / "run/failure.json").exists()
    assert [run.state for run in collect(["run"])] == ["finished"]


def test_runs_that_never_began_share_a_line(call: Call, tmp_path: Path) -> None:
    write_run(tmp_path / "runs/equal", metrics=measured(1, 0.5))
    write_run(tmp_path / "runs/stopped", seed=1)
    for number in range(5):
        write_run(tmp_path / f"runs/never{number}", seed=2)
        for file in ("config.yaml", "overrides.yaml"):
            (tmp_path / f"runs/never{number}" / file).unlink()
        (tmp_path / f"runs/never{number}/.hydra/config.yaml").write_text("balancing: {}\n")
    said = call(report.main, "runs")
    assert "5 runs did not begin to train: never0, never1, never2, …\n" in said
    assert "stopped: unfinished, began to train, nothing logged\n" in said
    problems = (tmp_path / "runs/report.md").read_text().partition("## Runs without results")[2]
    assert problems.count("did not begin to train") == 1
    assert "| 5 runs |  |  | unfinished | did not begin to train | never0, never1, never2, … |" in problems


def test_the_output_goes_to_the_requested_folder(call: Call, tmp_path: Path) -> None:
    for name in ("equal", "gradnorm"):
        write_run(tmp_path / f"runs/{name}", name, metrics=measured(1, 0.5))
    said = call(report.main, "runs/equal", "runs/gradnorm", "--output", "docs/new", "--baseline", "gradnorm")
    assert "docs/new/report.html" in said
    assert "Differences from gradnorm" in (tmp_path / "docs/new/report.md").read_text()
    assert not list((tmp_path / "runs").rglob("report.*"))
    call(report.main, "runs")  # and its own files do not disturb it
    call(report.main, "runs")
    assert (tmp_path / "runs/report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: DIR"),
        (["nowhere"], "gradnorm-report: no such folder: nowhere. Use the folder of a run or of a sweep."),
        (["empty"], "gradnorm-report: empty is empty"),
        (["without"], "gradnorm-report: without has no run of gradnorm-train in it or below it"),
        (["tasks"], "gradnorm-report: runs of different tasks cannot be compared: a has depth, seg, b has hue, seg"),
        (
            ["data"],
            "gradnorm-report: runs on different data cannot be compared: data.train_size is 100 in a and 7 in b",
        ),
        (["fine", "--baseline", "gradnrom"], "got 'gradnrom'; did you mean 'gradnorm'?"),
        (["fine", "--output", "without/file"], "gradnorm-report: "),
        (["fine", "--alpha", "3"], "unrecognized arguments: --alpha 3"),
    ],
)
def test_wrong_input_is_a_sentence_and_status_2(call: Call, tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "without").mkdir()
    (tmp_path / "without/file").write_text("not a run")
    for name, options in (("tasks", {"tasks": ["seg", "hue"]}), ("data", {"data__train_size": 7}), ("fine", {})):
        write_run(tmp_path / name / "a", metrics=measured(1, 0.5))
        write_run(tmp_path / name / "b", "gradnorm", metrics=measured(1, 0.5), **options)
    assert said in call(report.main, *arguments, status=2)


def test_runs_on_several_data_sets_are_refused_with_commands_that_work(call: Call, tmp_path: Path) -> None:
    for data, size in (("toy", 100), ("my table", 7)):
        for name in ("equal", "gradnorm"):
            folder = tmp_path / "outputs" / data / name / "2026"
            write_run(folder, name, metrics=measured(1, 0.5), data__train_size=size)
    said = call(report.main, "outputs", status=2)
    assert "outputs holds runs on 2 data sets, which cannot be compared. Report on one: " in said
    assert not list(tmp_path.rglob("report.*"))
    commands = re.findall(r"gradnorm-report (?=\S*outputs/)(.*?)(?:, or |\n)", said)
    assert [shlex.split(one) for one in commands] == [["outputs/my table"], ["outputs/toy"]]
    for one in commands:
        assert "2 of 2 runs are finished, 2 methods" in call(report.main, *shlex.split(one))


def test_the_help_has_examples(call: Call) -> None:
    said = call(report.main, "--help")
    assert "gradnorm-report RUNS ALONE --output docs" in said
