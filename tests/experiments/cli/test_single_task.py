"""`gradnorm-eval single_task=…`: a run against single-task networks, and Δm."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_gradnorm.experiments.cli import evaluate, train
from lightning_gradnorm.experiments.report import read_run

OPTIONS = [
    "data.train_size=400",
    "data.val_size=100",
    "data.test_size=100",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "logger=csv",
]
CHECKPOINT = "ckpt_path=run/checkpoints/best.ckpt"

Call = Callable[..., str]


def delta_m_printed(said: str) -> float:
    (found,) = re.findall(r"Δm +│ +% ↑ +│ +[+-]0\.00\D*│ +([+-][\d.]+)", said)
    return float(found)


def test_the_last_row_is_delta_m_and_obstacles_to_it_are_reported(call: Call, tmp_path: Path) -> None:
    call(train.main, *OPTIONS, "hydra.run.dir=run")
    call(train.main, "-m", *OPTIONS, "tasks=[task_0],[task_1],null", "hydra.sweep.dir=alone")
    of_run = read_run(tmp_path / "run").metrics
    alone = [read_run(tmp_path / "alone" / name).metrics for name in ("0_task_0", "1_task_1")]
    gains = []
    for task, of_task in zip(("task_0", "task_1"), alone, strict=True):
        r2, mse = (of_run[f"test/{metric}/{task}"] / of_task[f"test/{metric}/{task}"] - 1 for metric in ("r2", "mse"))
        gains.append((r2 * (1 if of_task[f"test/r2/{task}"] > 0 else -1) - mse) / 2)
    expected = 100 * sum(gains) / 2
    assert abs(expected) > 0.1
    for folders in ("alone", "[alone/0_task_0,alone/1_task_1]"):
        said = call(evaluate.main, CHECKPOINT, f"single_task={folders}")
        assert delta_m_printed(said) == pytest.approx(expected, abs=6e-3)
    assert "Δm" not in call(evaluate.main, CHECKPOINT)

    said = call(evaluate.main, CHECKPOINT, "single_task=alone/1_task_1", status=1)
    assert "there are none of task_0 alone, only of task_1" in said
    said = call(evaluate.main, CHECKPOINT, "single_task=[run]", status=1)
    assert "single_task should name the folders of single-task runs; there are none in run" in said
    said = call(evaluate.main, CHECKPOINT, "single_task=nowhere", status=1)
    assert "nowhere/test_metrics.json should exist once a run is finished" in said
