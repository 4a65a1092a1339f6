"""The norm of a linear layer's gradient without the gradient, where the batch is smaller than the layer.

With inputs X of shape (B, I) and the task's gradients D at the outputs, shape (B, O), ``∇_W L = Dᵀ X`` and::

    ||Dᵀ X||² = Σ_ab (X Xᵀ)_ab (D Dᵀ)_ab

The left side takes B·I·O products for each task, the right one B²·O, and B²·I once for all tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from lightning_gradnorm.gradients.paths import node_of, nodes_behind
from lightning_gradnorm.gradients.readers import WeightGradients

_LEAST = 1e-4
"""Of ``||X||² ||D||²``, which bounds the sum; what is smaller has lost too many digits to cancellation."""


class _Call(NamedTuple):
    inputs: Tensor
    version: int
    """Of the inputs, which are needed once more when backward is over."""
    output: GradientEdge
    behind: Node | None
    """Where the gradient of the inputs goes on to."""


class LinearGradients(WeightGradients):
    """Reads ``∇_W L_i`` as `WeightGradients` does; the norms of small batches it finds from the products of samples.

    On a CPU, where arithmetic is what a step consists of; for gradients of one backward pass that arrive at the layer's
    outputs. All else is read as it is: several passes of one step, another use of ``W``, other precisions.

    Args:
        layer: whose ``weight`` is ``W``; each call between `before` and `after`.
        is_ours: says of a hook of the layer that it comes from a reader. Any other may change what the layer is given, or
            returns; where there is one, the gradient is read as it is.
    """

    module: nn.Linear

    def __init__(self, layer: nn.Linear, is_ours: Callable[[Any], bool] = lambda hook: False) -> None:
        super().__init__([layer.weight])
        self.module = layer
        self._is_ours = is_ours
        self._begun: list[Any] = []
        self._calls: list[_Call] = []
        self._at_outputs: dict[str, dict[int, Tensor]] = {}
        """Task → place of a call → the gradient at its output."""
        self._of_inputs: dict[tuple[int, ...], tuple[Tensor, float]] = {}
        """Of calls that a task depends on: X Xᵀ, laid end to end, and its trace."""
        self._ways: dict[tuple[Node, ...], bool] = {}
        """Whether the calls are the only way from these nodes to ``W``, as far as it was asked in this pass."""

    @staticmethod
    def can_read(layer: nn.Module, weight: Tensor) -> bool:
        """Say whether this is a plain linear layer of that weight, on a CPU."""
        is_plain = type(layer) is nn.Linear and "forward" not in vars(layer) and layer.weight is weight
        return is_plain and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)

    def before(self, args: Any, kwargs: Any) -> None:
        """Note the input."""
        self._begun.append(args[0] if len(args) == 1 and not kwargs else None)

    def after(self, output: Any) -> None:
        """Note where the gradient at the output will come by."""
        inputs, (W,) = self._begun.pop(), self._parameters  # the module may have been lent another for this call
        if not (isinstance(inputs, Tensor) and isinstance(output, Tensor) and W.requires_grad and output.requires_grad):
            return
        if not inputs.dtype == output.dtype == W.dtype or _is_transformed():
            return
        rows, (O, I) = inputs.shape[:-1].numel(), W.shape  # noqa: E741
        if not (rows * (I + 2 * O) < 2 * O * I and self._is_left_alone()):  # it pays already with two tasks
            return
        edge = get_gradient_edge(output)
        if _is_product_with(W, edge.node):
            behind = node_of(inputs) if inputs.requires_grad else None
            self._calls.append(_Call(inputs.detach(), inputs._version, edge, behind))
            self._ways.clear()

    def _is_left_alone(self) -> bool:
        """Say whether the call was that of a linear layer and no more: somebody else's hooks may change input and output."""
        layer = self.module
        hooks = (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values())
        has_own_hooks_only = not (_global_forward_pre_hooks or _global_forward_hooks) and all(map(self._is_ours, hooks))
        return has_own_hooks_only and "forward" not in vars(layer)

    def read(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add the task's contribution to the gradient of ``W``, or to that at the outputs that it is made of."""
        is_changed = self._parameters[0]._backward_hooks  # by a hook on W, which is asked only by autograd
        if not self._calls or is_changed or not self._comes_by_the_calls(outputs):
            super().read(task, outputs, gradients)
            return
        self._refuse_if_closed(task)
        edges = [call.output for call in self._calls]
        found = torch.autograd.grad(outputs, edges, gradients, retain_graph=True, allow_unused=True)
        known = self._at_outputs.setdefault(task, {})
        for place, gradient in enumerate(found):
            if gradient is not None:
                known[place] = known[place] + gradient if place in known else gradient

    def _comes_by_the_calls(self, outputs: Sequence[Tensor]) -> bool:
        """Say whether the way from ``outputs`` to ``W`` leads by the noted calls alone; asked in each pass: it may change."""
        ends = tuple(map(node_of, outputs))
        if ends not in self._ways:
            calls, W = {call.output.node for call in self._calls}, node_of(self._parameters[0])
            before = [call.behind for call in self._calls if call.behind is not None]
            self._ways[ends] = W not in nodes_behind([*before, *ends], stop=calls)
        return self._ways[ends]

    def _factors(self, task: str) -> tuple[Tensor, Tensor]:
        """Return X and D."""
        at_outputs = self._at_outputs[task]
        calls = [self._calls[place] for place in at_outputs]
        if any(call.inputs._version != call.version for call in calls):
            raise RuntimeError(
                "the input of the shared layer was changed in place between backward and the optimizer's step, so that its "
                "gradient's norm cannot be known. Change a copy."
            )
        return _as_rows([call.inputs for call in calls]), _as_rows(list(at_outputs.values()))

    def _multiply(self) -> None:
        """Turn what is known at the outputs into rows."""
        for task in list(self._at_outputs):
            X, D = self._factors(task)
            del self._at_outputs[task]
            self._add(task, (D.T @ X).flatten())

    def rows(self, tasks: Sequence[str], like: Tensor) -> Tensor:
        """Return the sums so far, shape (T, n)."""
        self._multiply()
        return super().rows(tasks, like)

    def norms(self, tasks: Sequence[str]) -> Tensor:
        """Return the norms of the gradients read so far, shape (T,), zero for a task not seen; nothing more can be read."""
        for task in list(self._at_outputs):
            self.close(task)
        return super().norms(tasks)

    def close(self, task: str) -> None:
        """Find the norm by the right side of the equation; by the left one where that would cost too many digits."""
        if task in self._rows:
            self._multiply()
        if task not in self._at_outputs:
            super().close(task)
            return
        X, D = self._factors(task)
        calls = tuple(self._at_outputs.pop(task))
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
        self._multiply()
        self._begun, self._calls, self._of_inputs, self._ways = [], [], {}, {}

    def clear(self) -> None:
        """Forget what was read: a new optimizer step begins."""
        self._at_outputs.clear()
        super().clear()


def _is_transformed() -> bool:
    """Say whether a transform of `torch.func` is at work, inside of which tensors do not show their graph."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _is_product_with(W: Tensor, node: Node) -> bool:
    """Say whether this node is that of a product of W itself, as it is or with its sequences laid end to end."""
    while "View" in node.name() and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    if node.name() not in ("AddmmBackward0", "MmBackward0", "LinearBackward0"):
        return False
    factors = [factor for factor, _ in node.next_functions if factor is not None]
    transposed = [factor.next_functions[0][0] for factor in factors if factor.name() == "TBackward0"]
    return node_of(W) in (*factors, *transposed)


def _as_rows(tensors: Sequence[Tensor]) -> Tensor:
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
