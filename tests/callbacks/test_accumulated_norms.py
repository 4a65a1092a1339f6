"""The logged norm of a task is that of the mean loss over the step's micro-batches, also in an incomplete step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import lightning as L
import pytest
import torch
from harness import Batches, MemoryLogger
from models import TASKS, Automatic, vector_batches

from lightning_gradnorm import GradNorm

MICRO_BATCHES = [[0, 1], [2]]  # of each optimizer step: Lightning ends the epoch with an incomplete window


@pytest.mark.parametrize("heads", [False, True])
def test_norms_match_the_mean_loss_over_the_micro_batches(heads: bool, quiet_trainer: Callable[..., L.Trainer]) -> None:
    model, batches, log = Automatic(3), vector_batches(3, 3), MemoryLogger()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)  # type: ignore[method-assign]
    still = partial(torch.optim.SGD, lr=0.0)  # of the weights, which stay 1
    gradnorm = GradNorm(TASKS[:3], shared_layer="encoder.2", heads=model.heads() if heads else None, optimizer=still)
    quiet_trainer(callbacks=[gradnorm], logger=log, accumulate_grad_batches=2).fit(model, Batches(batches))
    for task in TASKS[:3]:
        expected = []
        for step in MICRO_BATCHES:
            losses = torch.stack([model.forward_for_textbook(batches[i]).losses[task] for i in step])
            (gradient,) = torch.autograd.grad(losses.mean(), model.encoder[2].weight)  # type: ignore[union-attr,arg-type]
            expected.append(float(gradient.norm()))
        assert log.scalars[f"gradnorm/grad_norm/{task}"][:2] == pytest.approx(expected, abs=1e-12)
