"""Facts about the strategies without importing them: their kinds, and the list of names for ``--help``."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

SAYS_THE_TASKS = ("n_tasks", "number_of_tasks", "shape", "weights")
"""Required parameters that follow from the number of tasks."""

_KINDS = {
    "GradNorm": "norms",
    "NormWeighting": "norms",
    "Scalarization": "losses",
    "Aggregation": "representation",
}
_HELP = {
    "": ("nothing", "norms"),
    "from the losses": ("losses",),
    "from the gradients at the representation": ("representation",),
    "from the gradients of all shared parameters": ("parameters",),
}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def kind_of(callback: str, at: Any = None) -> str:
    """Return the kind of a strategy, a key of `registry.NEEDS`.

    Args:
        callback: the name of its callback; empty for plain training.
        at: where an aggregation combines the gradients.

    Example:
        >>> kind_of("Aggregation"), kind_of("Aggregation", at="parameters"), kind_of("FixedWeights")
        ('representation', 'parameters', 'nothing')
    """
    return "parameters" if at == "parameters" else _KINDS.get(callback, "nothing")


def kinds(conf: Path) -> dict[str, str]:
    """Return the kinds of the strategies in a folder of configurations, by name."""
    return {file.stem: _kind(file) for file in sorted((conf / "balancing").glob("*.yaml"))}


def _kind(file: Path) -> str:
    content: Any = yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER) or {}
    schema = next((str(one) for one in content.get("defaults", ()) if str(one).endswith("@_here_")), "")
    callback = schema.removesuffix("@_here_") or str(content.get("_target_", ""))
    return kind_of(callback.replace("/", ".").rpartition(".")[2], content.get("at"))


def help_text(conf: Path, *, default: str = "gradnorm", width: int = 112, indent: str = " " * 12) -> str:
    """Return the names of all strategies for ``--help``, grouped by what they need."""
    groups, kind = [], kinds(conf)
    for title, of_title in _HELP.items():
        names = [name for name in kind if kind[name] in of_title and name != default]
        names = [f"{default} (default)", *names] if not title else names
        groups.append(f"{title}: {', '.join(names)}" if title else ", ".join(names))
    text = f"the balancing strategy, see docs/strategies.md: {'; '.join(groups)}"
    return f"\n{indent}".join(textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False))
