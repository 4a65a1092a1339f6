"""Recomputation for reading a gradient does not change running statistics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches
from models import FEATURES, HIDDEN, INPUTS, OUTPUTS, Automatic, vector_batches
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchjd.aggregation import Sum

from lightning_gradnorm import Aggregation, GradNorm
from lightning_gradnorm.gradients import BufferGuard


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_are_restored_without_disturbing_the_backward_pass_of_batch_norm(dtype: torch.dtype) -> None:
    layer, x = nn.BatchNorm1d(3).to(dtype), torch.randn(4, 3, dtype=dtype, requires_grad=True)
    kept = BufferGuard(layer.buffers())
    once = layer(x)
    before = [buffer.clone() for buffer in layer.buffers()]
    for _ in range(2):
        with kept.preserved("seg"):
            layer(x.detach())
        assert all(torch.equal(buffer, value) for buffer, value in zip(layer.buffers(), before, strict=True))
    once.square().sum().backward()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, FEATURES))

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


class WithCheckpoint(Automatic):
    def build(self) -> None:
        self.encoder = Checkpointed()
        for task in self.tasks:
            setattr(self, f"{task}_head", nn.Linear(FEATURES, OUTPUTS))


CALLBACKS: dict[str, Callable[..., L.Callback]] = {
    "GradNorm": partial(GradNorm, shared_layer="encoder.inner.2", optimizer=partial(torch.optim.SGD, lr=0.0)),
    "Sum at the parameters": partial(Aggregation, Sum(), at="parameters"),
}


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("name", CALLBACKS)
def test_readings_through_a_checkpoint_with_batch_norm_change_nothing(
    name: str, heads: bool, quiet_trainer: Callable[..., L.Trainer]
) -> None:
    """With weights that stay 1 the network is trained as without a callback."""
    plain, model = WithCheckpoint(3), WithCheckpoint(3)
    callback = CALLBACKS[name](tasks=list(model.tasks), heads=model.heads() if heads else None)
    quiet_trainer().fit(plain, Batches(vector_batches(3, 5)))
    quiet_trainer(callbacks=[callback]).fit(model, Batches(vector_batches(3, 5)))
    for (key, value), other in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-12, msg=key)
