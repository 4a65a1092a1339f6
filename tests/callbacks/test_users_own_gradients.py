"""A `training_step` that takes gradients of its own, as one that looks at sensitivities or saliency does."""

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
    """Looks at the gradient of a prediction on the way; what it learns from stays the same."""

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
