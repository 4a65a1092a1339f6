"""Hooks on modules and methods, placed where `torch.compile` does not trace them, each with how to undo it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

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


def takes_hooks(module: nn.Module) -> bool:
    """Say whether hooks can be registered on ``module``: what `torch.jit.script` has made takes none."""
    return not isinstance(module, torch.jit.RecursiveScriptModule)  # type: ignore[attr-defined]


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
    # A copy of the module, of a teacher say, has the hooks too, and calls them: that is none of our business.
    hooks = ExitStack()
    if before is not None:
        handle = module.register_forward_pre_hook(
            not_traced(lambda called, args, kwargs: before(args, kwargs) if called is module else None),
            prepend=first,
            with_kwargs=True,
        )
        hooks.callback(handle.remove)
    if after is not None:
        handle = module.register_forward_hook(
            not_traced(lambda called, args, output: after(output) if called is module else None)
        )
        hooks.callback(handle.remove)
    return hooks.close
