"""Running a module once more, for the gradient of its parameters where the graph of the forward pass cannot be walked.

Reading a task's gradient walks part of the graph that the ordinary backward pass is about to walk. Some parts cannot be
walked twice: what `torch.compile` made frees its buffers or, worse, gives wrong numbers; a layer that FSDP shards has let
go of its weight; a reentrant activation checkpoint has no graph at all. A `Replay` notes how a module was called and
which gradients of each task arrive at its output, and when the backward pass is over it runs the module again, eagerly,
with the same input, the same random numbers and the whole of each parameter, on a small graph of its own.
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

from lightning_gradnorm.gradients.graph import node_of
from lightning_gradnorm.gradients.readers import RowReader, add_up, flat_row, row_width


@dataclass
class _Surroundings:
    """What a module's result depends on besides its arguments and its parameters: random numbers and autocast."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]
    device_type: str
    autocast: bool
    autocast_dtype: torch.dtype

    @classmethod
    def now(cls, tensors: Sequence[Tensor]) -> _Surroundings:
        device_type = next((t.device.type for t in tensors if t.device.type != "cpu"), "cpu")
        devices, states = get_device_states(*tensors)
        return cls(
            torch.get_rng_state(),
            list(devices),
            list(states),
            device_type,
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        kind = "cuda" if self.device_type == "cpu" else self.device_type
        with (
            torch.random.fork_rng(self.devices, device_type=kind),
            torch.autocast(self.device_type, dtype=self.autocast_dtype, enabled=self.autocast),
        ):
            torch.set_rng_state(self.cpu)
            if self.devices:
                set_device_states(self.devices, self.states, device_type=kind)
            yield


@dataclass
class _Call:
    """One call of the module in the current forward pass."""

    arguments: Any
    surroundings: _Surroundings
    before: set[Node]
    """Where the gradients of its arguments go on to."""
    outputs: list[Tensor] = field(default_factory=list)
    arrived: dict[str, list[Tensor | None]] = field(default_factory=dict)
    """Task → its gradient at each of the outputs."""


class ReplayedGradients(RowReader):
    """Reads ``∇_W L_i`` as `WeightGradients` does, by running a module that contains ``W`` once more.

    Args:
        module: a module that contains ``W`` and is called in the forward pass, each call between `before` and `after`.
        parameters: the names of ``W`` in ``module``.
        name: what to call the module in an error.
    """

    module: nn.Module

    def __init__(self, module: nn.Module, parameters: Sequence[str], name: str) -> None:
        super().__init__()
        self.module = module
        self._name = name
        self._module = getattr(module, "_orig_mod", module)  # what torch.compile has wrapped
        self._parameters = list(parameters)
        self._calls: list[_Call] = []
        self._begun: list[_Call] = []
        self._verified = False

    @property
    def label(self) -> str:
        """The module's output."""
        return f"the output of '{self._name}'"

    @property
    def targets(self) -> list[Tensor]:
        """What the module returned in this forward pass, as far as it is part of the graph."""
        return [tensor for call in self._calls for tensor in call.outputs if tensor.requires_grad]

    def width(self) -> int:
        """Return the number of values in ``W``."""
        return row_width(self.shared)

    @property
    def shared(self) -> list[nn.Parameter]:
        """The parameters that ``W`` consists of."""
        return [self._module.get_parameter(name) for name in self._parameters]

    @property
    def before_calls(self) -> set[Node]:
        """Where gradients go on to from what the module was given in this forward pass."""
        return set().union(*(call.before for call in self._calls))

    def forward_pre(self, args: Any, kwargs: Any) -> None:
        """Note how the module is called."""
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        before = {node_of(tensor) for tensor in given if tensor.requires_grad}
        detached = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        self._begun.append(_Call(detached, _Surroundings.now(given), before))

    def forward_post(self, output: Any) -> Any:
        """Note what the module returns; return views of it to be handed on in its place.

        Views, since the gradient at the output itself cannot be asked for where somebody else has hung a hook on it.
        """
        call = self._begun.pop()
        views = pytree.tree_map_only(Tensor, lambda tensor: tensor.view_as(tensor), output)
        call.outputs = [leaf for leaf in pytree.tree_leaves(views) if isinstance(leaf, Tensor)]
        self._calls.append(call)
        return views

    def read(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Carry the task's gradient on to the module's output, and keep it there until the backward pass is over."""
        found = iter(torch.autograd.grad(outputs, self.targets, gradients, retain_graph=True, allow_unused=True))
        for call in self._calls:
            here = [next(found) if tensor.requires_grad else None for tensor in call.outputs]
            if any(gradient is not None for gradient in here):
                call.arrived[task] = add_up(call.arrived.get(task), here)

    def on_backward_end(self) -> None:
        """Run the module again, and add what ``W`` gets from each task.

        Raises:
            RuntimeError: the second run gives something else than the first.
        """
        tensors, W = self._whole_tensors()  # may be a collective: on every rank, whichever tasks are present here
        for call in self._calls:
            if call.arrived:
                self._run_again(call, tensors, W)
                call.arrived = {}

    def release_graph(self) -> None:
        """Let go of the current forward pass."""
        self._calls, self._begun = [], []

    def _whole_tensors(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return what stands for each parameter and buffer in the second run, by the place where it is; and those for ``W``.

        A module that has two names has its places once, a parameter that is in two modules is one tensor in two places.
        """
        W = [id(parameter) for parameter in self.shared]
        stands_for: dict[int, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        for prefix, module in self._module.named_modules():
            for name, own in (*module._parameters.items(), *module._buffers.items()):
                if own is None:
                    continue
                if id(own) not in stands_for:
                    # Buffers are copied: running statistics are not to see the batch twice.
                    is_parameter = isinstance(own, nn.Parameter)
                    tensor = _whole(own).detach() if is_parameter else own.detach().clone()
                    stands_for[id(own)] = tensor.requires_grad_(id(own) in W)
                tensors[f"{prefix}.{name}" if prefix else name] = stands_for[id(own)]
        return tensors, [stands_for[parameter] for parameter in W]

    def _run_again(self, call: _Call, tensors: Mapping[str, Tensor], W: Sequence[Tensor]) -> None:
        args, kwargs = call.arguments
        with (
            torch.enable_grad(),
            call.surroundings.again(),
            _without_sharding_hooks(self._module),
            torch.compiler.set_stance("force_eager"),
        ):
            inside = {f"module.{name}": tensor for name, tensor in tensors.items()}
            again = functional_call(_Forward(self._module), inside, args, kwargs, tie_weights=False)
        outputs = [leaf for leaf in pytree.tree_leaves(again) if isinstance(leaf, Tensor)]
        self._verify(call.outputs, outputs)
        for task, gradients in call.arrived.items():
            pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
            if pairs:
                ends, arrived = zip(*pairs, strict=True)
                found = torch.autograd.grad(ends, W, arrived, retain_graph=True, allow_unused=True)
                self._add(task, flat_row(found, W))

    def _verify(self, first: Sequence[Tensor], again: Sequence[Tensor]) -> None:
        """Compare the two runs, once: rounding may differ, a dropout mask may not."""
        if self._verified:
            return
        if len(first) != len(again) or not all(_close(a, b) for a, b in zip(first, again, strict=True)):
            raise RuntimeError(
                f"running '{self._name}' again did not give what it gave in the forward pass, so that no gradient can be "
                f"read there. It should depend on nothing but its input, parameters and buffers (Dropout that "
                f"torch.compile has compiled draws other masks), and what it returns should not be changed in place. Leave the "
                f"last shared layer out of what is compiled, checkpointed or sharded."
            )
        self._verified = True


class _Forward(nn.Module):
    """Calls a module's ``forward`` alone: what hangs on the module has run when the call was noted."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


@contextmanager
def _without_sharding_hooks(module: nn.Module) -> Iterator[None]:
    """Keep FSDP2's hooks inside ``module`` quiet: they gather and free weights that we bring along ourselves."""
    tables = [
        (inner, table)
        for inner in module.modules()
        if is_sharded(inner)
        for table in ("_forward_pre_hooks", "_forward_hooks")
    ]
    kept = [dict(getattr(inner, table)) for inner, table in tables]
    for inner, table in tables:
        getattr(inner, table).clear()
    try:
        yield
    finally:
        for (inner, table), hooks in zip(tables, kept, strict=True):
            getattr(inner, table).update(hooks)


def is_sharded(module: nn.Module) -> bool:
    """Say whether FSDP2 (``fully_shard``) was applied to this very module."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return True
    a, b = a.detach(), b.detach()
    tolerance = 1e-2 if torch.finfo(a.dtype).bits >= 32 and torch.finfo(b.dtype).bits >= 32 else 5e-2
    difference, size = (a.double() - b.double()).norm(), b.double().norm()
    return bool(difference <= tolerance * size) or not bool(size.isfinite())
