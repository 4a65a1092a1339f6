"""The last piece of a gradient's way to the output of a layer: from where it is seen, by operations that keep its shape.

Most often this is a ReLU, or nothing. There autograd's engine takes several times as long to set out as the operation itself.
"""

from __future__ import annotations

from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradnorm.gradients.paths import chain_above, node_of

_BY_NUMBER_ALONE = "Relu LeakyRelu Elu Gelu Silu Mish Hardtanh Hardswish Softplus Tanh Sigmoid"
_BY_NUMBER = frozenset(f"{name}Backward0" for name in _BY_NUMBER_ALONE.split())


class Way(NamedTuple):
    """Some nodes of the autograd graph that follow upon each other, and what comes behind them."""

    nodes: tuple[Node, ...]
    """Each with one gradient that arrives, of the shape of the layer's output."""
    output: GradientEdge
    """Of the layer."""

    @property
    def seen(self) -> GradientEdge:
        """Where it begins."""
        return GradientEdge(self.nodes[0], 0) if self.nodes else self.output

    @property
    def names(self) -> tuple[str, ...]:
        """Of the nodes."""
        return tuple(node.name() for node in self.nodes)

    @property
    def acts_by_number(self) -> bool:
        """Whether each number goes its way alone, by what autograd itself has of an operation."""
        return _BY_NUMBER.issuperset(self.names)

    def begins_at(self, tensor: Tensor) -> bool:
        """Say whether a gradient that has come to ``tensor`` is where the way begins, and nobody has a hook there."""
        return node_of(tensor) is self.seen.node and not tensor._backward_hooks

    def carry(self, gradient: Tensor) -> Tensor:
        """Return what arrives at the layer's output, with what hooks make of it; they may change ``gradient`` itself."""
        (arrived,) = torch.autograd.grad([self.seen], [self.output], [gradient], retain_graph=True)
        return arrived.detach()

    @torch.no_grad()
    def carry_by_hand(self, gradient: Tensor) -> Tensor:
        """Return the same without a look at hooks, and without the engine; if the way `acts_by_number`."""
        for node in self.nodes:
            gradient = node(gradient)  # type: ignore[operator]
        return gradient.detach()


def way_to(output: GradientEdge, end: Node) -> Way:
    """Return the last piece of the way from ``end`` to a layer's output, as long as there is no other and it keeps its shape.

    Example:
        >>> from torch.autograd.graph import get_gradient_edge
        >>> y = torch.tensor([[-1.0, 2.0]], requires_grad=True).exp()
        >>> z = y.relu().tanh()
        >>> way = way_to(get_gradient_edge(y), get_gradient_edge(z.mean()).node)
        >>> way.names
        ('TanhBackward0', 'ReluBackward0')
        >>> torch.equal(way.carry(z.detach()), way.carry_by_hand(z.detach()))
        True
    """
    shape = _shape_at(output.node)
    above = takewhile(lambda node: _shape_at(node) == shape, chain_above(output.node, [end])[1:])
    return Way(tuple(above)[::-1], output)


def _shape_at(node: Node) -> tuple[int, ...] | None:
    """Return the shape of the gradient that arrives there, if it is one."""
    arriving = node._input_metadata
    return tuple(arriving[0].shape) if len(arriving) == 1 else None
