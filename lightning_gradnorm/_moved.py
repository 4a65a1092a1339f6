"""Old dotted paths of the first edition: saved configurations and checkpoints keep working, with one warning.

A name such as ``lightning_gradnorm.networks.MLP`` or ``lightning_gradnorm.networks.mlp.MLP`` is looked up in the modules
that now hold the content of ``lightning_gradnorm.networks``. Nothing is imported until you use an old path.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = "lightning_gradnorm"
_LOADING = "experiments.loading"
_SMALL, _DENSE, _ENGINES = (f"experiments.problems.{name}" for name in ("small", "dense", "engines"))

NEW_HOMES: dict[str, tuple[str, ...]] = {
    "architecture": ("multitask.architecture",),
    "balancing": ("strategies", f"{_ENGINES}.losses"),
    "callbacks.balancing": ("callbacks.base",),
    "callbacks.monitor": ("monitor",),
    "callbacks.pictures": (f"{_DENSE}.predictions_callback",),
    "callbacks.tensorboard": ("callbacks.dashboard",),
    "cli": (
        "experiments.cli.sharding",
        "experiments.cli.sweep",
        "experiments.callbacks.save_last",
        "experiments.callbacks.save_on_interrupt",
        "experiments.cli.train",
        "experiments.cli.evaluate",
        "experiments.cli.report",
    ),
    "data": (_SMALL, _LOADING, f"{_DENSE}.rooms", f"{_DENSE}.nyuv2", f"{_ENGINES}.cmapss", f"{_ENGINES}.turbofan"),
    "dense_pictures": (f"{_DENSE}.pictures",),
    "dense_targets": (f"{_DENSE}.targets",),
    "dense_tasks": (f"{_DENSE}.tasks",),
    "engine_tasks": (f"{_ENGINES}.tasks",),
    "losses": (f"{_DENSE}.losses",),
    "metrics": (f"{_DENSE}.metrics", f"{_ENGINES}.nasa_score"),
    "module": ("multitask",),
    "networks": (_SMALL, f"{_ENGINES}.network", f"{_DENSE}.networks"),
    "report": ("experiments.report",),
    "tasks": ("multitask", f"{_SMALL}.tasks"),
}
"""Old module → the modules that now hold its names, all relative to this package."""

NEW_NAMES = {
    "balancing": {
        "Balance": "GradNormTerms",
        "Step": "WeightUpdate",
        "balance": "gradnorm_terms",
        "restore": "load_snapshot",
        "state_of": "snapshot",
    },
}
"""Old module → old name → new name, for names that also changed."""

_warned = False


def find_moved(old: str, name: str) -> Any:
    """Return the object that the old module ``old``, relative to this package, called ``name``.

    Raises:
        AttributeError: it had no such name.

    Example:
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     print(find_moved("tasks", "Task"))
        <class 'lightning_gradnorm.multitask.task.Task'>
    """
    global _warned
    new_name = NEW_NAMES.get(old, {}).get(name, name)
    for home in NEW_HOMES[old]:
        module = importlib.import_module(f"{_PACKAGE}.{home}")
        if hasattr(module, new_name):
            if not _warned:
                _warned = True
                warnings.warn(
                    f"{_PACKAGE}.{old}.{name} has moved to {module.__name__}.{new_name}. Old paths stop working in version "
                    f"1.0; this is the only warning about them.",
                    DeprecationWarning,
                    stacklevel=3,
                )
            return getattr(module, new_name)
    raise AttributeError(f"module '{_PACKAGE}.{old}' has moved, and '{name}' is in none of {', '.join(NEW_HOMES[old])}")


class _OldModules(MetaPathFinder, Loader):
    """Makes an empty module for each old path; its names are looked up on access."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if _entry(fullname) else None

    def exec_module(self, module: ModuleType) -> None:
        old = _entry(module.__name__)

        def look_up(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return find_moved(old, name)

        module.__getattr__ = look_up  # type: ignore[method-assign]


def _entry(fullname: str) -> str:
    """Return the entry of `NEW_HOMES` for a full module name, or an empty string."""
    package, _, rest = fullname.partition(".")
    if package != _PACKAGE:
        return ""
    return next((old for old in NEW_HOMES if rest == old or rest.startswith(f"{old}.")), "")


def install() -> None:
    """Make old paths importable."""
    # First, so that a folder left behind by an older version is not mistaken for a namespace package.
    sys.meta_path.insert(0, _OldModules())
