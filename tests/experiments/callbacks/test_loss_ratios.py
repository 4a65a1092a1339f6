"""The metric that selects the best checkpoint: every task's validation loss relative to its first one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradnorm.experiments.callbacks.loss_ratios import LossRatios


class Says(L.LightningModule):
    """Logs given validation losses, one row after the other; the sum too. Trains nothing to speak of."""

    def __init__(self, rows: Sequence[Mapping[str, float]], **total: bool) -> None:
        super().__init__()
        self.rows, self.layer, self.only_total = list(rows), nn.Linear(1, 1), total.get("only_total", False)
        self.shown = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch).sum()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            self.log_dict({"val/loss": 1e-9, "val/loss/a": 1e-9, "val/loss/b": 1e-9})
            return
        row = self.rows[self.shown]
        self.shown += 1
        by_task = {} if self.only_total else {f"val/loss/{task}": loss for task, loss in row.items()}
        self.log_dict({"val/loss": sum(row.values()), **by_task})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Ratios(L.Callback):
    """Writes down what a monitor reads."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(trainer: L.Trainer, model: Says, **options: Any) -> None:
    loader = DataLoader(torch.ones(2, 1))
    trainer.fit(model, loader, loader, **options)


@pytest.fixture
def seen(quiet_trainer: Callable[..., L.Trainer]) -> Callable[..., list[dict[str, float]]]:
    def run(rows: Sequence[Mapping[str, float]], *, only_total: bool = False) -> list[dict[str, float]]:
        watching = Ratios()
        trainer = quiet_trainer(max_epochs=len(rows), callbacks=[watching, LossRatios()], num_sanity_val_steps=1)
        fit(trainer, Says(rows, only_total=only_total))
        return watching.seen

    return run


Seen = Callable[..., list[dict[str, float]]]


def test_every_task_counts_equally_relative_to_the_first_validation_after_the_sanity_check(seen: Seen) -> None:
    found = seen([{"a": 2.0, "b": 100.0}, {"a": 1.0, "b": 110.0}, {"a": 3.0, "b": 80.0}])
    assert [row["val/loss_ratio"] for row in found] == pytest.approx([1.0, (0.5 + 1.1) / 2, (1.5 + 0.8) / 2])


def test_a_late_task_counts_from_its_first_loss_and_one_that_begins_at_zero_does_not(seen: Seen) -> None:
    found = seen([{"a": 2.0, "b": 0.0}, {"a": 1.0, "b": 5.0, "c": 8.0}, {"a": 1.0, "b": 5.0, "c": 2.0}])
    assert [row["val/loss_ratio"] for row in found] == pytest.approx([1.0, (0.5 + 1) / 2, (0.5 + 0.25) / 2])


def test_without_losses_by_task_the_ratio_is_that_of_the_sum(seen: Seen) -> None:
    found = seen([{"a": 4.0}, {"a": 3.0}], only_total=True)
    assert [row["val/loss_ratio"] for row in found] == pytest.approx([1.0, 0.75])


def test_a_loss_that_is_not_a_number_is_no_best_epoch(seen: Seen) -> None:
    found = seen([{"a": 4.0}, {"a": math.nan}])
    assert math.isnan(found[1]["val/loss_ratio"])
    assert "val/loss_ratio" not in seen([{"a": -1.0}])[0]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_the_best_epoch_and_its_loss_are_by_the_ratios_also_after_a_resume(
    quiet_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    # By the sum the last epoch is best, by the ratios the third: they are 1, 0.755, 0.675 and 0.725.
    rows = [{"a": 2.0, "b": 100.0}, {"a": 1.0, "b": 101.0}, {"a": 1.5, "b": 60.0}, {"a": 2.1, "b": 40.0}]

    def trainer(name: str, epochs: int) -> tuple[L.Trainer, Ratios]:
        watching = Ratios()
        best = ModelCheckpoint(tmp_path / name, "best", monitor="val/loss_ratio", enable_version_counter=False)
        options = {"callbacks": [LossRatios(), watching, best], "enable_checkpointing": True}
        return quiet_trainer(max_epochs=epochs, **options), watching

    whole, watching = trainer("whole", 4)
    fit(whole, Says(rows))
    assert [row.get("best/val/loss") for row in watching.seen] == pytest.approx([None, 102.0, 102.0, 61.5])
    assert float(whole.callback_metrics["best/val/loss"]) == pytest.approx(61.5)
    assert torch.load(tmp_path / "whole/best.ckpt", weights_only=True)["epoch"] == 2

    half, _ = trainer("half", 2)
    fit(half, Says(rows))
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest, watching = trainer("half", 4)
    fit(rest, Says(rows[2:]), ckpt_path=tmp_path / "half.ckpt")
    ratios = [row["val/loss_ratio"] for row in watching.seen]
    assert ratios == pytest.approx([(0.75 + 0.6) / 2, (1.05 + 0.4) / 2])
    assert float(rest.callback_metrics["best/val/loss"]) == pytest.approx(61.5)
