"""A task whose head is called twice in a batch has one gradient: the sum of both calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import lightning as L
import textbook
import torch
from harness import Batches, Recorder, assert_agrees
from models import Automatic, Batch, network_sgd, vector_batches
from textbook import Forward
from torch import Tensor
from torch.nn import functional as F

from lightning_gradnorm import GradNorm


class ReadsTwice(Automatic):
    """The first task's head reads the representation of the inputs and of the inputs turned round."""

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        z, other = self.encoder(batch["x"]), self.encoder(-batch["x"])
        losses = {task: F.mse_loss(getattr(self, f"{task}_head")(z), batch[task]) for task in self.tasks}
        losses["seg"] = losses["seg"] + F.mse_loss(self.seg_head(other), batch["depth"])
        return losses

    def forward_for_textbook(self, batch: Batch) -> Forward:
        return Forward(self.task_losses(batch))


def test_both_calls_of_a_head_count(quiet_trainer: Callable[..., L.Trainer]) -> None:
    model, twin, batches = ReadsTwice(3), ReadsTwice(3), vector_batches(3, 4)
    sgd = partial(torch.optim.SGD, lr=0.05)  # the size of a norm shows in the step, which Adam would hide
    trajectory = textbook.train(
        twin,
        twin.forward_for_textbook,
        batches,
        twin.shared_parameters(),
        network_sgd(twin.parameters()),
        alpha=1.2,
        weight_optimizer=sgd,
    )
    gradnorm = GradNorm(model.tasks, shared_layer="encoder.2", heads=model.heads(), alpha=1.2, optimizer=sgd)
    quiet_trainer(callbacks=[gradnorm, recorder := Recorder(gradnorm)]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin)
