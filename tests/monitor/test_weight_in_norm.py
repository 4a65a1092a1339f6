"""The monitor shows gradients that include the current weights, and suggests weights for unweighted gradients."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import pytest
import torch
from harness import Batches
from models import TASKS, Automatic, vector_batches

from lightning_gradnorm import FixedWeights, GradientNormMonitor

WEIGHTS = {"seg": 2.0, "depth": 0.25, "normal": 0.75}


def test_norms_have_the_weights_in_them_and_suggested_weights_have_not(
    quiet_trainer: Callable[..., L.Trainer],
) -> None:
    model, twin, batches = Automatic(3), Automatic(3), vector_batches(3, 1)
    monitor = GradientNormMonitor(list(TASKS[:3]), "encoder.2.weight", every_n_steps=1)
    quiet_trainer(callbacks=[FixedWeights(WEIGHTS, tasks=TASKS[:3]), monitor]).fit(model, Batches(batches))
    losses = twin.forward_for_textbook(batches[0]).losses
    W = twin.shared_parameters()
    norms = {task: float(torch.autograd.grad(loss, W, retain_graph=True)[0].norm()) for task, loss in losses.items()}
    assert monitor.last is not None
    assert dict(monitor.last) == pytest.approx({task: WEIGHTS[task] * norm for task, norm in norms.items()}, abs=1e-12)
    inverse = sum(1 / norm for norm in norms.values())
    expected = {task: 3 / (norm * inverse) for task, norm in norms.items()}
    assert monitor.suggested_weights == pytest.approx(expected, abs=1e-12)
