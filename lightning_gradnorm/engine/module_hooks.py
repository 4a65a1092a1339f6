"""Hooks on modules and methods, placed where `torch.compile` does not trace them, each with how to undo it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

not_traced: Any = torch.compiler.disable
Undo = Callable[[], None]
Before = Callable[[Any, Any], Any]
After = Callable[[Any], Any]


@dataclass(eq=False)
class _Shadow:
    """What stands before an attribute, and what stood there when it came: another shadow, or the owner's own value."""

    replacement: Any
    below: _Shadow | None
    own: dict[str, Any]
    undone: bool = False


_shadows: WeakKeyDictionary[Any, dict[str, _Shadow]] = WeakKeyDictionary()
"""Owner → attribute → the uppermost shadow."""


def shadow(owner: Any, name: str, replacement: Any) -> Undo:
    """Put ``replacement`` before the attribute ``name`` of ``owner``, and what was there before back when undone.

    Shadows of several owners of their own may be undone in any order: one that lies below others goes when they do.
    """
    of_owner = _shadows.setdefault(owner, {})
    top = of_owner.get(name)
    is_top = top is not None and vars(owner).get(name) is top.replacement
    own = {name: vars(owner)[name]} if not is_top and name in vars(owner) else {}
    mine = of_owner[name] = _Shadow(replacement, top if is_top else None, own)
    owner.__dict__[name] = replacement

    def undo() -> None:
        mine.undone = True
        now = _shadows.get(owner, {}).get(name)
        while now is not None and now.undone and vars(owner).get(name) is now.replacement:
            if now.below is not None:
                owner.__dict__[name] = now.below.replacement
            else:
                del owner.__dict__[name]
                owner.__dict__.update(now.own)
            now = now.below
        # Else somebody who does not use this function shadowed it after us, and is to undo that himself.
        if now is None:
            _shadows.get(owner, {}).pop(name, None)
        else:
            _shadows[owner][name] = now

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
    hooks = ExitStack()
    if before is not None:
        handle = module.register_forward_pre_hook(_Hook(module, before), prepend=first, with_kwargs=True)
        hooks.callback(handle.remove)
    if after is not None:
        handle = module.register_forward_hook(_Hook(module, lambda args, output: after(output)))
        hooks.callback(handle.remove)
    return hooks.close


class _Hook:
    """Calls ``call`` for one module. A copy of the module, of a teacher say, or a pickled one, has a hook of no effect."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.module = module
        self.call = call

    @not_traced  # type: ignore[untyped-decorator]
    def __call__(self, called: nn.Module, *args: Any) -> Any:
        return self.call(*args) if called is self.module else None

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    return
