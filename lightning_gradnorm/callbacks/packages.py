"""The two packages that publish Lightning, ``lightning`` and ``pytorch_lightning``. Our callbacks work with both Trainers.

Each package has its own ``Callback`` class, which its Trainer and LightningCLI require. Our callbacks derive from
``lightning``'s. ``pytorch_lightning`` takes seconds to import and may be absent, so its class becomes their second base only
if you import it yourself: before, after or between ours.
"""

from __future__ import annotations

import functools
import sys
from importlib.abc import MetaPathFinder
from typing import Any, TypeVar

import lightning as L

PACKAGES = ("lightning", "pytorch_lightning")
_OTHER = "pytorch_lightning"
_callbacks: list[type[L.Callback]] = []

CallbackClass = TypeVar("CallbackClass", bound=type[L.Callback])


def works_in_both_packages(cls: CallbackClass) -> CallbackClass:
    """Make a direct subclass of ``lightning``'s Callback one of ``pytorch_lightning``'s too. Subclasses inherit it.

    Methods that the class does not define remain ``lightning``'s; the two packages have the same ones.
    """
    _callbacks.append(cls)
    _add_other_base()
    return cls


def _add_other_base() -> None:
    """Add ``pytorch_lightning``'s Callback to the bases, if it has been imported."""
    other = getattr(sys.modules.get(f"{_OTHER}.callbacks.callback"), "Callback", None)
    if other is None:
        return
    for cls in _callbacks:
        if not issubclass(cls, other):
            after = cls.__bases__.index(L.Callback) + 1
            cls.__bases__ = (*cls.__bases__[:after], other, *cls.__bases__[after:])


class _ImportWatcher(MetaPathFinder):
    """Finds no module. Python calls it for each module that ``pytorch_lightning`` imports; one of the first is Callback's."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname.startswith(f"{_OTHER}."):
            _add_other_base()


sys.meta_path.insert(0, _ImportWatcher())


def explain_other_trainer(cls: type[L.LightningModule]) -> None:
    """Make ``pytorch_lightning``'s Trainer name both packages when it refuses a module of this class.

    Its own check for modules of the other package sees classes that Lightning itself defines, but no subclasses. A version
    without that check keeps its own message.
    """
    module: Any = sys.modules.get(f"{_OTHER}.utilities.compile")
    check = getattr(module, "_check_mixed_imports", None)
    if check is None or hasattr(check, "__wrapped__"):
        return

    @functools.wraps(check)
    def check_and_explain(instance: object) -> None:
        if isinstance(instance, cls):
            raise TypeError(
                f"{cls.__name__}: the Trainer should be from the package lightning; got one from {_OTHER}. Use `import "
                f"lightning as L` and L.Trainer."
            )
        check(instance)

    module._check_mixed_imports = check_and_explain


def is_one_of(value: Any, *names: str) -> bool:
    """Return True if ``value`` is an instance of a Lightning class with one of these names, in either package.

    Example:
        >>> is_one_of(L.LightningModule(), "LightningModule")
        True
        >>> is_one_of(L.LightningModule(), "FSDPStrategy", "DeepSpeedStrategy")
        False
    """
    return any(cls.__name__ in names and _is_lightnings(cls) for cls in type(value).__mro__)


def overrides(value: Any, method: str) -> bool:
    """Return True if a user's subclass of a Lightning class, in either package, defines the method.

    Example:
        >>> overrides(L.LightningModule(), "backward")
        False
    """
    return any(method in vars(cls) for cls in type(value).__mro__ if not _is_lightnings(cls) and cls is not object)


def _is_lightnings(cls: type) -> bool:
    return cls.__module__.split(".")[0] in PACKAGES
