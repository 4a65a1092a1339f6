"""Reading a task's gradient where it comes to the outputs of one layer, and no further.

The gradient of the layer's weight is made of two factors, the layer's input and the gradient at its output. For its norm
alone, `LinearGradients` and `PooledGradients` find cheaper ways than the product, which is left for what they cannot read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from lightning_gradnorm.gradients.paths import node_of, nodes_behind
from lightning_gradnorm.gradients.readers import WeightGradients


class Call(NamedTuple):
    """One call of the layer in the current forward pass."""

    inputs: Tensor
    version: int
    """Of the inputs, which are needed once more when backward is over."""
    output: GradientEdge
    behind: Node | None
    """Where the gradient of the inputs goes on to."""


class LayerGradients(WeightGradients):
    """Base of readers that take each task's gradient at the outputs of one layer instead of ``∇_W L_i`` itself.

    On a CPU, where arithmetic is what a step consists of; for gradients of one backward pass that arrive at the layer's
    outputs. All else is read as it is: several passes of one step, another use of ``W``, other precisions.

    Args:
        layer: whose ``weight`` is ``W``; each call between `before` and `after`.
        is_ours: says of a hook of the layer that it comes from a reader. Any other may change what the layer is given, or
            returns; where there is one, the gradient is read as it is.
    """

    module: nn.Module

    def __init__(self, layer: nn.Module, is_ours: Callable[[Any], bool] = lambda hook: False) -> None:
        assert isinstance(layer.weight, nn.Parameter)
        super().__init__([layer.weight])
        self.module = layer
        self._is_ours = is_ours
        self._begun: list[Any] = []
        self._calls: list[Call] = []
        self._is_all: dict[tuple[Node, ...], bool] = {}
        """Whether the calls are all that leads from these nodes to ``W``, as far as it was asked in this pass."""

    # ---- what a kind of layer answers --------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def can_read(layer: nn.Module, weight: Tensor) -> bool:
        """Say whether this is a layer of that kind, as it comes, with that weight."""

    @abstractmethod
    def _pays(self, inputs: Tensor, output: Tensor) -> bool:
        """Say whether the cheaper way is cheaper for a call of these shapes."""

    @abstractmethod
    def _is_product_with(self, W: Tensor, node: Node) -> bool:
        """Say whether this node is that of the layer itself, with ``W`` as it is."""

    @abstractmethod
    def _take(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        """Take the task's gradients by way of the outputs of `_calls`; say whether that could be done."""

    @property
    @abstractmethod
    def _pending(self) -> Collection[str]:
        """Tasks of which something is known at the outputs alone."""

    @abstractmethod
    def _multiply(self) -> None:
        """Turn what is known at the outputs into rows."""

    # ------------------------------------------------------------------------------------------------------------------

    @staticmethod
    def is_plain(layer: nn.Module, weight: Tensor) -> bool:
        """Say whether the layer does what its class does, with that weight, on a CPU."""
        has_own_forward = "forward" in vars(layer)
        is_computed = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
        return not has_own_forward and getattr(layer, "weight", None) is weight and is_computed

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
        # Asked at each call: what the layer is, and what hangs on it, may have changed since it was chosen.
        if not (self._pays(inputs, output) and self.can_read(self.module, W) and self._has_own_hooks_only()):
            return
        edge = get_gradient_edge(output)
        if self._is_product_with(W, edge.node):
            behind = node_of(inputs) if inputs.requires_grad else None
            self._calls.append(Call(inputs.detach(), inputs._version, edge, behind))
            self._is_all.clear()

    def _has_own_hooks_only(self) -> bool:
        """Say whether the call was that of the layer and no more: somebody else's hooks may change input and output."""
        hooks = (*self.module._forward_pre_hooks.values(), *self.module._forward_hooks.values())
        return not (_global_forward_pre_hooks or _global_forward_hooks) and all(map(self._is_ours, hooks))

    def read(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add the task's contribution to the gradient of ``W``, or what it is made of at the layer's outputs."""
        is_changed = self._parameters[0]._backward_hooks  # by a hook on W, which is asked only by autograd
        if self._calls and not is_changed and self._comes_by_the_calls(outputs):
            self._refuse_if_closed(task)
            if self._take(task, outputs, gradients):
                return
        super().read(task, outputs, gradients)

    def _comes_by_the_calls(self, outputs: Sequence[Tensor]) -> bool:
        """Say whether the way from ``outputs`` to ``W`` leads by the noted calls alone; asked in each pass: it may change."""
        ends = tuple(map(node_of, outputs))
        if ends not in self._is_all:
            calls, W = {call.output.node for call in self._calls}, node_of(self._parameters[0])
            before = [call.behind for call in self._calls if call.behind is not None]
            self._is_all[ends] = W not in nodes_behind([*before, *ends], stop=calls)
        return self._is_all[ends]

    def _inputs_of(self, call: Call) -> Tensor:
        if call.inputs._version != call.version:
            raise RuntimeError(
                "the input of the shared layer was changed in place between backward and the optimizer's step, so that its "
                "gradient's norm cannot be known. Change a copy."
            )
        return call.inputs

    def rows(self, tasks: Sequence[str], like: Tensor) -> Tensor:
        """Return the sums so far, shape (T, n)."""
        self._multiply()
        return super().rows(tasks, like)

    def norms(self, tasks: Sequence[str]) -> Tensor:
        """Return the norms of the gradients read so far, shape (T,), zero for a task not seen; nothing more can be read."""
        for task in list(self._pending):
            self.close(task)
        self._multiply()
        return super().norms(tasks)

    def forget(self) -> None:
        """Let go of the current forward pass's tensors; what was read of them stays."""
        self._multiply()
        self._begun, self._calls, self._is_all = [], [], {}


def exactly() -> torch.autocast:
    """Return a context in which products are of the precision of their factors, whatever autocast a backward pass runs in."""
    return torch.autocast("cpu", enabled=False)


def _is_transformed() -> bool:
    """Say whether a transform of `torch.func` is at work, inside of which tensors do not show their graph."""
    return torch._C._functorch.peek_interpreter_stack() is not None
