"""Meets the gradients of all tasks at the representation, and hands one on through the trunk in their place.

The encoder's output passes a gate before anybody reads it. In backward the gate is reached when everything behind it is
done: by then each task's gradient has arrived, at its head's branch or at its loss, and stands as a row of the matrix J of
shape (T, n). What goes on through the trunk is what a strategy makes of J. Heads and trunk are traversed once, as in plain
training (Sener & Koltun 2018, section 3.3, call the bound that this minimises MGDA-UB).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from lightning_gradnorm.gradients.branch import TAKEN
from lightning_gradnorm.gradients.paths import leaves_behind, node_of, nodes_behind, nodes_between
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


class JointGradients(GradientReader):
    """Reads ``∇_z L_i`` of all tasks and replaces their sum by what ``combine`` makes of them.

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
        >>> z = reader.after(trunk(torch.ones(2, 3)))
        >>> from lightning_gradnorm.gradients import fan_out
        >>> branches = fan_out(z, heads, reader.read)
        >>> loss = sum(heads[task](branches[task]).square().mean() for task in heads)
        >>> reader.begin(loss)
        True
        >>> loss.backward()
    """

    module: nn.Module

    def __init__(self, module: nn.Module, name: str, tasks: Sequence[str], combine: Callable[[Tensor], Tensor | None]):
        self.module = module
        self._name = name
        self._places = {task: place for place, task in enumerate(tasks)}
        self._combine = combine
        self._views: list[Tensor] = []
        self._below: list[Tensor] = []
        self._matrix: Tensor | None = None
        self._read: set[str] = set()
        self._went_on: set[str] = set()
        self._has_rest = False
        self._is_done = False

    @property
    def where(self) -> str:
        """The representation."""
        return self._name

    @property
    def sought(self) -> list[Tensor]:
        """What the gate hands to the heads in the current forward pass."""
        return self._views

    def after(self, output: Any) -> Any:
        """Let what the encoder returns through the gate.

        Raises:
            ValueError: the encoder was called before in this forward pass: it would take as many gates, each of which would
                have to wait for the others.
        """
        leaves, structure = pytree.tree_flatten(output)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not places:
            return None
        if self._views and not self._is_done:
            raise ValueError(
                f"{self._name} is called more than once in one forward pass, so that the tasks' gradients do not meet in one "
                f"place. Give it one batch made of all its inputs (torch.cat), or name as representation a module that is "
                f"called once."
            )
        self.forget()
        self._below = [leaves[i] for i in places]
        self._views = list(_Gate.apply(self._hand_on, *self._below))  # type: ignore[no-untyped-call]
        for place, view in zip(places, self._views, strict=True):
            leaves[place] = view
        return pytree.tree_unflatten(leaves, structure)

    def begin(self, back_propagated: Tensor, *, stop: Collection[Node] = ()) -> bool:
        """Look, before a backward pass, which way it will take.

        Args:
            back_propagated: what it begins with.
            stop: the nodes at which the tasks' gradients are read.

        Returns:
            Whether it will come to the gate.
        """
        start = [node_of(back_propagated)]
        gates = {node_of(view) for view in self._views}
        self._has_rest = bool(nodes_between(start, self._views, stop=stop))
        return bool(gates & nodes_behind(start, stop=gates))

    def read(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> object:
        """Put the task's gradient at the representation into its row."""
        places = [next((i for i, view in enumerate(self._views) if view is output), None) for output in outputs]
        found: list[Tensor | None]
        if None in places:  # something stands between, and has to be passed
            found = list(torch.autograd.grad(outputs, self._views, gradients, retain_graph=True, allow_unused=True))
            self._went_on.add(task)
        else:
            by_place = dict(zip(places, gradients, strict=True))
            found = [by_place.get(i) for i in range(len(self._views))]
        row = self._rows()[self._places[task]]
        for piece, gradient in zip(self._pieces(row), found, strict=True):
            if gradient is not None:
                piece.add_(gradient)
        self._read.add(task)
        return None if None in places else TAKEN

    @property
    def read_tasks(self) -> Collection[str]:
        """The tasks whose gradient has arrived in the current forward pass."""
        return self._read

    def gradients_of(self, into: WeightGradients) -> None:
        """Have ``into`` read what each task's row gives in the trunk's parameters: one pass through the trunk for each."""
        for task in self._read:
            pieces = self._pieces(self._rows()[self._places[task]])
            into.read(task, self._below, [piece.to(t.dtype) for piece, t in zip(pieces, self._below, strict=True)])

    def trunk(self) -> set[Node]:
        """Return the nodes behind the representation of the current forward pass."""
        return nodes_behind([node_of(tensor) for tensor in self._below])

    def parameters(self) -> list[Tensor]:
        """Return the parameters behind the representation, the shared ones, of the current forward pass."""
        return leaves_behind(self._below)

    def forget(self) -> None:
        """Let go of the current forward pass."""
        self._views, self._below = [], []
        self._is_done = False
        self._begin_rows()

    def _begin_rows(self) -> None:
        self._matrix, self._read, self._went_on = None, set(), set()

    def _rows(self) -> Tensor:
        if self._matrix is None:
            first = self._views[0]
            dtype = torch.float64 if any(view.dtype == torch.float64 for view in self._views) else torch.float32
            width = sum(view.numel() for view in self._views)
            self._matrix = torch.zeros(len(self._places), width, dtype=dtype, device=first.device)
        return self._matrix

    def _pieces(self, row: Tensor) -> list[Tensor]:
        """Cut a vector of n values into the representation's tensors."""
        parts = torch.split(row, [view.numel() for view in self._views])
        return [part.view(view.shape) for part, view in zip(parts, self._views, strict=True)]

    @torch.no_grad()
    def _hand_on(self, arrived: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        J = self._rows()
        handed: list[Tensor | None] = [None] * len(arrived)
        if self._has_rest:
            handed = list(arrived)
            for task in self._went_on:  # and came here with the rest
                pieces = self._pieces(J[self._places[task]])
                handed = [a if a is None else a - piece for a, piece in zip(handed, pieces, strict=True)]
        with torch.autocast(J.device.type, enabled=False):
            combined = self._combine(J)
        if combined is not None:
            pieces = self._pieces(combined)
            handed = [piece if a is None else a + piece for a, piece in zip(handed, pieces, strict=True)]
        self._begin_rows()  # of a second backward pass from other losses, if there is one
        self._is_done = True
        return [a if a is None else a.to(tensor.dtype) for a, tensor in zip(handed, self._below, strict=True)]
