"""Splits compiled modules while training runs, if their heads or their shared layer must be accessible.

A hook on a module inside a compiled one is ignored if it is registered after compilation, and stays in the compiled code if
it was registered before. And a compiled graph cannot be traversed twice. So the modules that contain a head or the shared
layer run eagerly during training, and we compile the modules that they call one by one: those before the shared layer, and the
heads. After the shared layer, on the path of the task gradients, only the heads are compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.utils.parametrize import ParametrizationList

from lightning_gradnorm.engine.layers import path_to
from lightning_gradnorm.engine.module_hooks import Remove, patch_attribute, supports_hooks, wrap_call
from lightning_gradnorm.gradients.replay import is_sharded

Call = Callable[..., Any]
Compiler = Callable[[Call], Call]


def is_compiled(module: nn.Module) -> bool:
    """Return True if this very module was passed to ``torch.compile``."""
    return (
        isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None
        or getattr(module, "_compiler_ctx", None) is not None  # Trainer.fit(torch.compile(lightning_module))
    )


def hides_its_graph(model: nn.Module) -> bool:
    """Return True if a part of the model is compiled or sharded, which hides its autograd graph."""
    return any(is_compiled(module) or is_sharded(module) for module in model.modules())


class UncompiledDuringTraining:
    """Splits wholly compiled modules around the heads and the shared layer, until `close` undoes it.

    Args:
        root: the model; if it is compiled itself, it is split too, so that its losses are accessible one by one.
        heads: names of the modules that must be accessible.
        W: names of the shared layer's parameters; empty if their gradients are not read.

    Raises:
        ValueError: a module was compiled in an unknown way.
    """

    def __init__(self, root: nn.Module, heads: Collection[str], W: Collection[str]) -> None:
        self._course = _ForwardProgress()
        paths: list[list[nn.Module]] = [[root], *(_modules_on_path(root, head) for head in heads)]
        paths_to_W = [_modules_on_path(root, name) for name in W]
        if any(is_sharded(module) or not supports_hooks(module) for path in paths_to_W for module in path):
            paths_to_W = []
        compilers = {module: of_it for path in paths + paths_to_W for module, of_it in _compilers_on(path)}
        self.modules = {one for module in compilers for one in (module, _unwrap(module))}
        """The modules that were split: their own code runs eagerly."""
        around_W = dict.fromkeys(module for path in paths_to_W for module in path[1:] if module in compilers)
        names = {module: name for name, module in root.named_modules()}
        heads_themselves = [root.get_submodule(head) for head in heads]
        with ExitStack() as undo:  # if anything fails, everything placed so far is removed
            for module, compiler in compilers.items():
                undo.callback(_run_eagerly(module))
                if module in around_W and _is_plain_sequence(_unwrap(module)):
                    undo.callback(self._compile_beginning(_unwrap(module), names[_unwrap(module)], compiler))
                    continue
                for part in _parts(_unwrap(module), self.modules):
                    if not is_compiled(part):
                        course = _ForwardProgress() if part in heads_themselves else self._course
                        undo.callback(
                            patch_attribute(
                                part, "_compiled_call_impl", _compiled_child(part, names[part], compiler, course)
                            )
                        )
            # All uses of W are over when a module that contains W returns; the layer itself may be used without being called.
            for module in around_W:
                undo.callback(wrap_call(module, after=self._course.note_passed))
            self._undo = undo.pop_all()

    def _compile_beginning(self, sequence: nn.Module, name: str, compiler: Compiler) -> Remove:
        """Compile the modules that an `nn.Sequential` calls before the first split module, as one graph."""
        assert isinstance(sequence, nn.Sequential)
        parts = list(sequence)
        at = next((place for place, part in enumerate(parts) if part in self.modules), len(parts))
        if not any(map(_has_weights, parts[:at])):
            return ExitStack().close
        return patch_attribute(sequence, "forward", _SplitSequential(sequence, name, at, compiler, self._course))

    def begin_pass(self) -> None:
        """Called before each batch's forward pass."""
        self._course.has_passed_layer = False

    def close(self) -> None:
        """Restore the compiled modules."""
        self._undo.close()


def _modules_on_path(root: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules on the path from ``root`` to a module or parameter, excluding the latter."""
    # A parametrization is called whenever the weight is accessed.
    return [module for _, module in path_to(root, name) if not isinstance(module, ParametrizationList)]


def _compilers_on(path: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, Compiler]]:
    """Yield the modules on an inward path that are compiled, or inside a compiled one, each with its compiler."""
    compiler = None
    for module in path:
        compiler = compiler or _compiler_of(module)
        if compiler is not None:
            yield module, compiler


def _compiler_of(module: nn.Module) -> Compiler | None:
    """Return the compiler that this very module was passed to, or None."""
    if isinstance(module, OptimizedModule):
        return module.dynamo_ctx
    if module._compiled_call_impl is not None:
        context: Compiler | None = inspect.getclosurevars(module._compiled_call_impl).nonlocals.get("self")
        if context is None:
            raise ValueError(
                f"{type(module).__name__} was compiled as a whole in an unknown way; compile the encoder and each head instead."
            )
        return context
    whole = getattr(module, "_compiler_ctx", None)
    return None if whole is None else whole["dynamo_ctx"]


def _unwrap(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)


def _run_eagerly(module: nn.Module) -> Remove:
    undo = ExitStack()
    if isinstance(module, OptimizedModule):
        undo.callback(patch_attribute(module, "forward", module._orig_mod))
    if _unwrap(module)._compiled_call_impl is not None:
        undo.callback(patch_attribute(_unwrap(module), "_compiled_call_impl", None))
    whole = getattr(module, "_compiler_ctx", None)
    if whole is not None:
        for name in ("training_step", "forward"):
            method = whole[f"original_{name}"]
            while hasattr(method, "_torchdynamo_orig_callable"):  # Lightning wraps it again in each fit
                method = method._torchdynamo_orig_callable
            undo.callback(patch_attribute(module, name, method))
    return undo.close


def _parts(module: nn.Module, opened: Collection[nn.Module]) -> Iterator[nn.Module]:
    """Yield the submodules that ``module`` calls and that have weights, except those that are split themselves."""
    for part in module.children():
        if isinstance(part, nn.ModuleList | nn.ModuleDict):  # never called themselves
            yield from _parts(part, opened)
        elif part not in opened and _has_weights(part) and not isinstance(part, ParametrizationList):
            yield part


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


@dataclass
class _ForwardProgress:
    """Whether the forward pass of a training batch has passed the shared layer."""

    has_passed_layer: bool = False

    def note_passed(self, output: Any) -> None:
        """Called when the shared layer has been used."""
        self.has_passed_layer = self.has_passed_layer or torch.is_grad_enabled()

    def runs_eagerly(self) -> bool:
        """Return True if a gradient on its path from a head to W may pass the module called now."""
        return self.has_passed_layer and torch.is_grad_enabled()


def _is_plain_sequence(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and "forward" not in vars(module)


class _SplitSequential:
    """The forward method of an `nn.Sequential` whose first modules are compiled together."""

    def __init__(
        self, sequence: nn.Sequential, name: str, at: int, compiler: Compiler, course: _ForwardProgress
    ) -> None:
        def beginning(value: Any) -> Any:
            for module in list(sequence)[:at]:
                value = module(value)
            return value

        self._sequence = sequence
        self._at = at
        self._beginning = _before_layer(beginning, sequence, name, compiler, course)

    def __call__(self, input: Any) -> Any:
        value = self._beginning(input)
        for module in list(self._sequence)[self._at :]:
            value = module(value)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._sequence, "forward")  # a copy is not split: it gets the method of its class


def _compiled_child(module: nn.Module, name: str, compiler: Compiler, course: _ForwardProgress) -> Call:
    """Return the call of a submodule of a split module."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    return _before_layer(call, module, name, compiler, course)


def _before_layer(function: Call, module: nn.Module, name: str, compiler: Compiler, course: _ForwardProgress) -> Call:
    """Return ``function``, a call in ``module``: compiled, unless the shared layer has been used before the call."""
    compiled = compiler(_with_own_code_object(function, module, name))

    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if course.runs_eagerly() else compiled)(*args, **kwargs)

    return call


_codes: WeakKeyDictionary[nn.Module, dict[CodeType, CodeType]] = WeakKeyDictionary()


def _with_own_code_object(function: Any, module: nn.Module, name: str) -> Call:
    """Return ``function`` with its own code object, with its own name, for this purpose and module.

    torch.compile starts in a function's frame, because it skips frames of torch.nn. It keeps eight versions of a code object:
    if all modules shared one, a ninth would run eagerly. And when a shape changes under the same name, it compiles for all
    shapes, which is slower.
    """
    named = f"{function.__name__}_{name.replace('.', '_')}"
    code = _codes.setdefault(module, {}).setdefault(function.__code__, function.__code__.replace(co_name=named))
    return FunctionType(code, function.__globals__, named, None, function.__closure__)
