"""`losses_from` with a matrix of losses: one row per sample, one column per task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import textbook
import torch
from harness import Batches, Recorder
from models import TASKS, Automatic, Batch, network_sgd, vector_batches
from torch import Tensor

from lightning_gradnorm import GradNorm


class Columns(Automatic):
    """Returns the mean of a matrix of losses: each task's mean, by the number of tasks."""

    def errors(self, batch: Batch) -> Tensor:
        z = self.encoder(batch["x"])
        errors = [(getattr(self, f"{task}_head")(z) - batch[task]).square().mean(1) for task in self.tasks]
        return torch.stack(errors, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        return self.errors(batch).mean()


def fit(trainer: Callable[..., L.Trainer], model: Columns, *tasks: str) -> list[dict[str, float]]:
    gradnorm = GradNorm(dict(zip(model.tasks, tasks, strict=True)), losses_from="errors")
    recorder = Recorder(gradnorm)
    trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(vector_batches(3, 6)))
    return recorder.weights


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_each_column_is_a_task(quiet_trainer: Callable[..., L.Trainer], order: tuple[int, ...]) -> None:
    model, twin = Columns(), Columns()
    weights = fit(quiet_trainer, model, *(f"T.{column}" for column in order))
    run = textbook.train(
        twin,
        twin.forward_for_textbook,
        vector_batches(3, 6),
        twin.shared_parameters(),
        network_sgd(twin.parameters()),
        coefficients=dict.fromkeys(TASKS, 1 / 3),
    )
    for step, expected in zip(weights, run.weights, strict=True):
        for task, column in zip(model.tasks, order, strict=True):
            assert step[task] == pytest.approx(expected[TASKS[column]], abs=1e-9)
    assert max(abs(weight - 1) for weight in weights[-1].values()) > 0.05


def test_a_column_that_does_not_exist_is_an_error_that_lists_them(quiet_trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"task 'normal' should be '3' .* has no '3'; it has '0', '1', '2'"):
        fit(quiet_trainer, Columns(), "T.0", "T.1", "T.3")
