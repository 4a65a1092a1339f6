"""A study is a set of runs of gradnorm-train that can be stopped and continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from commands import start_no_process
from models import as_inputs_and_targets, multi_task_module, vector_batches
from torch.utils.data import DataLoader

from lightning_gradnorm.experiments.cli import records
from lightning_gradnorm.experiments.cli.job_runner import carry_out

TINY = [
    "data=toy", "logger=none", "callbacks=none", "trainer.max_epochs=2", "trainer.enable_progress_bar=false",
    "data.train_size=20", "data.val_size=10", "data.test_size=10", "data.batch_size=10",
]  # fmt: skip


@pytest.mark.parametrize(
    "at_once", [1, pytest.param(2, marks=pytest.mark.slow)], ids=["in this process", "two at once"]
)
def test_finished_runs_are_kept_and_a_failure_does_not_stop_the_others(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if at_once == 1:
        start_no_process(monkeypatch)
    jobs = {
        "equal/seed 0": [*TINY, "balancing=equal"],
        "wrong": [*TINY, "data.batch_size=-1"],
        "gradnorm": [*TINY, "balancing=gradnorm"],
    }
    finished, failed = carry_out(jobs, tmp_path, at_once=at_once, threads=1)
    assert [run.name for run in finished] == ["equal/seed 0", "gradnorm"]
    assert all(run.metrics["test/loss"] > 0 for run in finished)
    assert [failure.name for failure in failed] == ["wrong"]
    assert "batch_size" in failed[0].reason
    assert json.loads((tmp_path / "gradnorm/training.json").read_text())["steps"] == 4

    before = (tmp_path / "gradnorm/test_metrics.json").stat().st_mtime_ns
    again, still_failed = carry_out(jobs, tmp_path, threads=1)
    assert again == finished
    assert still_failed[0].name == "wrong"
    assert (tmp_path / "gradnorm/test_metrics.json").stat().st_mtime_ns == before

    with pytest.raises(
        ValueError, match=r"gradnorm should be a run with .*alpha=2; got a run with .*balancing=gradnorm\. Choose"
    ):
        carry_out({"gradnorm": [*TINY, "balancing=gradnorm", "alpha=2"]}, tmp_path)


class Clock(L.Callback):
    """A batch takes a second, a validation a hundred."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now

    def on_train_batch_start(self, *_: Any) -> None:
        self.now += 1

    def on_validation_batch_start(self, *_: Any) -> None:
        self.now += 100


def test_the_time_of_training_leaves_validation_out_and_adds_up_over_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(records, "CLOCKS", {"seconds": clock, "processor_seconds": lambda: clock() / 2})

    def trained(epochs: int, ckpt_path: Path | None = None) -> tuple[dict[str, Any], L.Trainer]:
        trainer = L.Trainer(
            max_epochs=epochs, callbacks=[records.TimeRecord(tmp_path), clock], accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        loader = DataLoader(as_inputs_and_targets(vector_batches(T=3, count=4)), batch_size=None)
        trainer.fit(multi_task_module(), loader, loader, ckpt_path=ckpt_path)
        return json.loads((tmp_path / "training.json").read_text()), trainer

    record, trainer = trained(2)
    assert record == {"seconds": 8.0, "processor_seconds": 4.0, "steps": 8, "epochs": 2}
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    clock.now += 1_000  # nobody trains in between
    assert trained(3, tmp_path / "two.ckpt")[0] == {"seconds": 12.0, "processor_seconds": 6.0, "steps": 12, "epochs": 3}
