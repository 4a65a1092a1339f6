"""Physics-informed networks from the command line: each equation, strategies, LBFGS, and the report with its plots."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from configurations import tiny
from grid import SETTINGS

from lightning_gradnorm.experiments.cli import evaluate, report, train

Call = Callable[..., str]
EXPERIMENTS = [name for name in SETTINGS if name.startswith("pinn")]
QUICK = ["trainer.max_epochs=2", "trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"]


def run(experiment: str, *more: str) -> list[str]:
    return [f"experiment={experiment}", *tiny(experiment), *QUICK, "logger=csv", *more]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_equation_is_trained_tested_drawn_and_evaluated_again(experiment: str, call: Call, tmp_path: Path) -> None:
    told = call(train.main, *run(experiment, "hydra.run.dir=run"))
    tested = json.loads((tmp_path / "run" / "test_metrics.json").read_text())
    tasks = SETTINGS[experiment]
    assert list(tested) == ["test/loss", "test/relative_l2", *(f"test/loss/{task}" for task in tasks)]
    assert tested["test/loss"] == pytest.approx(sum(tested[f"test/loss/{task}"] for task in tasks), rel=1e-5)
    assert all(word in told for word in ("relative_l2", "weight", *tasks))
    weights = json.loads((tmp_path / "run" / "weights.json").read_text())["weights"]
    assert list(weights) == tasks
    assert sum(weights.values()) == pytest.approx(len(tasks), rel=1e-5)
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps"] == 8
    assert (tmp_path / "run" / "solution.png").stat().st_size > 3_000
    again = call(evaluate.main, "ckpt_path=run/checkpoints/best.ckpt")
    for value in tested.values():
        assert f"{value:.4g}" in again


def test_the_network_at_the_end_is_tested_not_the_one_of_the_best_epoch(call: Call, tmp_path: Path) -> None:
    call(train.main, *run("pinn_poisson", "model.optimizer.lr=1.0", "trainer.max_epochs=4", "hydra.run.dir=run"))
    best, last = (torch.load(tmp_path / "run" / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    assert best["global_step"] == last["global_step"] == 16
    for name, tensor in best["state_dict"].items():
        assert torch.equal(tensor, last["state_dict"][name])


def test_strategies_are_compared_in_a_report_with_pictures(call: Call, tmp_path: Path) -> None:
    balancing = "balancing=equal,gradnorm,relobralo"
    call(train.main, "-m", *run("pinn_helmholtz", balancing, "seed=0,1", "hydra.sweep.dir=sweep"))
    call(report.main, "sweep")
    page, text = ((tmp_path / "sweep" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert r"Mean rank: over all relative\_l2" in text
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    runs = [
        tmp_path / "sweep" / f"{number}_{name}_0" for number, name in ((0, "equal"), (2, "gradnorm"), (4, "relobralo"))
    ]
    assert {base64.b64decode(one) for one in pictures} == {(one / "solution.png").read_bytes() for one in runs}
    assert len(pictures) == 3
    (tmp_path / "sweep" / "0_equal_0" / "solution.png").write_bytes(b"damaged")
    call(report.main, "sweep")
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "equal (1_equal_1)" in page
    assert len(re.findall("data:image/png", page)) == 3


@pytest.mark.parametrize(
    "balancing", ["gradnorm", *(pytest.param(one, marks=pytest.mark.slow) for one in ("equal", "uncertainty"))]
)
def test_lbfgs_is_an_option_and_keeps_the_points(balancing: str, call: Call, tmp_path: Path) -> None:
    call(train.main, *run("pinn_poisson", "model/optimizer=lbfgs", f"balancing={balancing}", "hydra.run.dir=run"))
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "_target_: torch.optim.LBFGS" in config
    assert "resample: false" in config
    assert "lr_scheduler: null" in config
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps"] == 8
    losses = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert losses["train/loss"] < 1.0  # from 50


def test_a_run_that_is_resumed_keeps_its_optimizer(call: Call, tmp_path: Path) -> None:
    options = run("pinn_poisson", "model/optimizer=lbfgs", "data.seed=3")
    call(train.main, *options, "hydra.run.dir=whole", "trainer.max_epochs=3")
    call(train.main, *options, "hydra.run.dir=run", "trainer.max_epochs=2")
    call(train.main, "ckpt_path=run/checkpoints/last.ckpt", "trainer.max_epochs=3")
    one, other = ((tmp_path / name / "test_metrics.json").read_text() for name in ("whole", "run"))
    assert one == other


WRONG = {
    "another task": (
        ["data.points={pde: 8, boundary: 8, inital: 3}"],
        "there is no 'data.points.inital'; did you mean 'data.points.initial'?",
    ),
    "a wrong viscosity": (["data.equation.viscosity=0"], "Burgers: viscosity should be a positive number; got 0"),
    "one task alone": (["tasks=[pde]"], "which has no parameter 'only'. Use tasks=null"),
    "weights of others": (["balancing=fixed", "balancing.weights={pde: 1, bc: 2}"], "bc"),
    "no such optimizer": (["model/optimizer=newton"], "newton"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_sentence(case: str, call: Call) -> None:
    options, expected = WRONG[case]
    assert expected in call(train.main, *run("pinn_burgers", *options), status=1)
