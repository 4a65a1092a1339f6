"""Which layer is the deepest, where weights are used without a module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_gradnorm.gradients.loss_graph import LossGraph

BATCH, WIDTH = 6, 4
W = dict[str, nn.Parameter]


def mlp(x: Tensor, w: W) -> Tensor:
    return torch.tanh(torch.tanh(x @ w["first"]) @ w["second"])


def graph_convolution(x: Tensor, w: W) -> Tensor:
    neighbors = torch.eye(BATCH)
    return neighbors @ (torch.relu(neighbors @ (x @ w["first"])) @ w["second"])


def looked_up(x: Tensor, w: W) -> Tensor:
    rows = w["first"][torch.arange(BATCH) % WIDTH]
    return nn.functional.linear(rows, w["second"], torch.zeros(WIDTH, requires_grad=True))


def latent(x: Tensor, w: W) -> Tensor:
    return nn.functional.linear(w["first"], w["second"])


def transposed_and_scaled(x: Tensor, w: W) -> Tensor:
    return torch.tanh(x @ (2 * w["first"]).T) @ w["second"].T


def convolutions(x: Tensor, w: W) -> Tensor:
    first, second = (w[name][:, :, None] for name in ("first", "second"))
    return nn.functional.conv1d(nn.functional.conv1d(x.T[None], first), second)


@pytest.mark.parametrize("forward", [mlp, graph_convolution, looked_up, latent, transposed_and_scaled, convolutions])
@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")])
def test_the_second_of_two_weights_without_modules_is_deeper(
    forward: Callable[[Tensor, W], Tensor], order: tuple[str, str]
) -> None:
    weights = {name: nn.Parameter(torch.randn(WIDTH, WIDTH)) for name in order}
    z = forward(torch.randn(BATCH, WIDTH), weights)
    losses = {"a": z.sum(), "b": z.square().sum()}
    found = LossGraph({task: [loss.grad_fn] for task, loss in losses.items() if loss.grad_fn}).positions(
        {name: [weight] for name, weight in weights.items()}, []
    )
    assert {task: position[0] for task, position in found["first"].items()} == {"a": 1, "b": 1}
    assert {task: position[0] for task, position in found["second"].items()} == {"a": 2, "b": 2}
