"""`gradnorm-train tasks=[…]`: some of the tasks, or a single one, which is the baseline for comparisons."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_gradnorm.experiments.cli import evaluate, train
from lightning_gradnorm.experiments.report import read_run

OPTIONS = [
    "data.sigmas=[1, 5, 9]",
    "data.train_size=400",
    "data.val_size=100",
    "data.test_size=100",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "logger=csv",
]


def network(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return state


def test_one_task_is_trained_resumed_and_evaluated_without_balancing(
    call: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*OPTIONS, "tasks=[task_1]", "balancing=upgrad"]
    said = call(train.main, *options, "trainer.max_epochs=2", "hydra.run.dir=whole")
    assert "One task, task_1: there is nothing to balance." in said
    assert not (tmp_path / "whole/weights.json").exists()
    metrics = read_run(tmp_path / "whole").metrics
    assert {name.rpartition("/")[2] for name in metrics} == {"loss", "task_1"}
    assert metrics["test/loss"] == metrics["test/loss/task_1"]

    call(train.main, *options, "trainer.max_epochs=1", "hydra.run.dir=parts")
    said = call(train.main, "ckpt_path=parts/checkpoints/last.ckpt", "trainer.max_epochs=2")
    assert "One task, task_1" in said
    whole, parts = network(tmp_path / "whole"), network(tmp_path / "parts")
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    assert not any("task_0" in name for name in whole)

    found: list[dict[str, float]] = []
    test = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda config: found.append(test(config)))
    call(evaluate.main, "ckpt_path=whole/checkpoints/best.ckpt")
    assert found == [metrics]


def test_of_several_chosen_tasks_these_are_balanced(call: Callable[..., str], tmp_path: Path) -> None:
    said = call(train.main, *OPTIONS, "tasks=[task_2, task_0]", "trainer.max_epochs=1", "hydra.run.dir=run")
    assert "nothing to balance" not in said
    weights = json.loads((tmp_path / "run/weights.json").read_text())["weights"]
    assert set(weights) == {"task_0", "task_2"}
    assert sum(weights.values()) == pytest.approx(2)
    call(train.main, *OPTIONS, "tasks=[task_0, task_2]", "trainer.max_epochs=1", "hydra.run.dir=other")
    assert json.loads((tmp_path / "other/weights.json").read_text())["weights"] == weights


def test_a_task_begins_with_the_head_and_the_encoder_that_it_has_among_all(
    call: Callable[..., str], tmp_path: Path
) -> None:
    still = [*OPTIONS, "trainer.max_epochs=1", "model.optimizer.lr=0", "test=false"]
    call(train.main, *still, "balancing=equal", "hydra.run.dir=all")
    call(train.main, *still, "tasks=[task_1]", "hydra.run.dir=one")
    every, one = network(tmp_path / "all"), network(tmp_path / "one")
    assert any("task_1" in name for name in one)
    assert all(torch.equal(every[name], value) for name, value in one.items())


def test_a_model_that_cannot_choose_tasks_is_an_error(call: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/own.yaml").write_text("_target_: lightning.pytorch.demos.boring_classes.BoringModel\n")
    said = call(train.main, "--config-dir", "mine", "model=own", "tasks=[task_0]", status=1)
    assert "the model is lightning.pytorch.demos.boring_classes.BoringModel, which has no parameter 'only'" in said
