"""Hooks on modules and methods that `torch.compile` does not trace, each with a function that removes it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

not_traced: Any = torch.compiler.disable
Remove = Callable[[], None]
Before = Callable[[Any, Any], Any]
After = Callable[[Any], Any]


@dataclass(eq=False)
class _Patch:
    """A replaced attribute, and what it replaced: another patch, or the owner's own value."""

    replacement: Any
    below: _Patch | None
    own: dict[str, Any]
    undone: bool = False


_patches: WeakKeyDictionary[Any, dict[str, _Patch]] = WeakKeyDictionary()
"""Owner → attribute → the topmost patch."""


def patch_attribute(owner: Any, name: str, replacement: Any) -> Remove:
    """Replace the attribute ``name`` of ``owner``; return a function that restores it.

    You may undo patches of the same attribute in any order: a patch below others disappears with them.
    """
    of_owner = _patches.setdefault(owner, {})
    top = of_owner.get(name)
    is_top = top is not None and vars(owner).get(name) is top.replacement
    own = {name: vars(owner)[name]} if not is_top and name in vars(owner) else {}
    mine = of_owner[name] = _Patch(replacement, top if is_top else None, own)
    owner.__dict__[name] = replacement

    def undo() -> None:
        mine.undone = True
        now = _patches.get(owner, {}).get(name)
        while now is not None and now.undone and vars(owner).get(name) is now.replacement:
            if now.below is not None:
                owner.__dict__[name] = now.below.replacement
            else:
                del owner.__dict__[name]
                owner.__dict__.update(now.own)
            now = now.below
        # Otherwise other code has replaced the attribute after us, and must restore it.
        if now is None:
            _patches.get(owner, {}).pop(name, None)
        else:
            _patches[owner][name] = now

    return undo


class ReplacedMethod:
    """A function in place of a method. A copy or a pickle of its owner gets the class's own method again.

    A plain function would stay bound to the original: a copy would run the original's step, and train nothing.

    Args:
        owner: the object with the method.
        name: of the method.
        function: replaces the method.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self._owner, self._name, self._function = owner, name, function
        functools.update_wrapper(self, function)
        self.__wrapped__ = inspect.unwrap(function)  # Lightning looks behind one wrapper for the parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner, self._name)


def supports_hooks(module: nn.Module) -> bool:
    """Return True if hooks can be registered on ``module``; modules from `torch.jit.script` do not allow them."""
    return not isinstance(module, torch.jit.RecursiveScriptModule)  # type: ignore[attr-defined]


def wrap_call(
    module: nn.Module, *, before: Before | None = None, after: After | None = None, first: bool = False
) -> Remove:
    """Call ``before(args, kwargs)`` and ``after(output)`` around each call of ``module``, outside compiled code.

    They may return other arguments or another output; ``None`` leaves them as they are. ``first`` puts ``before`` in front
    of existing pre-hooks.
    """
    compiled = module._compiled_call_impl
    if compiled is not None:  # by module.compile(): registered hooks would be compiled with the module

        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = (before(args, kwargs) if before else None) or (args, kwargs)
            output = compiled(*args, **kwargs)
            changed = after(output) if after else None
            return output if changed is None else changed

        return patch_attribute(module, "_compiled_call_impl", not_traced(call, recursive=False))
    hooks = ExitStack()
    if before is not None:
        handle = module.register_forward_pre_hook(_Hook(module, before), prepend=first, with_kwargs=True)
        hooks.callback(handle.remove)
    if after is not None:
        handle = module.register_forward_hook(_Hook(module, lambda args, output: after(output)))
        hooks.callback(handle.remove)
    return hooks.close


class _Hook:
    """Calls ``call`` for one module. In a copy of the module (such as a teacher) or a pickled one, the hook does nothing."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.module = module
        self.call = call

    def __call__(self, called: nn.Module, *args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._call_untraced(called, *args)
        return self.call(*args) if called is self.module else None

    _call_untraced = not_traced(__call__)  # costs some microseconds, so eager code does without

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    return
