"""The two packages that Lightning is published in, ``lightning`` and ``pytorch_lightning``: our callbacks work in both.

Each has a ``Callback`` class of its own, and its Trainer accepts no other. We derive from ``lightning``'s. Importing the other
package costs seconds, so its class becomes a second base of our callbacks when, and only if, somebody else imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import lightning as L

PACKAGES = ("lightning", "pytorch_lightning")
_OTHER = "pytorch_lightning"
_classes: list[type[L.Callback]] = []

CallbackClass = TypeVar("CallbackClass", bound=type[L.Callback])


def works_in_both_packages(cls: CallbackClass) -> CallbackClass:
    """Decorate a class that derives from ``lightning``'s Callback directly: it also becomes one of ``pytorch_lightning``."""
    _classes.append(cls)
    _add_other_base()
    return cls


def _add_other_base() -> None:
    module = sys.modules.get(f"{_OTHER}.callbacks.callback")
    other = getattr(module, "Callback", None)
    if other is None:
        return
    for cls in _classes:
        if not issubclass(cls, other):
            at = cls.__bases__.index(L.Callback) + 1
            cls.__bases__ = (*cls.__bases__[:at], other, *cls.__bases__[at:])


class _ImportWatcher(MetaPathFinder):
    """Finds nothing. Sees that ``pytorch_lightning`` is being imported, and that its Callback class exists by now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(f"{_OTHER}."):
            _add_other_base()
        return None


sys.meta_path.insert(0, _ImportWatcher())


def is_one_of(value: Any, *names: str) -> bool:
    """Return True if ``value`` is an instance of a Lightning class with one of these names, in either package.

    Example:
        >>> is_one_of(L.LightningModule(), "LightningModule")
        True
        >>> is_one_of(L.LightningModule(), "FSDPStrategy", "DeepSpeedStrategy")
        False
    """
    return any(cls.__name__ in names and is_lightnings(cls) for cls in type(value).__mro__)


def is_lightnings(cls: type) -> bool:
    """Return True if a class comes from either package."""
    return cls.__module__.split(".")[0] in PACKAGES


def overrides(value: Any, method: str) -> bool:
    """Return True if a user's subclass of a Lightning class, in either package, defines the method.

    Example:
        >>> overrides(L.LightningModule(), "backward")
        False
    """
    return any(method in vars(cls) for cls in type(value).__mro__ if not is_lightnings(cls) and cls is not object)
