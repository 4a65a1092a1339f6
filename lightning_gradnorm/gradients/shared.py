"""Reads the task gradients of the parameters that tasks share, and keeps them out of what the ordinary pass accumulates.

A separate first-order pass reads each task's gradient as it arrives, at its loss or at its head. When the ordinary backward
pass reaches a shared parameter, a hook subtracts the tasks' gradients. The rest, such as a regularizer's gradient, is
accumulated as usual. This happens before anything is added to ``.grad``, and before DDP sums it over the ranks. It does not
matter how often the network was called, or whether the losses contain derivatives of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_gradnorm.gradients.graph import first_order_pass, node_of, reachable_nodes
from lightning_gradnorm.gradients.readers import GradientReader, Outputs, flat_row, row_width


class SharedGradients(GradientReader):
    """Reads ``∇_θ L_i`` of all shared parameters, and allows one gradient to replace their sum."""

    label = "what the tasks share"

    def __init__(self) -> None:
        self.targets = []
        self.held: dict[Tensor, None] = {}
        """The parameters that have been targets since the step began, in order."""
        self.rows: dict[str, dict[Tensor, Tensor]] = {}
        """Task → parameter → the sum of the gradients that have arrived there since the step began, flat."""
        self._placed: dict[Tensor, Tensor] = {}
        self._passes: dict[int, dict[Tensor, Tensor | None]] = {}
        """Backward pass → parameter → the sum of what tasks brought there; ``None`` if nothing else can arrive."""
        self._others: set[Node] = set()
        self._hooks = ExitStack()

    @property
    def is_frozen(self) -> bool:
        """Whether no shared parameter is trained."""
        return not self.targets

    def set_targets(self, parameters: Sequence[Tensor]) -> None:
        """Read the gradients of these parameters from now on."""
        self.targets = list(parameters)
        self.held |= dict.fromkeys(parameters)

    def begin(self, backpropagated: Tensor, *, stop: Collection[Node]) -> None:
        """Prepare for a backward pass.

        Args:
            backpropagated: the tensor that it starts from.
            stop: the nodes at which the tasks' gradients are read.
        """
        self.on_backward_end()
        self._others = reachable_nodes([node_of(backpropagated)], stop=stop)
        for parameter in self.targets:  # behind all of the user's own hooks, which change what we read, too
            self._hooks.callback(parameter.register_hook(partial(self._without_tasks, parameter)).remove)  # type: ignore[no-untyped-call]

    def read(self, task: str, outputs: Outputs, gradients: Sequence[Tensor]) -> None:
        """Add the task's gradients to its row.

        They also continue through the network in the ordinary pass, even if it has only shared parameters there. Otherwise the
        user's hooks would be called without a gradient.
        """
        # Hooks also run in our own passes, and in those of a user who takes a gradient meanwhile.
        arrived = self._passes.setdefault(torch._C._current_graph_task_id(), {})
        found = first_order_pass(outputs, self.targets, gradients)
        row = self.rows.setdefault(task, {})
        for parameter, gradient in zip(self.targets, found, strict=True):
            if gradient is None:
                continue
            flat = flat_row([gradient], [parameter])
            row[parameter] = row[parameter] + flat if parameter in row else flat
            if node_of(parameter) not in self._others:
                arrived[parameter] = None
            else:
                before = arrived.get(parameter)
                arrived[parameter] = gradient if before is None else before + gradient

    def _without_tasks(self, parameter: Tensor, gradient: Tensor) -> Tensor | None:
        arrived = self._passes.get(torch._C._current_graph_task_id(), {})
        if parameter not in arrived:
            return None
        of_tasks = arrived.pop(parameter)
        return torch.zeros_like(gradient) if of_tasks is None else gradient - of_tasks

    def on_backward_end(self) -> None:
        """Let gradients pass unchanged again."""
        self._hooks.close()
        self._passes.clear()
        self._others = set()

    def write_rows(self, out: Tensor, tasks: Sequence[str]) -> None:
        """Write the sums so far to the rows of ``out``, shape (T, n), one number for each value in ``held``."""
        widths = [row_width([parameter]) for parameter in self.held]
        for row, task in zip(out, tasks, strict=True):
            found = self.rows.get(task, {})
            for piece, parameter in zip(row.split(widths), self.held, strict=True):
                if parameter in found:
                    piece.copy_(found[parameter])

    @torch.no_grad()
    def place(self, pieces: Mapping[Tensor, Tensor]) -> None:
        """Add a flat piece to each parameter's gradient from elsewhere, replacing what was added before in this step."""
        for parameter, piece in pieces.items():
            shape = parameter.shape
            new = torch.view_as_complex(piece.view(*shape, 2)) if parameter.is_complex() else piece.view(shape)
            new = new.to(parameter.dtype)
            if parameter.grad is None:
                parameter.grad = new.clone()
            else:
                before = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
                parameter.grad = before.add_(new - self._placed[parameter] if parameter in self._placed else new)
            self._placed[parameter] = new

    def release_graph(self) -> None:
        """Release the current forward pass."""
        self.on_backward_end()

    def forget(self) -> None:
        """Forget the gradients read and placed so far."""
        self.rows.clear()
        self._placed.clear()
        self.held = dict.fromkeys(self.targets)
