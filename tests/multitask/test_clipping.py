"""`MultiTaskModule` clips the gradient that the optimizer gets: of all micro-batches together, after balancing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import lightning as L
import torch
from harness import Batches, parameters_by_part
from models import Automatic, as_inputs_and_targets, multi_task_module, vector_batches
from torch import nn

from lightning_gradnorm import FixedWeights

CLIP, LR = 0.1, 0.5
WEIGHTS = {"seg": 4.0, "depth": 0.25, "normal": 0.5}


def test_the_mean_gradient_of_the_micro_batches_is_clipped_once(quiet_trainer: Callable[..., L.Trainer]) -> None:
    sgd = partial(torch.optim.SGD, lr=LR)
    model = multi_task_module(3, optimizer=sgd, accumulate_grad_batches=2, gradient_clip_val=CLIP)
    twin, batches = Automatic(3), vector_batches(3, 4)
    optimizer = sgd(twin.parameters())
    quiet_trainer(callbacks=[FixedWeights(WEIGHTS)]).fit(model, Batches(as_inputs_and_targets(batches)))
    for window in (batches[:2], batches[2:]):
        optimizer.zero_grad()
        for batch in window:
            losses = twin.forward_for_textbook(batch).losses
            (torch.stack([WEIGHTS[task] * loss for task, loss in losses.items()]).sum() / 2).backward()
        assert nn.utils.clip_grad_norm_(twin.parameters(), CLIP) > CLIP
        optimizer.step()
    expected = parameters_by_part(twin)
    for name, parameter in parameters_by_part(model).items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-12, atol=1e-13, msg=name)
