"""Runs a module again to get gradients of its parameters, if the graph of the forward pass cannot be traversed twice.

A graph from `torch.compile` frees its buffers or, worse, returns wrong numbers; a layer sharded by FSDP has freed its weight; a
reentrant activation checkpoint has no graph at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import get_device_states, set_device_states

from lightning_gradnorm.gradients.graph import first_order_pass, node_of
from lightning_gradnorm.gradients.readers import Outputs, RowReader, add_up, flat_row, row_width


class _Environment:
    """Everything besides its arguments and parameters that a module's output depends on: random numbers and autocast."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._device_type = next((t.device.type for t in tensors if t.device.type != "cpu"), "cpu")
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(*tensors)
        self._autocast = torch.is_autocast_enabled(self._device_type), torch.get_autocast_dtype(self._device_type)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run the block in this environment. Afterwards, the random number generators are as before."""
        kind = "cuda" if self._device_type == "cpu" else self._device_type
        enabled, dtype = self._autocast
        with (
            torch.random.fork_rng(self._devices, device_type=kind),
            torch.autocast(self._device_type, dtype=dtype, enabled=enabled),
        ):
            torch.set_rng_state(self._cpu)
            if self._devices:
                set_device_states(self._devices, self._states, device_type=kind)
            yield


@dataclass
class _Call:
    """One call of the module in the current forward pass."""

    arguments: Any
    environment: _Environment
    argument_nodes: set[Node]
    """The nodes at which gradients of its arguments arrive."""
    outputs: list[Tensor] = field(default_factory=list)
    arrived: dict[str, list[Tensor | None]] = field(default_factory=dict)
    """Task → its gradient at each output."""


class ReplayedGradients(RowReader):
    """Reads ``∇_W L_i`` as `WeightGradients` does, by running a module that contains ``W`` again.

    It records how the module was called and which gradient of each task arrives at its output. After the backward pass it runs
    the module again, eagerly, with the same input, random numbers and unsharded parameters, on a small separate graph.

    Args:
        module: a module that contains ``W`` and is called in the forward pass.
        parameters: the names of ``W`` in ``module``.
        name: the name of the module in errors.
    """

    module: nn.Module

    def __init__(self, module: nn.Module, parameters: Sequence[str], name: str) -> None:
        super().__init__()
        self.module = module
        self._name, self.label = name, f"the output of '{name}'"
        self._module = getattr(module, "_orig_mod", module)  # the module inside a torch.compile wrapper
        self._parameters = list(parameters)
        self._calls: list[_Call] = []
        self._running: list[_Call] = []
        self._verified = False

    @property
    def targets(self) -> list[Tensor]:  # type: ignore[override]  # not a list: a reentrant checkpoint adds gradients later
        """The module's outputs in this forward pass that carry a gradient."""
        return [tensor for call in self._calls for tensor in call.outputs if tensor.requires_grad]

    def width(self) -> int:
        """Return the number of values in ``W``."""
        return row_width(self.shared)

    @property
    def shared(self) -> list[nn.Parameter]:
        """The parameters that make up ``W``."""
        return [self._module.get_parameter(name) for name in self._parameters]

    @property
    def is_frozen(self) -> bool:
        """Whether some of ``W`` is frozen."""
        return not all(W.requires_grad for W in self.shared)

    @property
    def argument_nodes(self) -> set[Node]:
        """The nodes at which gradients of the module's arguments arrive in this forward pass."""
        return set().union(*(call.argument_nodes for call in self._calls))

    def forward_pre(self, args: Any, kwargs: Any) -> None:
        """Record the arguments and the environment of a call."""
        given = _tensors_in((args, kwargs))
        nodes = {node_of(tensor) for tensor in given if tensor.requires_grad}
        detached = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        self._running.append(_Call(detached, _Environment(given), nodes))

    def forward_post(self, output: Any) -> Any:
        """Return views of the module's output, where gradients will be read.

        We need views because the gradient at the output itself cannot be read if other code has placed a hook on it.
        """
        call = self._running.pop()
        views = pytree.tree_map_only(Tensor, lambda tensor: tensor.view_as(tensor), output)
        call.outputs = _tensors_in(views)
        self._calls.append(call)
        return views

    def read(self, task: str, outputs: Outputs, gradients: Sequence[Tensor]) -> None:
        """Compute the task's gradient at the module's output and keep it until the backward pass is over."""
        found = iter(first_order_pass(outputs, self.targets, gradients))
        for call in self._calls:
            here = [next(found) if tensor.requires_grad else None for tensor in call.outputs]
            if any(gradient is not None for gradient in here):
                call.arrived[task] = add_up(call.arrived.get(task), here)

    def on_backward_end(self) -> None:
        """Run the module again, and add each task's contribution to the gradient of ``W``.

        Raises:
            RuntimeError: the second run returns something other than the first.
        """
        # Gathering sharded weights is a collective: every rank joins in, whichever tasks it has seen.
        tensors, W = self._whole_tensors()
        for call in self._calls:
            if call.arrived:
                self._run_again(call, tensors, W)
                call.arrived = {}

    def release_graph(self) -> None:
        """Release the current forward pass."""
        self._calls, self._running = [], []

    def _whole_tensors(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return the tensors that replace parameters and buffers in the second run, by name; and those that replace ``W``.

        Ties are kept: a parameter of two modules has two names here and one replacement. A module with two names appears
        once, because functional_call replaces the tensors of the module itself.
        """
        W = [id(parameter) for parameter in self.shared]
        replacements: dict[int, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        for prefix, module in self._module.named_modules():
            for name, own in (*module._parameters.items(), *module._buffers.items()):
                if own is None:
                    continue
                if id(own) not in replacements:
                    whole = own.full_tensor() if isinstance(own, DTensor) else own
                    # Buffers are copied: running statistics must not count the batch twice.
                    tensor = whole.detach() if isinstance(own, nn.Parameter) else whole.detach().clone()
                    replacements[id(own)] = tensor.requires_grad_(id(own) in W)
                tensors[f"{prefix}.{name}" if prefix else name] = replacements[id(own)]
        return tensors, [replacements[parameter] for parameter in W]

    def _run_again(self, call: _Call, tensors: Mapping[str, Tensor], W: Sequence[Tensor]) -> None:
        args, kwargs = call.arguments
        with (
            torch.enable_grad(),
            call.environment.restored(),
            _without_sharding_hooks(self._module),
            torch.compiler.set_stance("force_eager"),
        ):
            inside = {f"module.{name}": tensor for name, tensor in tensors.items()}
            again = functional_call(_Forward(self._module), inside, args, kwargs, tie_weights=False)
        outputs = _tensors_in(again)
        self._verify(call.outputs, outputs)
        for task, gradients in call.arrived.items():
            pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
            if pairs:
                ends, arrived = zip(*pairs, strict=True)
                found = first_order_pass(ends, W, arrived)
                self.add(task, flat_row(found, W))

    def _verify(self, first: Sequence[Tensor], again: Sequence[Tensor]) -> None:
        """Compare the two runs, in the first batch only. Rounding may differ, a dropout mask may not."""
        if self._verified:
            return
        if len(first) != len(again) or not all(_close(a, b) for a, b in zip(first, again, strict=True)):
            raise RuntimeError(
                f"running '{self._name}' again did not return the same as in the forward pass. It "
                f"should depend on nothing but its input, parameters and buffers (compiled Dropout draws other masks), and its "
                f"output should not be changed in place. Leave the last shared layer out of what is compiled, checkpointed or "
                f"sharded."
            )
        self._verified = True


class _Forward(nn.Module):
    """Calls a module's ``forward`` without its hooks, which have run in the first call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


@contextmanager
def _without_sharding_hooks(module: nn.Module) -> Iterator[None]:
    """Disable FSDP2's hooks inside ``module``: they would gather and free weights that are already replaced."""
    sharded = [inner for inner in module.modules() if is_sharded(inner)]
    tables = [table for inner in sharded for table in (inner._forward_pre_hooks, inner._forward_hooks)]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)


def is_sharded(module: nn.Module) -> bool:
    """Return True if FSDP2 (``fully_shard``) was applied to this very module."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape
    tolerance = 1e-2 if min(torch.finfo(one.dtype).bits for one in (a, b)) >= 32 else 5e-2
    a, b = a.detach().double(), b.detach().double()
    return bool((a - b).norm() <= tolerance * b.norm()) or not bool(b.norm().isfinite())
