"""A loss that is reported twice before its backward pass is weighted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from harness import Batches
from loops import Network
from models import TASKS, Automatic, Batch, vector_batches
from torch import Tensor

from lightning_gradnorm import Balancer, FixedWeights
from lightning_gradnorm.strategies import FixedRule

WEIGHTS = {"seg": 2.0, "depth": 0.25, "normal": 0.75}


def weighted_gradients(model: Any, batch: Batch) -> list[Tensor]:
    losses = model.forward_for_textbook(batch).losses
    total = torch.stack([WEIGHTS[task] * loss for task, loss in losses.items()]).sum()
    return list(torch.autograd.grad(total, list(model.parameters())))


def test_a_loss_given_to_watch_and_to_backward_is_weighted_once() -> None:
    model, twin, (batch,) = Network(3), Network(3), vector_batches(3, 1)
    with Balancer(model, FixedRule(WEIGHTS)) as balancer:
        losses = model(batch)
        balancer.watch(losses)
        balancer.backward(losses)
        balancer.step()
    for parameter, expected in zip(model.parameters(), weighted_gradients(twin, batch), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-14)


class LogsTwice(Automatic):
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        output = super().training_step(batch, batch_idx)
        for task in TASKS[:3]:
            self.log(f"train/{task}", output[task])
            self.log(f"train/{task}", output[task])
        return output


class Gradients(L.Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.found = [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]


def test_a_loss_that_is_logged_twice_is_weighted_once(quiet_trainer: Callable[..., L.Trainer]) -> None:
    model, twin, (batch,) = LogsTwice(3), Automatic(3), vector_batches(3, 1)
    weights = FixedWeights(WEIGHTS, tasks={task: f"train/{task}" for task in TASKS[:3]})
    quiet_trainer(callbacks=[weights, gradients := Gradients()]).fit(model, Batches([batch]))
    for found, expected in zip(gradients.found, weighted_gradients(twin, batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
