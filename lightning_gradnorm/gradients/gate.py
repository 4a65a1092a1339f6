"""Meets the gradients of all tasks at the representation, and hands one on through the trunk in their place.

The encoder's output passes a gate before anybody reads it. In backward the gate is reached when everything behind it is
done: by then each task's gradient has arrived, at its head's branch or at its loss, and stands as a row of the matrix J of
shape (T, n). What goes on through the trunk is what a strategy makes of J. Heads and trunk are traversed once, as in plain
training (Sener & Koltun 2018, section 3.3, call the bound that this minimises MGDA-UB).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from lightning_gradnorm.gradients.branch import TAKEN
from lightning_gradnorm.gradients.graph import leaves_behind, node_of, nodes_on_paths, reachable_nodes
from lightning_gradnorm.gradients.readers import GradientReader, WeightGradients

HandOn = Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hand_on: HandOn, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.hand_on = hand_on
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.hand_on(arrived)


class _Meeting:
    """The gate of one forward pass, and what has come to it."""

    def __init__(
        self, below: list[Tensor], hand_on: Callable[[ReferenceType[_Meeting], Sequence[Tensor | None]], Any], T: int
    ) -> None:
        self.below = below
        # The graph must not hold who holds the graph: nothing of it would go before the garbage collector comes.
        self.views: list[Tensor] = list(_Gate.apply(partial(hand_on, ref(self)), *below))  # type: ignore[no-untyped-call]
        self.around: set[Node] = set()
        """The way of what comes here besides the tasks' gradients."""
        self.was_passed = False
        """Whether a backward pass has come through."""
        self._T = T
        self.begin()

    def begin(self) -> None:
        self.matrix: Tensor | None = None
        self.read: set[str] = set()
        self.went_on: set[str] = set()
        """Tasks whose gradient was read on its way here, where it arrives with the rest."""
        self.reached: set[int] = set()
        """Which of the representation's tensors any task's gradient has reached."""

    @property
    def node(self) -> Node:
        return node_of(self.views[0])

    @property
    def rows(self) -> Tensor:
        """J, shape (T, n)."""
        if self.matrix is None:
            dtype = torch.float64 if any(view.dtype == torch.float64 for view in self.views) else torch.float32
            width = sum(view.numel() for view in self.views)
            self.matrix = torch.zeros(self._T, width, dtype=dtype, device=self.views[0].device)
        return self.matrix

    def pieces(self, row: Tensor) -> list[Tensor]:
        """Cut a vector of n values into the representation's tensors."""
        parts = torch.split(row, [view.numel() for view in self.views])
        return [part.view(view.shape) for part, view in zip(parts, self.views, strict=True)]

    def place_of(self, tensor: Tensor) -> int | None:
        return next((i for i, view in enumerate(self.views) if view is tensor), None)


class JointGradients(GradientReader):
    """Reads ``∇_z L_i`` of all tasks and replaces their sum by what ``combine`` makes of them.

    It does so in a backward pass between `begin` and `finish`; any other, a gradient that a user takes for himself, goes
    through the gate as if it were not there.

    Args:
        module: the encoder, whose output is the representation.
        name: what the representation is called in an error.
        tasks: the tasks' names, in the order of the rows.
        combine: called in backward, once for each forward pass, with J of shape (T, n), zero in the rows of absent tasks, in
            float32 (float64 if the representation is); it returns a vector of n values that goes on through the trunk, or
            ``None`` for nothing.

    What reaches the representation from elsewhere than the tasks, from a regularizer of it, goes on as it came.

    Example:
        >>> trunk, heads = torch.nn.Linear(3, 4), {"a": torch.nn.Linear(4, 1), "b": torch.nn.Linear(4, 1)}
        >>> reader = JointGradients(trunk, "the representation", ["a", "b"], lambda J: 0.5 * J[0] + 2 * J[1])
        >>> z = reader.forward_post(trunk(torch.ones(2, 3)))
        >>> from lightning_gradnorm.gradients import fan_out
        >>> branches = fan_out(z, heads, reader.read)
        >>> loss = sum(heads[task](branches[task]).square().mean() for task in heads)
        >>> reader.is_behind(loss)
        True
        >>> reader.begin(loss)
        >>> loss.backward()
        >>> reader.on_backward_end()
    """

    module: nn.Module

    def __init__(self, module: nn.Module, name: str, tasks: Sequence[str], combine: Callable[[Tensor], Tensor | None]):
        self.module = module
        self._name = name
        self._places = {task: place for place, task in enumerate(tasks)}
        self._combine = combine
        self._meeting: _Meeting | None = None
        self._in_backward = False

    @property
    def label(self) -> str:
        """The representation."""
        return self._name

    @property
    def targets(self) -> list[Tensor]:
        """What the gate hands to the heads in the current forward pass."""
        return [] if self._meeting is None else self._meeting.views

    def forward_post(self, output: Any) -> Any:
        """Let what the encoder returns through the gate.

        Raises:
            ValueError: the encoder was called before in this forward pass: it would take as many gates, each of which would
                have to wait for the others.
        """
        leaves, structure = pytree.tree_flatten(output)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not places:
            return None
        if self._meeting is not None and not self._meeting.was_passed:
            raise ValueError(
                f"{self._name} is called more than once in one forward pass, so that the tasks' gradients do not meet in one "
                f"place. Give it one batch made of all its inputs (torch.cat), or name as representation a module that is "
                f"called once."
            )
        self._meeting = _Meeting([leaves[i] for i in places], self._hand_on, len(self._places))
        for place, view in zip(places, self._meeting.views, strict=True):
            leaves[place] = view
        return pytree.tree_unflatten(leaves, structure)

    def why_unreadable(self, loss: Tensor) -> str | None:
        """Return what speaks against reading this task here, the end of a sentence."""
        if self._meeting is None:
            return (
                f"cannot be read at {self._name}, which was not called in the forward pass (itself, not its forward or another "
                f"method), or returned no tensors, nor tuples, lists or dicts of tensors that carry a gradient."
            )
        within = {node for node in self.trunk() if not hasattr(node, "variable")}
        if within & reachable_nodes([node_of(loss)], stop={self._meeting.node}):
            return (
                f"reaches what is within {self._name} by a way that does not pass its output, a skip connection say, so that "
                f"part of its gradient would not be aggregated. Name as representation the module whose output is all that "
                f"the heads read, or have the encoder return what they read."
            )
        return None

    def begin(self, back_propagated: Tensor, *, stop: Collection[Node] = ()) -> None:
        """Look, before a backward pass, which way it will take.

        Args:
            back_propagated: what it begins with.
            stop: the nodes at which the tasks' gradients are read.
        """
        self._in_backward = True
        if self._meeting is not None:
            self._meeting.around = nodes_on_paths([node_of(back_propagated)], self._meeting.views, stop=stop)

    def is_behind(self, back_propagated: Tensor) -> bool:
        """Say whether a backward pass that begins there will come to the gate of the current forward pass."""
        gate = None if self._meeting is None else self._meeting.node
        return gate is not None and gate in reachable_nodes([node_of(back_propagated)], stop={gate})

    @property
    def around(self) -> Collection[Node]:
        """The way to the gate of what is not read as any task's gradient."""
        return set() if self._meeting is None else self._meeting.around

    @property
    def was_passed(self) -> bool:
        """Whether a backward pass has come through the current forward pass's gate already."""
        return self._meeting is not None and self._meeting.was_passed

    def read(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> object:
        """Put the task's gradient at the representation into its row."""
        meeting = self._meeting
        assert meeting is not None
        places = [meeting.place_of(output) for output in outputs]
        found: list[Tensor | None]
        if None in places:  # something stands between, and has to be passed
            found = list(torch.autograd.grad(outputs, meeting.views, gradients, retain_graph=True, allow_unused=True))
            meeting.went_on.add(task)
        else:
            by_place = dict(zip(places, gradients, strict=True))
            found = [by_place.get(i) for i in range(len(meeting.views))]
        row = meeting.rows[self._places[task]]
        for place, (piece, gradient) in enumerate(zip(meeting.pieces(row), found, strict=True)):
            if gradient is not None:
                piece.add_(gradient)
                meeting.reached.add(place)
        meeting.read.add(task)
        return None if None in places else TAKEN

    @property
    def read_tasks(self) -> Collection[str]:
        """The tasks whose gradient has arrived in the current backward pass."""
        return set() if self._meeting is None else self._meeting.read

    def gradients_of(self, into: WeightGradients) -> None:
        """Have ``into`` read what each task's row gives in the trunk's parameters: one pass through the trunk for each."""
        meeting = self._meeting
        assert meeting is not None
        for task in meeting.read:
            pieces = meeting.pieces(meeting.rows[self._places[task]])
            into.read(task, meeting.below, [piece.to(t.dtype) for piece, t in zip(pieces, meeting.below, strict=True)])

    def trunk(self) -> set[Node]:
        """Return the nodes behind the representation of the current forward pass."""
        return set() if self._meeting is None else reachable_nodes([node_of(tensor) for tensor in self._meeting.below])

    def parameters(self) -> list[Tensor]:
        """Return the parameters behind the representation, the shared ones, of the current forward pass."""
        return [] if self._meeting is None else leaves_behind(self._meeting.below)

    def on_backward_end(self) -> None:
        """Take note that the backward pass is over: what comes now is not for us."""
        self._in_backward = False

    def release_graph(self) -> None:
        """Let go of the current forward pass."""
        self._meeting, self._in_backward = None, False

    def _hand_on(self, of: ReferenceType[_Meeting], arrived: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        meeting = of()
        if not self._in_backward or meeting is None or meeting is not self._meeting:
            return arrived
        with torch.no_grad(), torch.autocast(meeting.views[0].device.type, enabled=False):
            return self._combined(meeting, arrived)

    def _combined(self, meeting: _Meeting, arrived: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        handed: list[Tensor | None] = [None] * len(arrived)
        if meeting.around:
            handed = list(arrived)
            for task in meeting.went_on:
                pieces = meeting.pieces(meeting.rows[self._places[task]])
                handed = [a if a is None else a - piece for a, piece in zip(handed, pieces, strict=True)]
        combined = self._combine(meeting.rows)
        if combined is not None:
            for place, piece in enumerate(meeting.pieces(combined)):
                before = handed[place]
                if place in meeting.reached:  # what no head has read has no gradient, not one of zeros
                    handed[place] = piece if before is None else before + piece
        meeting.begin()  # of a second backward pass from other losses, if there is one
        meeting.was_passed = True
        return [a if a is None else a.to(tensor.dtype) for a, tensor in zip(handed, meeting.below, strict=True)]
