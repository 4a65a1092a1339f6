"""What `torch.compile` was given as a whole, taken apart for the time of training where it must be looked into.

A hook on a module inside a compiled one is ignored if it comes after compilation, and outlives its removal if it comes
before; and a compiled graph cannot be walked twice. So what stands around the heads and around the shared layer runs
eagerly while we train, and its parts are compiled one by one: what comes before the shared layer, and the heads. From
the shared layer to the heads, where each task's gradient is followed, nothing is compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import lightning as L
from torch import nn
from torch._dynamo import OptimizedModule

from lightning_gradnorm.callbacks.hooks import Undo, around_call, shadow, takes_hooks
from lightning_gradnorm.callbacks.naming import modules_around, path_to
from lightning_gradnorm.gradients.replay import is_sharded

Call = Callable[..., Any]
Compiler = Callable[[Call], Call]
CompilePart = Callable[[Call, nn.Module], Call]


def is_compiled(module: nn.Module) -> bool:
    """Say whether this very module was given to ``torch.compile``."""
    return (
        isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None
        or getattr(module, "_compiler_ctx", None) is not None  # Trainer.fit(torch.compile(lightning_module))
    )


def open_compiled(
    root: L.LightningModule, heads: Collection[str], W: Collection[str]
) -> tuple[Collection[nn.Module], Undo]:
    """Take apart what is compiled as a whole around heads and the shared layer.

    Args:
        root: the LightningModule; it is opened if it is compiled itself, for its losses are to be seen one by one too.
        heads: names of the modules that must be got at.
        W: names of the shared layer's parameters; empty if their gradients are not asked for.

    Returns:
        The modules that were opened, whose own code runs eagerly, and how to undo it.

    Raises:
        ValueError: it is not known how a module was compiled.
    """
    undo = ExitStack()
    way_to_W = _way_to_layer(root, W)
    to_open = _with_compilers([root]) | _with_compilers(way_to_W)
    for head in heads:
        to_open |= _with_compilers([module for _, module in path_to(root, head)])
    heads_themselves = [root.get_submodule(head) for head in heads]
    course, frames = _Course(), _Frames()
    if way_to_W and way_to_W[-1] in to_open:
        undo.callback(around_call(way_to_W[-1], before=course.reach))
    for module, compiler in to_open.items():
        undo.callback(_run_eagerly(module))
        if way_to_W and module is way_to_W[-1]:
            continue
        bare = _bare(module)
        if module in way_to_W and _is_plain_sequence(bare):
            undo.callback(_compile_beginning(bare, to_open, partial(frames.compiled, compiler)))
            continue
        for part in _parts(bare, to_open):
            if not is_compiled(part):
                compiled = partial(frames.compiled, compiler)
                call = _Part(part, compiled, _Course() if part in heads_themselves else course)
                undo.callback(shadow(part, "_compiled_call_impl", call))
    return {_bare(module) for module in to_open} | set(to_open), undo.close


def _way_to_layer(root: L.LightningModule, W: Collection[str]) -> list[nn.Module]:
    """Return the modules from ``root`` to the innermost that contains all of ``W``; none if they are to be left alone."""
    way = [root, *(module for _, module in modules_around(root, W))]
    is_left_alone = any(is_sharded(module) or not takes_hooks(module) for module in way)
    return [] if len(way) == 1 or is_left_alone else way


def _with_compilers(way: Sequence[nn.Module]) -> dict[nn.Module, Compiler]:
    """Return, of the modules on a way inwards, those that are compiled or within one that is, with what compiled it."""
    found: dict[nn.Module, Compiler] = {}
    compiler = None
    for module in way:
        compiler = compiler or _compiler_of(module)
        if compiler is not None:
            found[module] = compiler
    return found


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
    if module._compiled_call_impl is not None:
        undo.callback(shadow(module, "_compiled_call_impl", None))
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
        elif part not in opened and _has_weights(part):
            yield part


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


@dataclass
class _Course:
    """How far the first forward pass has come."""

    reached: bool = False
    """Whether the shared layer has been called."""

    def reach(self, args: Any, kwargs: Any) -> None:
        self.reached = True


class _Frames:
    """Gives torch.compile functions in whose frame it can begin, for it passes by those of torch.nn.

    Of one code object it keeps eight versions, and runs a ninth eagerly. So modules that are not alike get one each.
    """

    def __init__(self) -> None:
        self._codes: dict[Hashable, CodeType] = {}

    def compiled(self, compiler: Compiler, function: Call, module: nn.Module) -> Call:
        """Return ``function``, which calls what ``module`` consists of, compiled."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        likeness = type(module), *(parameter.shape for parameter in module.parameters())
        code = self._codes.setdefault(likeness, call.__code__.replace())
        return compiler(FunctionType(code, call.__globals__, call.__name__, None, call.__closure__))


class _Part:
    """The call of a part of what was opened: compiled, unless the shared layer is called before it."""

    def __init__(self, module: nn.Module, compiled: CompilePart, course: _Course) -> None:
        self._module = module
        self._compiled = compiled
        self._course = course
        self._call: Call | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._call is None:
            eager: Call = self._module._call_impl
            self._call = eager if self._course.reached else self._compiled(eager, self._module)
        return self._call(*args, **kwargs)


def _is_plain_sequence(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and "forward" not in vars(module)


def _compile_beginning(sequence: nn.Module, opened: Collection[nn.Module], compiled: CompilePart) -> Undo:
    """Compile what an `nn.Sequential` calls before the first module that was opened, all together."""
    assert isinstance(sequence, nn.Sequential)
    parts = list(sequence)
    at = next(place for place, part in enumerate(parts) if part in opened)
    if not any(map(_has_weights, parts[:at])):
        return ExitStack().close
    return shadow(sequence, "forward", _InTwo(sequence, at, compiled))


class _InTwo:
    """The forward of an `nn.Sequential` whose first modules are compiled together."""

    def __init__(self, sequence: nn.Sequential, at: int, compiled: CompilePart) -> None:
        self._sequence = sequence
        self._at = at
        self._beginning = compiled(partial(_run, sequence, slice(at)), sequence)

    def __call__(self, input: Any) -> Any:
        return _run(self._sequence, slice(self._at, None), self._beginning(input))

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (nn.Sequential.forward, self._sequence)  # of a copy, which is not taken apart


def _run(sequence: nn.Sequential, stretch: slice, input: Any) -> Any:
    for module in list(sequence)[stretch]:
        input = module(input)
    return input
