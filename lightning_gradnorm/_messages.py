"""Argument checks, and suggestions for misspelt names: one shape for every error message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def check(owner: str, holds: bool, parameter: str, expected: str, found: object) -> None:
    """Raise an error that names the argument, what is expected and what was given, unless ``holds``.

    What takes more than a short line to show, an optimizer or a list of networks, is shown by its type alone.

    Raises:
        ValueError: the condition does not hold.

    Example:
        >>> check("GradNorm", False, "alpha", "finite and at least 0", -1)
        Traceback (most recent call last):
        ValueError: GradNorm: alpha should be finite and at least 0; got -1
    """
    if not holds:
        shown = repr(found)
        if len(shown) > 100 or "\n" in shown:
            shown = f"{type(found).__name__}(…)"
        raise ValueError(f"{owner}: {parameter} should be {expected}; got {shown}")


def is_number(value: object) -> bool:
    """Say whether the value is an int or a float; ``True`` is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: object) -> bool:
    """Say whether the value is an int; ``True`` is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def nearest(name: str, existing: Iterable[str]) -> str | None:
    """Return the existing name that is most like ``name``, or ``None`` if none is.

    Example:
        >>> nearest("gradnrom", ["equal", "gradnorm"])
        'gradnorm'
    """
    near = difflib.get_close_matches(name, list(existing), n=1)
    return near[0] if near else None


def did_you_mean(name: str, existing: Iterable[str]) -> str:
    """Return the end of an error's sentence: the near match of ``name``, or all that exists.

    Example:
        >>> did_you_mean("encoder.layr4", ["encoder.layer4", "head"])
        "did you mean 'encoder.layer4'?"
        >>> did_you_mean("trunk", ["encoder", "head"])
        "it has 'encoder', 'head'"
    """
    existing = list(existing)
    near = nearest(name, existing)
    if near is not None:
        return f"did you mean '{near}'?"
    shown = ", ".join(f"'{one}'" for one in existing[:20]) + (", …" if len(existing) > 20 else "")
    return f"it has {shown or 'none'}"
