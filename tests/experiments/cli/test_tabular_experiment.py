"""From your own table to a comparison, with the command line alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from configurations import QUICK, TABLE, compose_run
from omegaconf import OmegaConf

from lightning_gradnorm.experiments.cli import evaluate, report, train
from lightning_gradnorm.experiments.cli.build import build
from lightning_gradnorm.experiments.problems.tabular import TabularDataModule

Call = Callable[..., str]
RUN = ["experiment=tabular", *TABLE, *QUICK, "data.batch_size=16", "logger=csv"]
NO_CHECKPOINT = ["callbacks=none", "trainer.limit_train_batches=1"]
METRICS = ("loss", "rmse", "relative_rmse", "r2")


def test_strategies_are_compared_on_a_table(call: Call, tmp_path: Path) -> None:
    told = call(train.main, "-m", *RUN, *NO_CHECKPOINT, "balancing=equal,gradnorm", "hydra.sweep.dir=sweep")
    assert "2 jobs, 2 done" in told
    call(report.main, "sweep")
    page = (tmp_path / "sweep" / "report.md").read_text()
    assert "2 finished runs, 2 methods" in page
    for metric in ("a rmse ↓", r"b relative\_rmse ↓", "a r2 ↑"):
        assert metric in page


@pytest.mark.slow
def test_seeds_are_of_one_method_and_raw_targets_are_compared_with_standardized_ones(
    call: Call, tmp_path: Path
) -> None:
    sweep = ["data.standardize_targets=false,true", "seed=0,1", "hydra.sweep.dir=sweep"]
    call(train.main, "-m", *RUN, *NO_CHECKPOINT, *sweep)
    call(report.main, "sweep")
    page = (tmp_path / "sweep" / "report.md").read_text()
    assert "4 finished runs, 2 methods" in page
    assert len(re.findall(r"^\| .*standardize.* \| 2 \|", page, re.M)) == 2


def test_a_run_reports_the_metrics_and_is_evaluated_again(call: Call, tmp_path: Path) -> None:
    call(train.main, *RUN, "balancing=gradnorm", "hydra.run.dir=run")
    tested = json.loads((tmp_path / "run" / "test_metrics.json").read_text())
    found = json.dumps(tested)
    assert all(f"test/{metric}/{task}" in found for metric in METRICS for task in ("a", "b"))
    saved: Any = OmegaConf.load(tmp_path / "run" / "config.yaml")
    data = TabularDataModule(saved.data.path, ["a", "b"])
    assert saved.model.encoder.in_features == 3
    assert {task: tuple(scale) for task, scale in saved.model.tasks.scales.items()} == data.scales
    assert "relative_rmse" in call(evaluate.main, "ckpt_path=run/checkpoints/best.ckpt")


def test_a_task_of_the_table_is_trained_alone(call: Call) -> None:
    assert "One task, b: there is nothing to balance" in call(train.main, *RUN, "tasks=[b]")


@pytest.mark.parametrize("standardize", ["false", "true"])
def test_the_network_follows_the_table(standardize: str, tmp_path: Path) -> None:
    options = ["data.inputs=[x, z]", f"data.standardize_targets={standardize}", "model.encoder.hidden=[7]"]
    config = compose_run(tmp_path, "data=tabular", *TABLE, *options, "model.tasks.hidden=[5]")
    network, data = build(config, "model"), build(config, "data")
    assert {name: tuple(out.shape) for name, out in network(torch.zeros(2, 2)).items()} == {"a": (2, 1), "b": (2, 1)}
    for task in ("a", "b"):
        metric = network.tasks[task].metrics["rmse"]
        assert (metric.mean, metric.unit) == data.scales[task]
        assert network.tasks[task].head[-1].bias.item() == pytest.approx(data.scales[task][0])


@pytest.mark.slow
def test_two_processes_train_on_targets_that_most_batches_lack(call: Call, tmp_path: Path) -> None:
    rows = "".join(f"{i % 17},{i % 13},{i % 7},{i % 5 if i % 12 == 0 else ''}\n" for i in range(200))
    (tmp_path / "sparse.csv").write_text(f"x,y,a,b\n{rows}")
    own = ["data.path=sparse.csv", "data.targets=[a, b]", "data.batch_size=4", *QUICK[4:], *NO_CHECKPOINT[:1]]
    told = call(
        train.main,
        "experiment=tabular",
        *own,
        "balancing=equal",
        "logger=none",
        "trainer=ddp_cpu",
        "trainer.max_epochs=1",
    )
    assert "relative_rmse" in told


WRONG = {
    "no table": (["data.targets=[a]"], "data.path should be set"),
    "no targets": ([TABLE[0]], "data.targets should be set"),
    "one name": ([TABLE[0], "data.targets=a"], "TabularDataModule: targets should be a list of column names"),
    "no such column": (
        [TABLE[0], "data.targets=[a, c]"],
        "gradnorm-train: TabularDataModule: targets names column 'c', which is not in table.csv; it has 'x', 'y', 'z'",
    ),
    "no such file": (
        ["data.path=no.csv", "data.targets=[a]"],
        "no such file: no.csv; path should be the file with the table",
    ),
    "other data": (["data=toy", "model=tabular"], "gradnorm-train: the model needs data with 'input_dim'|'scales'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_sentence(case: str, call: Call) -> None:
    options, expected = WRONG[case]
    start = [] if case == "other data" else ["experiment=tabular"]
    told = call(train.main, *start, *options, status=1)
    assert any(one in told for one in expected.split("|"))
    assert "interpolation" not in told
