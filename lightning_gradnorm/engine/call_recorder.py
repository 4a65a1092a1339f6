"""Records the module calls of one forward pass, for the search for heads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils.parametrize import ParametrizationList

from lightning_gradnorm.engine.compiled import is_compiled
from lightning_gradnorm.engine.module_hooks import supports_hooks, wrap_call
from lightning_gradnorm.gradients.graph import is_transformed, node_of, tensors_with_gradient
from lightning_gradnorm.gradients.loss_graph import ModuleCalls


class CallRecorder:
    """Records where the gradients of each module's inputs and outputs arrive, until it is closed.

    In a call inside a transform of `torch.func`, these are the tensors that the transform has wrapped.

    Modules inside compiled or scripted code are not seen, nor are calls without gradients.

    Args:
        root: the model. Its own calls are not recorded.
        is_active: whether to record a call made now.
    """

    def __init__(self, root: nn.Module, is_active: Callable[[], bool]) -> None:
        self._is_active = is_active
        self._hooks = ExitStack()
        self.start_batch()
        hidden: tuple[str, ...] = ()
        for name, module in root.named_modules():
            if not name or isinstance(module, ParametrizationList) or name.startswith(hidden):
                continue
            if supports_hooks(module):
                before, after = partial(self._before, name, _own_parameters(module)), partial(self._after, name)
                self._hooks.callback(wrap_call(module, before=before, after=after, first=True))
            if is_compiled(module) or not supports_hooks(module):
                hidden = (*hidden, f"{name}.")

    def start_batch(self) -> None:
        """Forget the calls of the last forward pass."""
        self._calls: dict[str, ModuleCalls] = {}
        self._given: dict[str, list[tuple[Tensor, int]]] = {}
        self._transformed: set[str] = set()
        self._without_gradient: set[str] = set()

    @property
    def calls(self) -> list[ModuleCalls]:
        """The calls by module, an outer module before those inside it."""
        return list(self._calls.values())

    @property
    def possible_heads(self) -> list[ModuleCalls]:
        """The modules whose inputs can be replaced by a view: not changed in place later, nor inside a transform."""
        changed = {name for name, given in self._given.items() if any(one._version != known for one, known in given)}
        return [calls for name, calls in self._calls.items() if name not in changed | self._transformed]

    def _before(self, name: str, parameters: frozenset[int], args: Any, kwargs: Any) -> None:
        if not self._is_active():
            return
        if is_transformed():
            self._transformed.add(name)
        given = tensors_with_gradient((args, kwargs))
        self._calls.setdefault(name, ModuleCalls(name, parameters=parameters)).inputs.update(map(node_of, given))
        self._given.setdefault(name, []).extend((tensor, tensor._version) for tensor in given)

    def _after(self, name: str, output: Any) -> None:
        if self._is_active() and name in self._calls:
            found = tensors_with_gradient(output)
            self._calls[name].outputs.update(map(node_of, found))
            if not found and torch.is_grad_enabled():
                self._without_gradient.add(name)

    def frozen_call(self, parameter: str) -> set[Node] | None:
        """Return the nodes where the gradients arrive of all outputs that a frozen parameter, given by name, contributed to.

        None if such outputs exist but carry no gradient. Calls under no_grad have no such outputs.
        """
        module, _, _ = parameter.rpartition(".")
        while module and module not in self._calls:
            module, _, _ = module.rpartition(".")
        if not module:
            return None  # a parameter of the model itself, whose calls are not recorded
        return self._calls[module].outputs or (None if module in self._without_gradient else set())

    def close(self) -> None:
        """Remove all hooks."""
        self._hooks.close()
        self.start_batch()


def _own_parameters(module: nn.Module) -> frozenset[int]:
    """Return the ``id`` of each parameter of the module itself, including those that parametrized ones are computed from."""
    parametrizations = getattr(module, "parametrizations", None)
    inside = parametrizations.parameters() if isinstance(parametrizations, nn.ModuleDict) else ()
    return frozenset(map(id, (*module.parameters(recurse=False), *inside)))
