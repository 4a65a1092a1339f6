"""What a constructor asks of its arguments, and the one sentence it says if an argument is another."""

from __future__ import annotations


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
