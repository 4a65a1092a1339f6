"""`first_order_pass` returns what `torch.autograd.grad` does, and touches no `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lightning_gradnorm.gradients.graph import first_order_pass


class Tagged(torch.Tensor):
    """A subclass whose methods go through ``__torch_function__``."""


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, 3 * x

    @staticmethod
    def backward(ctx: object, first: Tensor, second: Tensor) -> Tensor:
        return 2 * first + 3 * second


def of_layers(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    first, second = nn.Linear(3, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype)
    hidden = first(torch.ones(5, 3, dtype=dtype)).tanh()
    return [hidden, second(hidden)], [first.weight, second.bias, hidden]


def of_a_subclass() -> tuple[list[Tensor], list[Tensor]]:
    W = torch.arange(4.0).as_subclass(Tagged).requires_grad_()
    return [W * W], [W]


def of_a_function() -> tuple[list[Tensor], list[Tensor]]:
    W = torch.arange(4.0, requires_grad=True)
    return list(Doubled.apply(W * W)), [W]


def with_an_unused_target() -> tuple[list[Tensor], list[Tensor]]:
    W = torch.arange(4.0, requires_grad=True)
    return [W.exp()], [W, torch.ones(2, requires_grad=True)]


GRAPHS: dict[str, Callable[[], tuple[list[Tensor], list[Tensor]]]] = {
    "two outputs": lambda: of_layers(torch.float64),
    "float32": lambda: of_layers(torch.float32),
    "bfloat16": lambda: of_layers(torch.bfloat16),
    "complex": lambda: of_layers(torch.complex64),
    "subclass": of_a_subclass,
    "custom function": of_a_function,
    "unused target": with_an_unused_target,
}


def assert_same(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype
            assert torch.equal(one.as_subclass(Tensor), other.as_subclass(Tensor))


@pytest.mark.parametrize("at_edges", [False, True], ids=["tensors", "edges"])
@pytest.mark.parametrize("name", GRAPHS)
def test_it_equals_autograd_grad(name: str, at_edges: bool) -> None:
    torch.manual_seed(0)
    outputs, targets = GRAPHS[name]()
    gradients = [torch.randn_like(output) for output in outputs]
    starts = [get_gradient_edge(one) for one in outputs] if at_edges else outputs
    expected = torch.autograd.grad(starts, targets, gradients, retain_graph=True, allow_unused=True)
    assert any(one is not None and bool(one.any()) for one in expected)
    for _ in range(2):  # the graph stays
        assert_same(first_order_pass(starts, targets, gradients), expected)
    assert all(target.grad is None for target in targets if target.is_leaf)


def test_without_targets_nothing_is_accumulated() -> None:
    W = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="needs at least one target; got none"):
        first_order_pass([W * W], [], [torch.ones(2)])
    assert W.grad is None


def test_a_target_outside_the_graph_is_an_error() -> None:
    W = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first_order_pass([W * W], [torch.ones(2)], [torch.ones(2)])
