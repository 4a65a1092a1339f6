"""The last piece of a gradient's way to the output of a layer, where it keeps its shape."""

from __future__ import annotations

from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradnorm.gradients.paths import chain_above, node_of

_NAMES = "Relu LeakyRelu Elu Gelu Silu Mish Hardtanh Hardswish Softplus Tanh Sigmoid"
_ACTIVATIONS = frozenset(f"{name}Backward0" for name in _NAMES.split())


class Way(NamedTuple):
    """Nodes of the autograd graph in the order in which a gradient passes them, and the layer's output, to which it comes."""

    nodes: tuple[Node, ...]
    """To each comes one gradient, of the kind that comes to the layer's output."""
    output: GradientEdge

    @property
    def seen(self) -> GradientEdge:
        """Where it begins: at the first node, or at the layer's output itself."""
        return GradientEdge(self.nodes[0], 0) if self.nodes else self.output

    @property
    def is_short(self) -> bool:
        """Whether there is no more on it than an activation: no tensor between its ends, that somebody may have a hook on."""
        return not self.nodes or (len(self.nodes) == 1 and self.nodes[0].name() in _ACTIVATIONS)

    def begins_at(self, tensor: Tensor) -> bool:
        """Say whether a gradient that has come to ``tensor`` is where the way begins."""
        return node_of(tensor) is self.seen.node

    def carry(self, gradient: Tensor) -> Tensor:
        """Return what becomes of it on the way; a hook may change ``gradient`` itself."""
        (arrived,) = torch.autograd.grad([self.seen], [self.output], [gradient], retain_graph=True)
        return arrived.detach()


def way_to(output: GradientEdge, end: Node) -> Way:
    """Return the last piece of the way from ``end`` to a layer's output, as long as there is no other.

    Example:
        >>> from torch.autograd.graph import get_gradient_edge
        >>> y = torch.tensor([[-1.0, 2.0]], requires_grad=True).exp()
        >>> z = y.relu().tanh()
        >>> way = way_to(get_gradient_edge(y), get_gradient_edge(z.mean()).node)
        >>> [node.name() for node in way.nodes]
        ['TanhBackward0', 'ReluBackward0']
    """
    kind = _kind_at(output.node)
    above = takewhile(lambda node: _kind_at(node) == kind, chain_above(output.node, [end])[1:])
    return Way(tuple(above)[::-1], output)


def _kind_at(node: Node) -> Any:
    """Return shape and type of the gradient that arrives there, if it is one."""
    arriving = node._input_metadata
    if len(arriving) != 1 or arriving[0].is_nested_tensor:
        return None
    return tuple(arriving[0].shape), arriving[0].dtype, arriving[0].device
