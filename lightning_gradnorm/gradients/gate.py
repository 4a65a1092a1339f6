"""Collects all task gradients at the representation and sends a single combined gradient into the trunk.

The encoder's output passes a gate before any head reads it. Autograd runs the gate's backward only once everything that
depends on its views is done. By then each task's gradient has been read, at its head's branch or at its loss, into one row
of the matrix J of shape (T, n). A strategy combines the rows, and the result continues through the trunk. Heads and trunk are
traversed once, as in plain training (Sener & Koltun 2018, section 3.3, call the bound that this minimizes MGDA-UB).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_gradnorm.gradients.branch import TAKEN, replace_tensors
from lightning_gradnorm.gradients.graph import first_order_pass, node_of, nodes_on_paths, reachable_nodes
from lightning_gradnorm.gradients.readers import GradientReader, Outputs

Gradients = Sequence[Tensor | None]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, replace: Callable[[Gradients], Gradients], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.replace = replace
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.replace(arrived)


class JointGradients(GradientReader):
    """Reads ``∇_z L_i`` of all tasks and replaces their sum by the result of ``combine``.

    The gate only acts in a backward pass between `begin` and `on_backward_end`. In any other pass, such as one that the user
    runs for a gradient, it is the identity. A gradient that does not come from a task, for example from a regularizer of the
    representation, passes unchanged.

    Args:
        module: the encoder, whose output is the representation.
        name: the name of the representation in errors.
        tasks: the tasks' names, in the order of the rows.
        combine: called in backward, once per forward pass, with J of shape (T, n), zero in the rows of absent tasks, in
            float32 (float64 if the representation is). Returns the vector of n values that continues
            through the trunk.

    Example:
        >>> trunk, heads = torch.nn.Linear(3, 4), {"a": torch.nn.Linear(4, 1), "b": torch.nn.Linear(4, 1)}
        >>> reader = JointGradients(trunk, "the representation", ["a", "b"], lambda J: 0.5 * J[0] + 2 * J[1])
        >>> z = reader.forward_post(trunk(torch.ones(2, 3)))
        >>> from lightning_gradnorm.gradients import fan_out
        >>> branches = fan_out(z, heads, reader.read)
        >>> loss = sum(heads[task](branches[task]).square().mean() for task in heads)
        >>> reader.is_reached_from(loss)
        True
        >>> reader.begin(loss)
        >>> loss.backward()
        >>> reader.on_backward_end()
    """

    module: nn.Module
    way_out = "Call it once, outside; or balance by weights, as GradNorm(norm_of='weight') and Scalarization do."

    def __init__(self, module: nn.Module, name: str, tasks: Sequence[str], combine: Callable[[Tensor], Tensor]):
        self.module, self.label = module, name
        self._row_of = {task: row for row, task in enumerate(tasks)}
        self._combine = combine
        self._in_backward = False
        self._gates = 0
        self._forget_gate()

    def _forget_gate(self) -> None:
        self._gates += 1  # a gate of an earlier forward pass is the identity
        self._inputs: list[Tensor] = []
        self.targets = []
        self._inside: set[Node] | None = None
        self.other_paths: set[Node] = set()
        """The nodes on paths to the gate that avoid the places where the tasks' gradients are read."""
        self.was_passed = False
        """Whether a backward pass has passed the current forward pass's gate."""
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        self._matrix: Tensor | None = None
        self.read_tasks: set[str] = set()
        """The tasks whose gradient has arrived in the current backward pass."""
        self._passed_through: set[str] = (
            set()
        )  # those whose gradient also arrives at the gate, summed with everything else
        self._reached: set[int] = set()  # indices of the representation's tensors that any task's gradient has reached

    def forward_post(self, output: Any) -> Any:
        """Return the encoder's output with a gate behind it.

        Raises:
            ValueError: the encoder was called before in this forward pass. Each call would need its own gate, and each
                gate would have to wait for the others.
        """
        return replace_tensors(output, self._open_gate)

    def _open_gate(self, inputs: list[Tensor]) -> list[Tensor]:
        if self.targets and not self.was_passed:
            raise ValueError(
                f"{self.label} is called more than once in one forward pass, so the task gradients do not meet in one "
                f"place. Give it one batch made of all its inputs (torch.cat), or name a module that is called once."
            )
        self._forget_gate()
        self._inputs = inputs
        # The graph knows us by a number. A reference to our tensors, which hold the graph, would close a cycle.
        self.targets = [*_Gate.apply(partial(self._replace_gradient, self._gates), *inputs)]  # type: ignore[no-untyped-call]
        return self.targets

    @property
    def _rows(self) -> Tensor:
        """J, shape (T, n)."""
        if self._matrix is None:
            dtype = torch.float64 if any(view.dtype == torch.float64 for view in self.targets) else torch.float32
            width = sum(view.numel() for view in self.targets)
            self._matrix = torch.zeros(len(self._row_of), width, dtype=dtype, device=self.targets[0].device)
        return self._matrix

    def _split(self, row: Tensor) -> list[Tensor]:
        """Return a vector of n values as views of the shapes of the representation's tensors."""
        pieces = torch.split(row, [view.numel() for view in self.targets])
        return [piece.view(view.shape) for piece, view in zip(pieces, self.targets, strict=True)]

    def why_unreadable(self, loss: Node) -> str | None:
        """Return why this task's gradient cannot be read here (the end of an error message), or None."""
        if not self.targets:
            return (
                f"cannot be read at {self.label}, which was not called in the forward pass (itself, not its forward or another "
                f"method), or returned no tensors that carry a gradient, alone or in tuples, lists and dicts."
            )
        if self._inside is None:
            self._inside = self._nodes_to_avoid()
        if not self._inside.isdisjoint(reachable_nodes([loss], stop={node_of(self.targets[0])})):
            return (
                f"reaches the inside of {self.label} by a path that does not pass its output: a skip connection, or a "
                f"derivative of the heads by the inputs. Name as representation the module whose output is all that the heads "
                f"read, or let the encoder return what they read. Losses with derivatives can be aggregated at='parameters', "
                f"or balanced by weights, as GradNorm and Scalarization do."
            )
        return None

    def _nodes_to_avoid(self) -> set[Node]:
        """Return the trunk's nodes that no loss may reach by a path around the gate."""
        nodes = reachable_nodes(map(node_of, self._inputs))
        leaves = {node: node.variable for node in nodes if hasattr(node, "variable")}
        inputs = {node for node, leaf in leaves.items() if not isinstance(leaf, nn.Parameter)}
        # A loss may read a weight of the trunk directly, as a weight penalty does. But if the inputs carry a gradient, it may
        # be a derivative by them, which in a trunk of one layer reaches only its weight.
        return nodes - (inputs or leaves.keys())

    def begin(self, backpropagated: Tensor, *, stop: Collection[Node] = ()) -> None:
        """Prepare for a backward pass.

        Args:
            backpropagated: the tensor that it starts from.
            stop: the nodes at which the tasks' gradients are read.
        """
        self._in_backward = True
        self.other_paths = nodes_on_paths([node_of(backpropagated)], self.targets, stop=stop)

    def is_reached_from(self, backpropagated: Tensor) -> bool:
        """Return True if a backward pass from this tensor reaches the gate of the current forward pass."""
        gate = {node_of(view) for view in self.targets[:1]}
        return bool(gate & reachable_nodes([node_of(backpropagated)], stop=gate))

    def read(self, task: str, outputs: Outputs, gradients: Sequence[Tensor]) -> object:
        """Add the task's gradient at the representation to its row."""
        arrived = dict(zip(map(id, outputs), gradients, strict=True))
        at_gate = arrived.keys() <= set(map(id, self.targets))
        if at_gate:
            found = [arrived.get(id(view)) for view in self.targets]
        else:  # other nodes are in between, such as the head when gradients are read at the loss: traverse them first
            found = list(first_order_pass(outputs, self.targets, gradients))
            self._passed_through.add(task)
        for place, (piece, gradient) in enumerate(zip(self._split(self._rows[self._row_of[task]]), found, strict=True)):
            if gradient is not None:
                piece.add_(gradient)
                self._reached.add(place)
        self.read_tasks.add(task)
        return TAKEN if at_gate else None

    def on_backward_end(self) -> None:
        """Make the gate the identity again."""
        self._in_backward = False

    def release_graph(self) -> None:
        """Release the current forward pass."""
        self._in_backward = False
        self._forget_gate()

    def _replace_gradient(self, gate: int, arrived: Gradients) -> Gradients:
        """Return the gradients that continue into the trunk. Called in the gate's backward."""
        if not self._in_backward or gate != self._gates:
            return arrived
        with torch.no_grad(), torch.autocast(self.targets[0].device.type, enabled=False):
            gradients = self._without_tasks(arrived)
            combined = self._combine(self._rows)
            for place, piece in enumerate(self._split(combined)):
                if place in self._reached:  # a tensor that no head reads has no gradient, rather than one of zeros
                    before = gradients[place]
                    gradients[place] = piece if before is None else before + piece
        self._forget_gradients()  # a second backward pass from other losses may follow
        self.was_passed = True
        return [g if g is None else g.to(tensor.dtype) for g, tensor in zip(gradients, self._inputs, strict=True)]

    def _without_tasks(self, arrived: Gradients) -> list[Tensor | None]:
        """Return the gradients that arrived, without those of the tasks.

        A gradient read at a branch has stopped there (`TAKEN`). One read at a loss is part of the sum that arrives here.
        """
        if not self.other_paths:
            return [None] * len(arrived)  # only the tasks' gradients arrive; they are replaced
        others = list(arrived)
        for task in self._passed_through:
            pieces = self._split(self._rows[self._row_of[task]])
            others = [a if a is None else a - piece for a, piece in zip(others, pieces, strict=True)]
        return others
