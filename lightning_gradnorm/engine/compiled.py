"""What `torch.compile` was given as a whole, taken apart for the time of training where it must be looked into.

A hook on a module inside a compiled one is ignored if it comes after compilation, and outlives its removal if it comes
before; and a compiled graph cannot be walked twice. So what stands around the heads and around the shared layer runs
eagerly while we train, and the modules that it calls are compiled one by one: those before the shared layer, and the
heads. Behind the shared layer, where each task's gradient is followed, a training step compiles nothing but the heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.utils.parametrize import ParametrizationList

from lightning_gradnorm.engine.layers import path_to
from lightning_gradnorm.engine.module_hooks import Undo, around_call, shadow, takes_hooks
from lightning_gradnorm.gradients.replay import is_sharded

Call = Callable[..., Any]
Compiler = Callable[[Call], Call]


def is_compiled(module: nn.Module) -> bool:
    """Say whether this very module was given to ``torch.compile``."""
    return (
        isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None
        or getattr(module, "_compiler_ctx", None) is not None  # Trainer.fit(torch.compile(lightning_module))
    )


class OpenedCode:
    """Takes apart what is compiled as a whole around heads and the shared layer, until `close` undoes it.

    Args:
        root: the LightningModule; it is opened if it is compiled itself, for its losses are to be seen one by one too.
        heads: names of the modules that must be got at.
        W: names of the shared layer's parameters; empty if their gradients are not asked for.

    Raises:
        ValueError: it is not known how a module was compiled.
    """

    def __init__(self, root: L.LightningModule, heads: Collection[str], W: Collection[str]) -> None:
        self._course = _Course()
        ways: list[list[nn.Module]] = [[root], *(_way_to(root, head) for head in heads)]
        ways_to_W = [_way_to(root, name) for name in W]
        if any(is_sharded(module) or not takes_hooks(module) for way in ways_to_W for module in way):
            ways_to_W = []
        compilers = {module: of_it for way in ways + ways_to_W for module, of_it in _compilers_on(way)}
        self.modules = {one for module in compilers for one in (module, _bare(module))}
        """Those that were opened: their own code runs eagerly."""
        around_W = dict.fromkeys(module for way in ways_to_W for module in way[1:] if module in compilers)
        names = {module: name for name, module in root.named_modules()}
        heads_themselves = [root.get_submodule(head) for head in heads]
        with ExitStack() as undo:  # if anything fails on the way, what was placed is taken away again
            for module, compiler in compilers.items():
                undo.callback(_run_eagerly(module))
                if module in around_W and _is_plain_sequence(_bare(module)):
                    undo.callback(self._compile_beginning(_bare(module), names[_bare(module)], compiler))
                    continue
                for part in _parts(_bare(module), self.modules):
                    if not is_compiled(part):
                        course = _Course() if part in heads_themselves else self._course
                        undo.callback(shadow(part, "_compiled_call_impl", _part(part, names[part], compiler, course)))
            # Whatever uses W is over when a module that contains W returns; the layer itself may be used without being called.
            for module in around_W:
                undo.callback(around_call(module, after=self._course.note_passed))
            self._undo = undo.pop_all()

    def _compile_beginning(self, sequence: nn.Module, name: str, compiler: Compiler) -> Undo:
        """Compile what an `nn.Sequential` calls before the first module that was opened, all together."""
        assert isinstance(sequence, nn.Sequential)
        parts = list(sequence)
        at = next((place for place, part in enumerate(parts) if part in self.modules), len(parts))
        if not any(map(_has_weights, parts[:at])):
            return ExitStack().close
        return shadow(sequence, "forward", _InTwo(sequence, name, at, compiler, self._course))

    def begin_pass(self) -> None:
        """Take note that the next batch's forward pass begins."""
        self._course.has_passed_layer = False

    def close(self) -> None:
        """Put everything together again."""
        self._undo.close()


def _way_to(root: L.LightningModule, name: str) -> list[nn.Module]:
    """Return the modules on the way from ``root`` to a module or parameter, itself excluded."""
    # A parametrization is called whenever somebody looks at the weight.
    return [module for _, module in path_to(root, name) if not isinstance(module, ParametrizationList)]


def _compilers_on(way: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, Compiler]]:
    """Yield, of the modules on a way inwards, those that are compiled or within one that is, with what compiled it."""
    compiler = None
    for module in way:
        compiler = compiler or _compiler_of(module)
        if compiler is not None:
            yield module, compiler


def _compiler_of(module: nn.Module) -> Compiler | None:
    """Return what compiles a function in the way this very module was compiled; ``None`` if it was not."""
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


def _bare(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)


def _run_eagerly(module: nn.Module) -> Undo:
    undo = ExitStack()
    if isinstance(module, OptimizedModule):
        undo.callback(shadow(module, "forward", module._orig_mod))
    if _bare(module)._compiled_call_impl is not None:
        undo.callback(shadow(_bare(module), "_compiled_call_impl", None))
    whole = getattr(module, "_compiler_ctx", None)
    if whole is not None:
        for name in ("training_step", "forward"):
            method = whole[f"original_{name}"]
            while hasattr(method, "_torchdynamo_orig_callable"):  # Lightning wraps it anew with each fit
                method = method._torchdynamo_orig_callable
            undo.callback(shadow(module, name, method))
    return undo.close


def _parts(module: nn.Module, opened: Collection[nn.Module]) -> Iterator[nn.Module]:
    """Yield what ``module`` calls and has weights, but for the modules that are opened themselves."""
    for part in module.children():
        if isinstance(part, nn.ModuleList | nn.ModuleDict):  # which are never called
            yield from _parts(part, opened)
        elif part not in opened and _has_weights(part) and not isinstance(part, ParametrizationList):
            yield part


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


@dataclass
class _Course:
    """How far the forward pass of a training batch has come."""

    has_passed_layer: bool = False

    def note_passed(self, output: Any) -> None:
        """Take note that the shared layer has been used."""
        self.has_passed_layer = self.has_passed_layer or torch.is_grad_enabled()

    def runs_eagerly(self) -> bool:
        """Say whether a gradient that is followed from a head to W may pass what is called now."""
        return self.has_passed_layer and torch.is_grad_enabled()


def _is_plain_sequence(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and "forward" not in vars(module)


class _InTwo:
    """The forward of an `nn.Sequential` whose first modules are compiled together."""

    def __init__(self, sequence: nn.Sequential, name: str, at: int, compiler: Compiler, course: _Course) -> None:
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
        return getattr, (self._sequence, "forward")  # of a copy, which is not taken apart: that of its class


def _part(module: nn.Module, name: str, compiler: Compiler, course: _Course) -> Call:
    """Return the call of a part of what was opened."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    return _before_layer(call, module, name, compiler, course)


def _before_layer(function: Call, module: nn.Module, name: str, compiler: Compiler, course: _Course) -> Call:
    """Return ``function``, a call in ``module``: compiled, unless the shared layer has been used before it."""
    compiled = compiler(_of_its_own(function, module, name))

    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if course.runs_eagerly() else compiled)(*args, **kwargs)

    return call


_codes: WeakKeyDictionary[nn.Module, dict[CodeType, CodeType]] = WeakKeyDictionary()


def _of_its_own(function: Any, module: nn.Module, name: str) -> Call:
    """Return ``function`` with a code object, and a name of it, that it shares only with others of its purpose and module.

    torch.compile begins in a function's frame, for it passes by those of torch.nn. It keeps eight versions of a code: of
    one for all modules a ninth would run eagerly. And what has another shape than before under the same name it compiles
    for all shapes, which is slower.
    """
    named = f"{function.__name__}_{name.replace('.', '_')}"
    code = _codes.setdefault(module, {}).setdefault(function.__code__, function.__code__.replace(co_name=named))
    return FunctionType(code, function.__globals__, named, None, function.__closure__)
