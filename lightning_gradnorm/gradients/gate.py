"""Collects all task gradients at the representation and sends a single combined gradient into the trunk.

The encoder's output passes a gate before any head reads it. Autograd runs the gate's backward only once everything that
depends on its views is done. By then each task's gradient has been read, at its head's branch or at its loss, into one row
of the matrix J of shape (T, n). A strategy combines the rows, and the result continues through the trunk. Heads and trunk are
traversed once, as in plain training (Sener & Koltun 2018, section 3.3, call the bound that this minimises MGDA-UB).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_gradnorm.gradients.branch import TAKEN, replace_tensors
from lightning_gradnorm.gradients.graph import leaves_behind, node_of, nodes_on_paths, reachable_nodes
from lightning_gradnorm.gradients.readers import GradientReader, WeightGradients

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


class _GateState:
    """The gate of one forward pass behind ``inputs``, the trunk's outputs, and the gradients that were read for it."""

    def __init__(
        self, inputs: list[Tensor], replace: Callable[[ReferenceType[_GateState], Gradients], Gradients], T: int
    ):
        self.inputs = inputs
        # A weak reference: the graph holds the function, and this state holds the graph. A strong one would close a cycle,
        # and the whole graph would stay in memory until the garbage collector runs.
        self.views: list[Tensor] = list(_Gate.apply(partial(replace, ref(self)), *inputs))  # type: ignore[no-untyped-call]
        self.other_paths: set[Node] = set()
        """The nodes through which gradients arrive here that do not belong to a task."""
        self.was_passed = False
        """Whether a backward pass has passed the gate."""
        self._T = T
        self.reset()

    def reset(self) -> None:
        """Forget what was read."""
        self.matrix: Tensor | None = None
        self.read_tasks: set[str] = set()
        self.passed_through: set[str] = set()
        """Tasks whose gradient was read on its way here and also arrives at the gate, summed with everything else."""
        self.reached: set[int] = set()
        """Indices of the representation's tensors that any task's gradient has reached."""

    @property
    def rows(self) -> Tensor:
        """J, shape (T, n)."""
        if self.matrix is None:
            dtype = torch.float64 if any(view.dtype == torch.float64 for view in self.views) else torch.float32
            width = sum(view.numel() for view in self.views)
            self.matrix = torch.zeros(self._T, width, dtype=dtype, device=self.views[0].device)
        return self.matrix

    def split(self, row: Tensor) -> list[Tensor]:
        """Return a vector of n values as views of the shapes of the representation's tensors."""
        pieces = torch.split(row, [view.numel() for view in self.views])
        return [piece.view(view.shape) for piece, view in zip(pieces, self.views, strict=True)]


class JointGradients(GradientReader):
    """Reads ``∇_z L_i`` of all tasks and replaces their sum by the result of ``combine``.

    The gate only acts in a backward pass between `begin` and `on_backward_end`. In any other, for a gradient that the user
    computes, it is the identity. A gradient that does not come from a task, from a regularizer of the representation for
    example, passes unchanged.

    Args:
        module: the encoder, whose output is the representation.
        name: what errors call the representation.
        tasks: the tasks' names, in the order of the rows.
        combine: called in backward, once per forward pass, with J of shape (T, n), zero in the rows of absent tasks, in
            float32 (float64 if the representation is). Returns a vector of n values that continues through the trunk, or
            ``None`` for nothing.

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

    def __init__(self, module: nn.Module, name: str, tasks: Sequence[str], combine: Callable[[Tensor], Tensor | None]):
        self.module, self.label, self.targets = module, name, []
        self._row_of = {task: row for row, task in enumerate(tasks)}
        self._combine = combine
        self._state: _GateState | None = None
        self._in_backward = False

    def forward_post(self, output: Any) -> Any:
        """Return the encoder's output with a gate behind it.

        Raises:
            ValueError: the encoder was called before in this forward pass. Each call would need a gate of its own, and each
                gate would have to wait for the others.
        """
        return replace_tensors(output, self._open_gate)

    def _open_gate(self, inputs: list[Tensor]) -> list[Tensor]:
        if self._state is not None and not self._state.was_passed:
            raise ValueError(
                f"{self.label} is called more than once in one forward pass, so that the tasks' gradients do not meet in one "
                f"place. Give it one batch made of all its inputs (torch.cat), or name a module that is called once."
            )
        self._state = _GateState(inputs, self._replace_gradient, len(self._row_of))
        self.targets = self._state.views
        return self.targets

    def why_unreadable(self, loss: Tensor) -> str | None:
        """Return why this task's gradient cannot be read here (the end of an error message), or None."""
        if self._state is None:
            return (
                f"cannot be read at {self.label}, which was not called in the forward pass (itself, not its forward or another "
                f"method), or returned no tensors that carry a gradient, alone or in tuples, lists and dicts."
            )
        # Nodes of parameters are excluded: a loss may read a weight of the trunk directly, as a weight penalty does.
        inside = {node for node in self.trunk_nodes() if not hasattr(node, "variable")}
        if inside & reachable_nodes([node_of(loss)], stop={node_of(self.targets[0])}):
            return (
                f"reaches what is within {self.label} by a way that does not pass its output, a skip connection say. Name as "
                f"representation the module whose output is all that the heads read, or have the encoder return what they read."
            )
        return None

    def begin(self, backpropagated: Tensor, *, stop: Collection[Node] = ()) -> None:
        """Prepare for a backward pass.

        Args:
            backpropagated: the tensor that it starts from.
            stop: the nodes at which the tasks' gradients are read.
        """
        self._in_backward = True
        if self._state is not None:
            self._state.other_paths = nodes_on_paths([node_of(backpropagated)], self._state.views, stop=stop)

    def is_reached_from(self, backpropagated: Tensor) -> bool:
        """Return True if a backward pass from this tensor reaches the gate of the current forward pass."""
        gate = {node_of(view) for view in self.targets[:1]}
        return bool(gate & reachable_nodes([node_of(backpropagated)], stop=gate))

    @property
    def other_paths(self) -> Collection[Node]:
        """The nodes on paths to the gate that avoid the places where the tasks' gradients are read."""
        return set() if self._state is None else self._state.other_paths

    @property
    def was_passed(self) -> bool:
        """Whether a backward pass has passed the current forward pass's gate."""
        return self._state is not None and self._state.was_passed

    @property
    def read_tasks(self) -> Collection[str]:
        """The tasks whose gradient has arrived in the current backward pass."""
        return set() if self._state is None else self._state.read_tasks

    def read(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> object:
        """Add the task's gradient at the representation to its row."""
        state = self._state
        assert state is not None
        arrived = dict(zip(map(id, outputs), gradients, strict=True))
        at_gate = arrived.keys() <= set(map(id, state.views))
        if at_gate:
            found = [arrived.get(id(view)) for view in state.views]
        else:  # other nodes lie between, such as the head when gradients are read at the loss: traverse them first
            found = list(torch.autograd.grad(outputs, state.views, gradients, retain_graph=True, allow_unused=True))
            state.passed_through.add(task)
        row = state.rows[self._row_of[task]]
        for place, (piece, gradient) in enumerate(zip(state.split(row), found, strict=True)):
            if gradient is not None:
                piece.add_(gradient)
                state.reached.add(place)
        state.read_tasks.add(task)
        return TAKEN if at_gate else None

    def read_trunk_gradients(self, reader: WeightGradients) -> None:
        """Have ``reader`` read each task's gradient at the trunk's parameters: one pass through the trunk per task."""
        state = self._state
        assert state is not None
        for task in state.read_tasks:
            pieces = state.split(state.rows[self._row_of[task]])
            gradients = [piece.to(tensor.dtype) for piece, tensor in zip(pieces, state.inputs, strict=True)]
            reader.read(task, state.inputs, gradients)

    def trunk_nodes(self) -> set[Node]:
        """Return the graph's nodes behind the representation in the current forward pass."""
        return set() if self._state is None else reachable_nodes([node_of(tensor) for tensor in self._state.inputs])

    def trunk_parameters(self) -> list[Tensor]:
        """Return the shared parameters: those behind the representation in the current forward pass."""
        return [] if self._state is None else leaves_behind(self._state.inputs)

    def on_backward_end(self) -> None:
        """Make the gate the identity again."""
        self._in_backward = False

    def release_graph(self) -> None:
        """Release the current forward pass."""
        self._state, self.targets, self._in_backward = None, [], False

    def _replace_gradient(self, of: ReferenceType[_GateState], arrived: Gradients) -> Gradients:
        """Return the gradients that continue into the trunk. Called in the gate's backward."""
        state = of()
        if not self._in_backward or state is None or state is not self._state:
            return arrived
        with torch.no_grad(), torch.autocast(state.views[0].device.type, enabled=False):
            return self._add_combined(state, self._gradients_of_no_task(state, arrived))

    def _gradients_of_no_task(self, state: _GateState, arrived: Gradients) -> list[Tensor | None]:
        """Return what has arrived without the tasks' gradients in it.

        A gradient read at a branch has stopped there (`TAKEN`). One read at a loss is part of the sum that arrives here.
        """
        if not state.other_paths:
            return [None] * len(arrived)  # only the tasks' gradients arrive; they are replaced
        others = list(arrived)
        for task in state.passed_through:
            pieces = state.split(state.rows[self._row_of[task]])
            others = [a if a is None else a - piece for a, piece in zip(others, pieces, strict=True)]
        return others

    def _add_combined(self, state: _GateState, gradients: list[Tensor | None]) -> Gradients:
        combined = self._combine(state.rows)
        for place, piece in enumerate([] if combined is None else state.split(combined)):
            if place in state.reached:  # a tensor that no head reads has no gradient, rather than one of zeros
                before = gradients[place]
                gradients[place] = piece if before is None else before + piece
        state.reset()  # a second backward pass from other losses may follow
        state.was_passed = True
        return [g if g is None else g.to(tensor.dtype) for g, tensor in zip(gradients, state.inputs, strict=True)]
