"""Readers turn the gradients of one task, as they come back in backward, into the norm that a strategy asks for.

A reader sums over the passes of one optimizer step (micro-batches, heads that are called twice) and yields one row for
each task. Rows of several ranks may be added up before the norm is taken, which is what makes the norm exact:
the norm of a sum is not the sum of norms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class GradientReader(ABC):
    """Sums what arrives at the sought tensors, task by task."""

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}

    @property
    @abstractmethod
    def sought(self) -> list[Tensor]:
        """The tensors whose gradient is read."""

    @abstractmethod
    def read(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add this task's gradients, which have just arrived at ``outputs``."""

    @abstractmethod
    def norms_of(self, rows: Tensor) -> Tensor:
        """Return the T norms that belong to rows of shape (T, n), which may have been summed over ranks."""

    @abstractmethod
    def width(self) -> int:
        """Return n, the number of values that a task's row has."""

    def rows(self, tasks: Sequence[str], like: Tensor) -> Tensor:
        """Return the sums so far, shape (T, n), zero for a task not seen, in the dtype and on the device of ``like``."""
        rows = like.new_zeros(len(tasks), self.width())
        for row, task in zip(rows, tasks, strict=True):
            if task in self._rows:
                row.copy_(self._rows[task])
        return rows

    def norms(self, tasks: Sequence[str]) -> Tensor:
        """Return the norms of the gradients read so far, shape (T,), zero for a task not seen."""
        nothing = next(iter(self._rows.values()), torch.zeros(())).new_zeros(1)
        # Row by row: a table of T copies of W would take longer to fill than the norms to compute.
        return torch.cat([self.norms_of(self._rows.get(task, nothing)[None]) for task in tasks])

    def clear(self) -> None:
        """Forget what was read: a new optimizer step begins."""
        self._rows.clear()

    def _add(self, task: str, row: Tensor) -> None:
        self._rows[task] = self._rows[task] + row if task in self._rows else row


class WeightGradients(GradientReader):
    """Reads ``∇_W L_i``, the gradient of each task at the shared layer's parameters (GradNorm, section 3.1).

    The vector-Jacobian product runs from where the gradient arrived down to ``W`` and no further, on the graph that the
    backward pass is about to use.

    Args:
        parameters: the tensors ``W`` consists of.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self._parameters = list(parameters)

    @property
    def sought(self) -> list[Tensor]:
        """The tensors of ``W``."""
        return self._parameters

    def read(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add the task's contribution to the gradient of ``W``."""
        found = torch.autograd.grad(outputs, self._parameters, gradients, retain_graph=True, allow_unused=True)
        parts = [
            torch.zeros_like(parameter) if part is None else part
            for part, parameter in zip(found, self._parameters, strict=True)
        ]
        row = parts[0].reshape(-1) if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
        self._add(task, _at_least_float32(row))

    def norms_of(self, rows: Tensor) -> Tensor:
        """Return the Euclidean norm of each row."""
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return norms

    def width(self) -> int:
        """Return the number of values in ``W``."""
        return sum(parameter.numel() for parameter in self._parameters)


class ActivationGradients(GradientReader):
    """Reads ``∇_z L_i``, the gradient of each task at the representation: no product with the last layer is needed.

    Each row of a batch has a representation of its own, so that the squares simply add up over micro-batches and ranks.
    `at` names the tensors of the current forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sought: list[Tensor] = []

    def at(self, representation: Sequence[Tensor]) -> None:
        """Take the gradients of this forward pass at these tensors."""
        self._sought.extend(representation)

    @property
    def sought(self) -> list[Tensor]:
        """The tensors of the current forward pass."""
        return self._sought

    def forget(self) -> None:
        """Let go of the current forward pass's tensors; what was read of them stays."""
        self._sought = []

    def read(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add the squared norm of the task's gradient at the representation."""
        found = torch.autograd.grad(outputs, self._sought, gradients, retain_graph=True, allow_unused=True)
        squares = [_at_least_float32(part).square().sum() for part in found if part is not None]
        if squares:
            self._add(task, torch.stack(squares).sum().reshape(1))

    def norms_of(self, rows: Tensor) -> Tensor:
        """Return the root of each row's sum of squares."""
        return rows.squeeze(1).sqrt()

    def width(self) -> int:
        """Return 1: a sum of squares."""
        return 1

    def clear(self) -> None:
        """Forget what was read, and where."""
        super().clear()
        self.forget()
