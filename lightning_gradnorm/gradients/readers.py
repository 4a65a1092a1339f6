"""Readers take the gradients of one task as they arrive in backward, in the form a strategy needs.

A row reader sums over the passes of one optimizer step (micro-batches, heads that are called twice) and yields one row per
task. Sum the rows over ranks before taking the norm: the norm of a sum is not the sum of norms.
"""

# ruff: noqa: B027 (a reader overrides only the hooks it needs)

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from lightning_gradnorm.gradients.graph import first_order_pass, tensors_with_gradient

Outputs = Sequence[Tensor] | Sequence[GradientEdge]
"""Where gradients arrive."""
Norm = Literal["l2", "max", "mean"]
"""Of all entries of a gradient: the Euclidean norm, the largest absolute value, the mean absolute value."""
_PIECE = 1024  # length of the pieces in which the norm of a long row is taken
_SHORT = 2**16  # length up to which rows are stacked to take all their norms at once


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _flat(gradient: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the values in this shape: a sparse gradient (of an Embedding) dense, a complex one as pairs of real numbers."""
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return (torch.view_as_real(gradient) if gradient.is_complex() else gradient).reshape(shape)


def norms_of_rows(rows: Tensor) -> Tensor:
    """Return the norm of each row, shape (T,).

    Long rows are cut into pieces whose norms are combined. torch's norm adds float32 numbers one by one on a CPU, and loses
    three digits over a million of them.
    """
    pieces = rows.shape[1] // _PIECE
    if pieces < 16:  # exact to six digits, and faster
        whole: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return whole
    end = pieces * _PIECE
    parts = torch.linalg.vector_norm(rows[:, :end].reshape(-1, pieces, _PIECE), dim=2)
    return norms_of_rows(torch.cat([parts, rows[:, end:]], dim=1))


def _largest_of_rows(rows: Tensor) -> Tensor:
    return rows.abs().amax(dim=1)


def _mean_of_rows(rows: Tensor) -> Tensor:
    return rows.abs().mean(dim=1)


_NORMS: Mapping[Norm, Callable[[Tensor], Tensor]] = {
    "l2": norms_of_rows,
    "max": _largest_of_rows,
    "mean": _mean_of_rows,
}


def row_width(parameters: Sequence[Tensor]) -> int:
    """Return the length of `flat_row`."""
    return sum(parameter.numel() * (2 if parameter.is_complex() else 1) for parameter in parameters)


def flat_row(found: Sequence[Tensor | None], parameters: Sequence[Tensor], *count: int) -> Tensor:
    """Return the gradients of ``parameters`` as one vector in float32 or float64, with zeros for missing ones.

    With a count, they are the gradients of that many tasks, stacked along the first dimension; so are the vectors.
    """
    pairs = zip(found, parameters, strict=True)
    parts = [_flat(p.new_zeros(*count, *p.shape) if part is None else part, (*count, -1)) for part, p in pairs]
    return _at_least_float32(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))


def _are_short(rows: Mapping[str, Tensor]) -> bool:
    """Return True if the norms of several rows are cheaper to compute from a table of them."""
    return len(rows) > 1 and sum(row.numel() for row in rows.values()) <= len(rows) * _SHORT


def add_up(old: list[Tensor | None] | None, new: list[Tensor | None]) -> list[Tensor | None]:
    """Return the elementwise sum of two lists of gradients; entries may be ``None``."""
    if old is None:
        return new
    return [a if b is None else b if a is None else a + b for a, b in zip(old, new, strict=True)]


class GradientReader(ABC):
    """Reads the gradient at some target tensors, task by task.

    `read` is called in backward and `on_backward_end` after it. `release_graph` is called when the forward pass's graph is no
    longer needed, `forget` when the gradients read so far are dropped, and `reset` when the next optimizer step begins.
    """

    module: nn.Module | None = None
    """The module whose calls the reader must see, by `forward_pre` and `forward_post`."""
    targets: list[Tensor]
    """The tensors whose gradient is read."""
    label: str
    """Their name in errors."""
    way_out = "Call it outside, or name a shared_layer in a module that is called outside."
    """What to do if `module` cannot be seen, in terms of the user's options."""

    @property
    def is_frozen(self) -> bool:
        """Whether no gradient arrives at the targets because the module they belong to is frozen."""
        if self.targets or self.module is None:
            return False
        parameters = list(self.module.parameters())
        return bool(parameters) and not any(one.requires_grad for one in parameters)

    @abstractmethod
    def read(self, task: str, outputs: Outputs, gradients: Sequence[Tensor]) -> object:
        """Read this task's gradients, which have just arrived at ``outputs``. The return value is that of a `Receive`."""

    def finalize(self, tasks: Sequence[str]) -> None:
        """Called when the gradients of these tasks, at least one, are complete for this optimizer step."""

    def forward_pre(self, args: Any, kwargs: Any) -> None:
        """Called with the arguments of each call of `module`."""

    def forward_post(self, output: Any) -> Any:
        """Called with the output of each call of `module`. Returns a replacement, or ``None``."""

    def why_unreadable(self, loss: Node) -> str | None:
        """Return why this task's gradient cannot be read here (the end of an error message), or None."""
        return None

    def on_backward_end(self) -> None:
        """Called when a backward pass is over."""

    def release_graph(self) -> None:
        """Release the tensors of the current forward pass; the results stay."""

    def forget(self) -> None:
        """Forget what was read, but not the current forward pass."""

    def reset(self) -> None:
        """Forget everything: a new optimizer step begins."""
        self.release_graph()
        self.forget()


class RowReader(GradientReader):
    """Sums up one row per task over the passes of one optimizer step."""

    _power = 1  # of the gradient in a row
    kinds: Sequence[Norm] = ("l2",)
    """The kinds of norms to take."""

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}
        self._finalized: dict[str, Tensor] = {}
        """The norms of tasks whose gradient is complete. Their rows are freed: T copies of a layer would be large."""

    def norms_of(self, rows: Tensor) -> Tensor:
        """Return the norms of rows of shape (T, n), which may have been summed over ranks.

        Returns:
            The T norms; or norms of shape (T, k) if there are several `kinds`.
        """
        if len(self.kinds) == 1:
            return _NORMS[self.kinds[0]](rows)
        return torch.stack([_NORMS[kind](rows) for kind in self.kinds], dim=1)

    def _complete(self, *tasks: str) -> None:
        """Bring the rows of these tasks, by default all, up to date. Called before a row is used."""

    def width(self) -> int:
        """Return n, the length of a row: the number of values in the targets."""
        return row_width(self.targets)

    def rows(self, tasks: Sequence[str], like: Tensor) -> Tensor:
        """Return the sums so far, shape (T, n), zero for a task not seen, in the dtype and on the device of ``like``."""
        assert not self._finalized
        self._complete()
        rows = like.new_zeros(len(tasks), self.width())
        for row, task in zip(rows, tasks, strict=True):
            if task in self._rows:
                row.copy_(self._rows[task])
        return rows

    def norms(self, tasks: Sequence[str]) -> Tensor:
        """Return the norms of the gradients read so far, as `norms_of` does, zero for a task not seen."""
        self._complete()
        if not self._finalized and _are_short(self._rows) and self._rows.keys() == set(tasks):
            return self.norms_of(torch.stack([self._rows[task] for task in tasks]))
        known = self._finalized | self._norms_by_task(self._rows)
        zero = torch.zeros_like(next(iter(known.values()))) if known else self.norms_of(torch.zeros(1, 1)).squeeze(0)
        return torch.stack([known.get(task, zero) for task in tasks])

    def _norms_by_task(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if _are_short(rows):
            return dict(zip(rows, self.norms_of(torch.stack([*rows.values()])).unbind(), strict=True))
        # Row by row: filling a table of T copies of W would take longer than computing the norms.
        return {task: self.norms_of(row[None]).squeeze(0) for task, row in rows.items()}

    def finalize(self, tasks: Sequence[str]) -> None:
        """Replace the rows of these tasks by their norms."""
        self._complete(*tasks)
        self._finalized |= self._norms_by_task({task: self._rows.pop(task) for task in tasks if task in self._rows})

    def rescale(self, task: str, factor: Tensor) -> None:
        """Multiply the task's gradient by ``factor``."""
        self._complete(task)
        for values, power in ((self._rows, self._power), (self._finalized, 1)):
            if task in values:
                values[task] = values[task] * factor**power

    def forget(self) -> None:
        """Forget what was read, but not the current forward pass."""
        self._rows.clear()
        self._finalized.clear()

    def _refuse_if_finalized(self, task: str) -> None:
        if task in self._finalized:
            raise RuntimeError(
                f"the gradient of task '{task}' is read again after it was complete: its loss was back-propagated "
                f"twice for one optimizer step, for example in on_before_backward. Do it once, or optimize manually."
            )

    def add(self, task: str, row: Tensor) -> None:
        """Add a row to the task's sum."""
        self._refuse_if_finalized(task)
        self._rows[task] = self._rows[task] + row if task in self._rows else row


class WeightGradients(RowReader):
    """Reads ``∇_W L_i``, the gradient of each task at the shared layer's parameters (GradNorm, section 3.1).

    The vector-Jacobian product runs from the place where the gradient has arrived down to ``W`` and stops there. It uses the
    graph that the backward pass is about to traverse.

    Args:
        parameters: the tensors that make up ``W``.
    """

    label = "the shared layer"

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.targets = list(parameters)
        self.unreached: set[str] = set()
        """Tasks whose gradient did not reach ``W`` in a pass of this optimizer step."""

    @property
    def is_frozen(self) -> bool:
        """Whether some of ``W`` is frozen."""
        return not all(W.requires_grad for W in self.targets)

    def read(self, task: str, outputs: Outputs, gradients: Sequence[Tensor]) -> None:
        """Add the task's contribution to the gradient of ``W``."""
        found = first_order_pass(outputs, self.targets, gradients)
        if all(part is None for part in found):
            self.unreached.add(task)
        self.add(task, flat_row(found, self.targets))

    def rows_together(self, outputs: Outputs, gradients: Sequence[Tensor], count: int) -> Tensor | None:
        """Return what `read` would add for each of several tasks, shape (count, n), or ``None`` if no gradient reaches ``W``.

        Args:
            outputs: where the gradients have arrived.
            gradients: for each of them, the tasks' gradients, stacked along the first dimension.
            count: the number of tasks.
        """
        found = torch.autograd.grad(
            outputs, self.targets, gradients, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        return None if all(part is None for part in found) else flat_row(found, self.targets, count)

    def forget(self) -> None:
        """Forget what was read, but not the current forward pass."""
        super().forget()
        self.unreached.clear()


class ActivationGradients(RowReader):
    """Reads ``∇_z L_i``, the gradient of each task at the representation, without a product with the last layer.

    Each sample of a batch has its own representation, so squares simply add up over micro-batches and ranks: a row is one
    sum of squares.

    Args:
        module: the encoder, whose output is the representation.
        name: the name of the representation in errors.
    """

    way_out = "Use norm_of='weight', which reads at the shared layer."
    _power = 2

    def __init__(self, module: nn.Module | None = None, name: str = "the representation") -> None:
        super().__init__()
        self.module, self.label, self.targets = module, name, []
        self._arrived: dict[str, list[Tensor | None]] = {}

    def forward_post(self, output: Any) -> None:
        """Read gradients at the tensors in ``output`` during this forward pass."""
        self.targets.extend(tensors_with_gradient(output))

    def release_graph(self) -> None:
        """Release the tensors of the current forward pass; the results stay."""
        self._complete()
        self.targets = []

    def forget(self) -> None:
        """Forget what was read, but not the current forward pass."""
        super().forget()
        self._arrived.clear()

    def read(self, task: str, outputs: Outputs, gradients: Sequence[Tensor]) -> None:
        """Add the task's gradient at the representation."""
        self._refuse_if_finalized(task)
        found = first_order_pass(outputs, self.targets, gradients)
        self._arrived[task] = add_up(self._arrived.get(task), list(found))

    def _complete(self, *tasks: str) -> None:
        """Reduce gradients, each as large as the representation, to sums of squares. No more of them may arrive."""
        for task in tasks or list(self._arrived):
            gradients = self._arrived.pop(task, [])
            squares = [_at_least_float32(part).square().sum() for part in gradients if part is not None]
            if squares:
                self.add(task, torch.stack(squares).sum().reshape(1))

    def norms_of(self, rows: Tensor) -> Tensor:
        """Return the square root of each row's sum of squares."""
        return rows.squeeze(1).sqrt()

    def width(self) -> int:
        """Return 1: a sum of squares."""
        return 1
