"""What `torch.compile` was given as a whole, taken apart for the time of training where it must be looked into.

A hook on a module inside a compiled one is ignored if it comes after compilation, and outlives its removal if it comes
before. So the code around the heads runs eagerly while we train, and its parts are compiled one by one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import lightning as L
from torch import nn
from torch._dynamo import OptimizedModule

from lightning_gradnorm.callbacks.hooks import Undo, shadow
from lightning_gradnorm.callbacks.naming import path_to


def is_compiled(module: nn.Module) -> bool:
    """Say whether this very module was given to ``torch.compile``."""
    return (
        isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None
        or getattr(module, "_compiler_ctx", None) is not None  # Trainer.fit(torch.compile(lightning_module))
    )


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
        for _, module in path_to(root, name):
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
