"""The norm of a linear layer's gradient without the gradient, where the batch is smaller than the layer.

With inputs X of shape (B, I) and the task's gradients D at the outputs, shape (B, O), ``∇_W L = Dᵀ X`` and::

    ||Dᵀ X||² = Σ_ab (X Xᵀ)_ab (D Dᵀ)_ab

The left side takes B·I·O products for each task, the right one B²·O, and B²·I once for all tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_gradnorm.gradients.layer import LayerGradients, exactly
from lightning_gradnorm.gradients.paths import node_of

_LEAST = 1e-4
"""Of ``||X||² ||D||²``, which bounds the sum; what is smaller has lost too many digits to cancellation."""


class LinearGradients(LayerGradients):
    """Reads ``∇_W L_i`` of a linear layer; the norms of small batches it finds from the products of samples.

    Args:
        layer: whose ``weight`` is ``W``; each call between `before` and `after`.
        is_ours: says of a hook of the layer that it comes from a reader; see `LayerGradients`.
    """

    module: nn.Linear

    def __init__(self, layer: nn.Linear, is_ours: Callable[[Any], bool] = lambda hook: False) -> None:
        super().__init__(layer, is_ours)
        self._at_outputs: dict[str, dict[int, Tensor]] = {}
        """Task → place of a call → the gradient at its output."""
        self._of_inputs: dict[tuple[int, ...], tuple[Tensor, float]] = {}
        """Of calls that a task depends on: X Xᵀ, laid end to end, and its trace."""

    @staticmethod
    def can_read(layer: nn.Module, weight: Tensor) -> TypeGuard[nn.Linear]:
        """Say whether this is a plain linear layer of that weight, on a CPU."""
        return type(layer) is nn.Linear and LayerGradients.is_plain(layer, weight)

    def _pays(self, inputs: Tensor, output: Tensor) -> bool:
        """Ask this for two tasks, with which it begins to pay."""
        rows, (O, I) = inputs.shape[:-1].numel(), self.module.weight.shape  # noqa: E741
        return rows * (I + 2 * O) < 2 * O * I

    def _is_product_with(self, W: Tensor, node: Node) -> bool:
        """Say whether this is the node of a product of W itself, as it is or with its sequences laid end to end."""
        while "View" in node.name() and node.next_functions[0][0] is not None:
            node = node.next_functions[0][0]
        if node.name() not in ("AddmmBackward0", "MmBackward0", "LinearBackward0"):
            return False
        factors = [factor for factor, _ in node.next_functions if factor is not None]
        transposed = [factor.next_functions[0][0] for factor in factors if factor.name() == "TBackward0"]
        return node_of(W) in (*factors, *transposed)

    def _take(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        edges = [call.output for call in self._calls]
        found = torch.autograd.grad(outputs, edges, gradients, retain_graph=True, allow_unused=True)
        # What was only handed on may have a graph of its own (create_graph).
        arrived = {place: part.detach() for place, part in enumerate(found) if part is not None}
        if arrived:
            known = self._at_outputs.setdefault(task, {})
            for place, gradient in arrived.items():
                known[place] = known[place] + gradient if place in known else gradient
        return bool(arrived)

    def _factors(self, task: str) -> tuple[Tensor, Tensor]:
        """Return X and D."""
        at_outputs = self._at_outputs[task]
        inputs = [self._inputs_of(self._calls[place]) for place in at_outputs]
        return _as_rows(inputs), _as_rows(list(at_outputs.values()))

    @property
    def _pending(self) -> Collection[str]:
        return self._at_outputs.keys()

    def _multiply(self) -> None:
        for task in list(self._at_outputs):
            X, D = self._factors(task)
            del self._at_outputs[task]
            with exactly():
                self._add(task, (D.T @ X).flatten())

    def close(self, task: str) -> None:
        """Find the norm by the right side of the equation; by the left one where that would cost too many digits."""
        if task in self._rows:
            self._multiply()
        if task not in self._at_outputs:
            super().close(task)
            return
        X, D = self._factors(task)
        calls = tuple(self._at_outputs.pop(task))
        with exactly():
            if calls not in self._of_inputs:
                XX = X @ X.T
                self._of_inputs[calls] = XX.flatten(), float(XX.trace())
            XX, size = self._of_inputs[calls]
            DD = D @ D.T
            square = torch.dot(XX, DD.flatten())
            if float(square) > _LEAST * size * float(DD.trace()):
                self._closed[task] = square.sqrt()
            else:
                self._add(task, (D.T @ X).flatten())
                super().close(task)

    def rescale(self, task: str, factor: Tensor) -> None:
        """Multiply what was read of a task's gradient by ``factor``."""
        if task in self._at_outputs:
            self._at_outputs[task] = {place: part * factor for place, part in self._at_outputs[task].items()}
        super().rescale(task, factor)

    def forget(self) -> None:
        """Let go of the current forward pass's tensors; what was read of them stays."""
        super().forget()
        self._of_inputs = {}

    def clear(self) -> None:
        """Forget what was read: a new optimizer step begins."""
        self._at_outputs.clear()
        super().clear()


def _as_rows(tensors: Sequence[Tensor]) -> Tensor:
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
