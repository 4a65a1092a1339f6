"""Hooks on modules and methods, placed where `torch.compile` does not trace them, each with how to undo it.

A hook on a module inside a compiled one is ignored if it comes after compilation, and outlives its removal if it comes
before. What is compiled as a whole and must be looked into is therefore taken apart for the time of training.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from torch import nn
from torch._dynamo import OptimizedModule

not_traced: Any = torch.compiler.disable
Undo = Callable[[], None]
Before = Callable[[Any, Any], Any]
After = Callable[[Any], Any]


def shadow(owner: Any, name: str, replacement: Any) -> Undo:
    """Put ``replacement`` before the attribute ``name`` of ``owner``, and what was there before back when undone."""
    was_shadowed, before = name in vars(owner), vars(owner).get(name)
    owner.__dict__[name] = replacement

    def undo() -> None:
        if vars(owner).get(name) is not replacement:
            return  # somebody else shadowed it after us, and is to undo that himself
        if was_shadowed:
            owner.__dict__[name] = before
        else:
            del owner.__dict__[name]

    return undo


def around_call(
    module: nn.Module, *, before: Before | None = None, after: After | None = None, first: bool = False
) -> Undo:
    """Have ``before(args, kwargs)`` and ``after(output)`` called with each call of ``module``, outside compiled code.

    They may return other arguments, another output; ``None`` leaves them as they are. ``first`` puts ``before`` in front of
    the pre-hooks that are there.
    """
    compiled = module._compiled_call_impl
    if compiled is not None:  # by module.compile(): registered hooks would be part of what is compiled

        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = (before(args, kwargs) if before else None) or (args, kwargs)
            output = compiled(*args, **kwargs)
            changed = after(output) if after else None
            return output if changed is None else changed

        return shadow(module, "_compiled_call_impl", not_traced(call, recursive=False))
    hooks = ExitStack()
    if before is not None:
        handle = module.register_forward_pre_hook(
            not_traced(lambda _, args, kwargs: before(args, kwargs)), prepend=first, with_kwargs=True
        )
        hooks.callback(handle.remove)
    if after is not None:
        hooks.callback(module.register_forward_hook(not_traced(lambda _, args, output: after(output))).remove)
    return hooks.close


def is_compiled(module: nn.Module) -> bool:
    """Say whether this very module was given to ``torch.compile``."""
    return (
        isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None
        or getattr(module, "_compiler_ctx", None) is not None  # Trainer.fit(torch.compile(lightning_module))
    )


def path_to(root: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Return the modules on the way from ``root`` (named "") to the module or parameter ``name``, itself excluded."""
    parts = name.split(".")
    names = [".".join(parts[:depth]) for depth in range(len(parts))]
    return [(name, root.get_submodule(name)) for name in names]


def open_compiled(root: L.LightningModule, heads: Iterable[str]) -> tuple[Collection[nn.Module], Undo]:
    """Take apart what is compiled as a whole around heads: its own code runs eagerly, its parts are compiled one by one.

    Args:
        root: the LightningModule; it is opened if it is compiled itself, for its losses are to be seen one by one too.
        heads: names of the modules that must be got at.

    Returns:
        The modules that were opened, and how to undo it.

    Raises:
        ValueError: it is not known how a module was compiled.
    """
    undo = ExitStack()
    to_open: dict[nn.Module, Any] = {}
    for name in ["", *heads]:
        compiler = None
        for _, module in path_to(root, name) if name else [("", root)]:
            compiler = compiler or _compiler_of(module)
            if compiler is not None:
                to_open[module] = compiler
    for module, compiler in to_open.items():
        undo.callback(_run_eagerly(module))
        for part in _parts(module, to_open):
            if not is_compiled(part):
                undo.callback(shadow(part, "_compiled_call_impl", compiler(_own_frame(part))))
    return {getattr(module, "_orig_mod", module): None for module in to_open} | to_open, undo.close


def _own_frame(module: nn.Module) -> Callable[..., Any]:
    """Return the call of ``module`` as a function in whose frame torch.compile can begin; it passes by those of torch.nn."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    return call


def _compiler_of(module: nn.Module) -> Any:
    """Return what compiles a function in the way this very module was compiled; ``None`` if it was not."""
    if isinstance(module, OptimizedModule):
        return module.dynamo_ctx
    if module._compiled_call_impl is not None:
        context = inspect.getclosurevars(module._compiled_call_impl).nonlocals.get("self")
        if context is None:
            raise ValueError(
                f"{type(module).__name__} was compiled as a whole in an unknown way; compile the encoder and each head instead."
            )
        return context
    whole = getattr(module, "_compiler_ctx", None)
    return None if whole is None else whole["dynamo_ctx"]


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
    for part in getattr(module, "_orig_mod", module).children():
        if part in opened or not any(True for _ in part.parameters()):
            continue
        if isinstance(part, nn.ModuleList | nn.ModuleDict):  # which are never called
            yield from _parts(part, opened)
        else:
            yield part
