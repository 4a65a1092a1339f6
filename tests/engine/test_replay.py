"""If the graph of the forward pass cannot be traversed, a module around the shared layer runs again."""

from __future__ import annotations

import textbook
import torch
from loops import Network, distance, gradnorm_rule, parameter_distance, train
from models import network_sgd, vector_batches
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

STEPS = 6


class Reentrant(nn.Module):
    """Its graph is hidden from autograd.grad."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, use_reentrant=True)
        return out


def test_weights_and_network_agree_with_the_textbook_inside_a_reentrant_checkpoint() -> None:
    model, twin, batches = Network(3), Network(3), vector_batches(3, STEPS)
    first, tanh, last, end = model.encoder
    model.encoder = nn.Sequential(first, tanh, Reentrant(nn.Sequential(last, end)))
    trajectory = textbook.train(
        twin,
        twin.forward_for_textbook,
        batches,
        [twin.encoder[2].weight],
        network_sgd(twin.parameters()),
        alpha=1.2,
    )
    options = {"shared_layer": "encoder.2.inner.0", "heads": model.heads()}
    weights, _ = train(model, gradnorm_rule(dtype=torch.float64), batches, **options)
    assert distance(weights, trajectory.weights) <= 1e-9
    assert parameter_distance(model, twin) <= 1e-9
