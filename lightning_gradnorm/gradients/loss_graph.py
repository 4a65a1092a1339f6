"""The autograd graph of one batch's losses: which tasks' gradients pass a node, and how deep a weight is.

Everything `engine.discovery` needs to find the shared layer and the heads is in this graph and in the list of module calls of
the forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import Node

from lightning_gradnorm.gradients.graph import children, node_of, reachable_nodes

_PRODUCT = re.compile(r"(mm|mv|dot|convolution|linear)backward", re.IGNORECASE)

Position = tuple[int, int]
"""Weights on the longest path from the input up to and including this one; then the order of the forward pass."""


@dataclass(frozen=True)
class ModuleCalls:
    """All calls of one module in a forward pass: the nodes at which gradients of its inputs and outputs arrive."""

    name: str
    inputs: set[Node] = field(default_factory=set)
    outputs: set[Node] = field(default_factory=set)
    parameters: frozenset[int] = frozenset()
    """``id`` of each parameter of the module itself, not of modules inside it."""


class LossGraph:
    """The graph behind the losses of a batch.

    Args:
        losses: task → the nodes at which the gradients of its losses arrive.

    Example:
        >>> import torch
        >>> trunk, a, b = (torch.nn.Linear(3, 3) for _ in range(3))
        >>> z = trunk(torch.ones(2, 3))
        >>> graph = LossGraph({"a": [a(z).sum().grad_fn], "b": [b(z).sum().grad_fn]})
        >>> graph.heads({node_of(trunk.weight)}, [])
        {}
        >>> {name: list(of_task) for name, of_task in graph.positions({"trunk": [trunk.weight], "a": [a.weight]}, []).items()}
        {'trunk': ['a', 'b'], 'a': ['a']}
    """

    def __init__(self, losses: Mapping[str, Collection[Node]]) -> None:
        self.tasks = list(losses)
        self.roots = losses
        self._reached_by = reached_by(losses)
        self._order = list(reversed(self._reached_by))

    @property
    def nodes(self) -> Collection[Node]:
        """All nodes."""
        return self._reached_by

    def tasks_at(self, nodes: Iterable[Node]) -> list[str]:
        """Return the tasks whose gradient passes any of these nodes."""
        return names_in(self._mask(nodes), self.tasks)

    def _mask(self, nodes: Iterable[Node]) -> int:
        mask = 0
        for node in nodes:
            mask |= self._reached_by.get(node, 0)
        return mask

    def positions(
        self, layers: Mapping[str, Sequence[Tensor]], calls: Collection[ModuleCalls]
    ) -> dict[str, dict[str, Position]]:
        """Return how deep each layer is below the losses that reach it: layer → task → position.

        A layer may be used several times; for each task, the deepest use that it reaches counts. A use outside the calls of
        the layer's own modules only counts if there are none within. An example is the derivative of a network by its input, as
        in a physics loss: it uses all layers once more, the first one last.

        Args:
            layers: the parameters of each layer by name. Several of them may make up one weight (weight norm).
            calls: the module calls of the forward pass. An expression of one parameter alone is a weight, unless it is the
                output of one of these calls, or a loss (a penalty on that weight).
        """
        outputs = {node for module in calls for node in module.outputs}
        own = {node_of(parameter): name for name, parameters in layers.items() for parameter in parameters}
        heavy = {name for name, parameters in layers.items() if any(one.ndim >= 2 for one in parameters)}
        weight_of: dict[Node, str] = {}
        """Node → layer, for expressions of one layer's parameters alone: .T, a cast, weight norm."""
        roots = set().union(*self.roots.values())
        depth: dict[Node, int] = {}
        uses: dict[str, list[tuple[int, Node]]] = {}
        for node in self._order:
            if node in own:
                weight_of[node] = own[node]
                continue
            below = children(node)
            of_layers = {weight_of.get(child) for child in below}
            if len(of_layers) == 1 and None not in of_layers and node not in outputs and node not in roots:
                weight_of[node] = weight_of[below[0]]
                continue
            so_far = max((depth[child] for child in below if child not in weight_of), default=0)
            met = [name for name in dict.fromkeys(map(weight_of.get, below)) if name in heavy]
            depth[node] = so_far + bool(met) if so_far else len(met)
            # In a product without an input computed by another layer, such as tanh(x @ first) @ second, the last one is the
            # weight and what comes before it is its input.
            is_chain = not so_far and len(met) > 1 and _PRODUCT.search(node.name()) is not None
            for here, name in enumerate(met, start=1):
                uses.setdefault(name, []).append((here if is_chain else depth[node], node))
        owners: dict[int, list[ModuleCalls]] = {}
        for module in calls:
            for parameter in module.parameters:
                owners.setdefault(parameter, []).append(module)
        found: dict[str, dict[str, Position]] = {}
        for name, nodes in uses.items():
            around = {module.name: module for parameter in layers[name] for module in owners.get(id(parameter), ())}
            within = set().union(*(_inside(module.outputs, module.inputs) for module in around.values()))
            of_layer: dict[str, tuple[bool, Position]] = {}
            for weights, node in nodes:
                use = node in within, (weights, node._sequence_nr())
                for task in self.tasks_at([node]):
                    of_layer[task] = max(use, of_layer.get(task, use))
            found[name] = {task: position for task, (_, position) in of_layer.items()}
        return found

    def heads(self, targets: Collection[Node], modules: Iterable[ModuleCalls]) -> dict[str, str]:
        """Return the head of each task that has one, task → name: the first module called that belongs to this task alone.

        On the path to the targets, the task's whole gradient leaves the module through its inputs, and no other task's gradient
        enters it. A module that receives another task's loss, even if it ignores it, is not a head: its view of the inputs
        would make that loss part of this task's.

        Args:
            targets: nodes of the tensors whose gradients are read.
            modules: the module calls of the forward pass, in the order of the first calls.
        """
        leads: set[Node] = set()
        for node in self._order:
            if node in targets or any(child in leads for child in children(node)):
                leads.add(node)
        heads: dict[str, str] = {}
        for module in modules:
            outputs = module.outputs & leads
            mask = self._mask(outputs)
            if mask.bit_count() != 1 or (task := self.tasks[mask.bit_length() - 1]) in heads:
                continue
            at_inputs = [self._mask([node]) for node in module.inputs]
            if all(not there or there & mask for there in at_inputs) and self._is_all_inside(
                task, outputs, module.inputs, targets
            ):
                heads[task] = module.name
        return heads

    def _is_all_inside(self, task: str, outputs: set[Node], inputs: set[Node], targets: Collection[Node]) -> bool:
        """Return True if every path from the task's losses to the targets leaves the module by an edge to its inputs."""
        inside = _inside(outputs, inputs)
        seen = set(self.roots[task])
        to_visit = list(seen)
        while to_visit:
            node = to_visit.pop()
            if node in targets:
                return False
            for child in children(node):
                if child not in seen and not (node in inside and child in inputs):
                    seen.add(child)
                    to_visit.append(child)
        return True


def _inside(outputs: set[Node], inputs: set[Node]) -> set[Node]:
    return reachable_nodes(outputs, stop=inputs) - inputs


def names_in(mask: int, tasks: Sequence[str]) -> list[str]:
    """Return the tasks whose bits are set, the first of them at bit 0."""
    found = []
    while mask:
        lowest = mask & -mask
        found.append(tasks[lowest.bit_length() - 1])
        mask ^= lowest
    return found


def reached_by(
    roots: Mapping[str, Collection[Node]], *, stop: Collection[Node] = (), kept: Mapping[Node, int] | None = None
) -> dict[Node, int]:
    """Return the nodes that the tasks' gradients reach, each with a bit for each of these tasks, in one walk for all of them.

    Args:
        roots: task → where its gradient begins. The first task has bit 0.
        stop: nodes that no gradient passes; it may arrive there.
        kept: node → the bits of tasks whose gradient does not pass it.

    Returns:
        Node → bits, each node before all nodes that it leads to.
    """
    order = _children_first((node for nodes in roots.values() for node in nodes), stop)
    reached = dict.fromkeys(reversed(order), 0)
    for bit, nodes in enumerate(roots.values()):
        for node in nodes:
            reached[node] |= 1 << bit
    kept = kept or {}
    for node, mask in reached.items():
        if node not in stop:
            passing = mask & ~kept.get(node, 0)
            for child, _ in node.next_functions:
                if child is not None:
                    reached[child] |= passing
    return reached


def _children_first(roots: Iterable[Node], stop: Collection[Node] = ()) -> list[Node]:
    """Return the nodes reachable from ``roots``, each after all nodes that it leads to."""
    order: dict[Node, None] = {}
    entered: set[Node] = set()
    to_visit = list(roots)
    while to_visit:
        node = to_visit[-1]
        if node in entered:
            to_visit.pop()
            order.setdefault(node)
        else:
            entered.add(node)
            if node not in stop:
                to_visit.extend(child for child in children(node) if child not in entered)
    return list(order)
