"""A `training_step` that computes its own gradients, for example for sensitivities or saliency."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import pytest
import torch
from harness import Batches, Recorder
from models import Automatic, Batch, vector_batches
from torch import Tensor

from lightning_gradnorm import GradNorm

MakeTrainer = Callable[..., L.Trainer]


class Curious(Automatic):
    """Looks at the gradient of a prediction in between; the training stays the same."""

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        losses = super().task_losses(batch)
        torch.autograd.grad(losses["seg"], self.encoder[0].weight, retain_graph=True)
        return losses


def weights(model: Automatic, trainer: MakeTrainer, with_heads: bool) -> list[dict[str, float]]:
    gradnorm = GradNorm(list(model.tasks), heads=model.heads() if with_heads else None)
    recorder = Recorder(gradnorm)
    trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(vector_batches(3, 6)))
    return recorder.weights


@pytest.mark.parametrize("with_heads", [False, True])
def test_gradients_the_user_takes_are_no_part_of_the_norms(with_heads: bool, quiet_trainer: MakeTrainer) -> None:
    found = weights(Curious(3), quiet_trainer, with_heads)
    expected = weights(Automatic(3), quiet_trainer, with_heads)
    for now, then in zip(found, expected, strict=True):
        assert now == pytest.approx(then, abs=1e-12)


class Regularized(Automatic):
    """Something besides its loss reads a task's prediction: a smoothness term, say."""

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        outputs = {task: getattr(self, f"{task}_head")(z) for task in self.tasks}
        losses = {task: torch.nn.functional.mse_loss(outputs[task], batch[task]) for task in self.tasks}
        return {"loss": sum(losses.values()) + 5 * outputs["seg"].square().mean(), **losses}


def test_a_regularizer_of_a_heads_output_is_refused_with_heads_and_left_alone_without(
    quiet_trainer: MakeTrainer,
) -> None:
    with pytest.raises(ValueError, match=r"reaches the head of task 'seg' by other paths.*Leave heads out"):
        weights(Regularized(3), quiet_trainer, with_heads=True)
    first = weights(Regularized(3), quiet_trainer, with_heads=False)[0]
    assert first == pytest.approx(weights(Automatic(3), quiet_trainer, with_heads=False)[0], abs=1e-12)


class AskedAgain(Automatic):
    """Takes the gradient of a loss that has already been shown, as an adaptive weight does."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        losses = self.task_losses(batch)
        for task, loss in losses.items():
            self.log(task, loss)
        torch.autograd.grad(losses["seg"], self.encoder[0].weight, retain_graph=True)
        return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize("with_heads", [False, True])
def test_a_gradient_of_a_loss_that_was_shown_is_neither_counted_nor_weighted(
    with_heads: bool, quiet_trainer: MakeTrainer
) -> None:
    model = AskedAgain(3)
    gradnorm = GradNorm({task: task for task in model.tasks}, heads=model.heads() if with_heads else None)
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(vector_batches(3, 6)))
    for now, then in zip(recorder.weights, weights(Automatic(3), quiet_trainer, with_heads), strict=True):
        assert now == pytest.approx(then, abs=1e-12)
