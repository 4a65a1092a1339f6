"""Argument checks, and suggestions for misspelled names: one shape for every error message."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def check(caller: str, holds: bool, parameter: str, expected: str, found: object) -> None:
    """Raise an error that names the argument, what is expected and what was given, unless ``holds``.

    A value that does not fit in a short line, such as an optimizer or a list of networks, is shown by its type alone.

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
        raise ValueError(f"{caller}: {parameter} should be {expected}; got {shown}")


def kind_of(value: object) -> str:
    """Return what an unexpected argument is, for an error: the name of its type, or which class it is itself.

    Example:
        >>> kind_of(3), kind_of(int)
        ('int', 'the class int')
    """
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def is_number(value: object) -> bool:
    """Return True for an int or a float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: object, least: float = -math.inf) -> bool:
    """Return True for an int that is at least ``least``, but not for a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def nearest(name: str, existing: Iterable[str]) -> str | None:
    """Return the existing name that is most like ``name``, or ``None`` if none is similar.

    Example:
        >>> nearest("gradnrom", ["equal", "gradnorm"])
        'gradnorm'
    """
    near = difflib.get_close_matches(name, list(existing), n=1)
    return near[0] if near else None


def did_you_mean(name: str, existing: Iterable[str]) -> str:
    """Return the end of an error's sentence: the nearest match of ``name``, or all that exist.

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


def checked_names(
    given: Sequence[str] | Mapping[str, str], *, caller: str, parameter: str = "tasks", least: int = 2
) -> tuple[str, ...]:
    """Return the names of the losses that you gave: a list, or a mapping to the names under which they are logged.

    Raises:
        TypeError: neither a list of names nor a mapping from name to name.
        ValueError: fewer names than ``least``, a name twice, or two names for the same loss.
    """
    if isinstance(given, Mapping):
        check_task_names(list(given.values()), caller=caller, parameter=parameter, least=1)
        return check_task_names(list(given), caller=caller, parameter=parameter, least=least)
    names = check_task_names(given, caller=caller, parameter=parameter, least=least)
    if "loss" in names:
        raise ValueError(
            f"{caller}: {parameter} names 'loss', which is the sum that is back-propagated; it should name the losses in "
            f"this sum. Got {list(names)}"
        )
    return names


def check_task_names(tasks: Sequence[str], *, caller: str, parameter: str = "tasks", least: int = 2) -> tuple[str, ...]:
    """Return the names as a tuple.

    Raises:
        TypeError: not a list of strings.
        ValueError: too few names, or a name twice.
    """
    is_list = isinstance(tasks, Sequence) and not isinstance(tasks, str) and (len(tasks) > 0 or least > 1)
    if not is_list or not all(isinstance(one, str) for one in tasks):
        raise TypeError(
            f"{caller}: {parameter} should be a list of names, such as ['seg', 'depth'], or in a callback a mapping to the "
            f"names under which the losses are logged; got {tasks!r}"
        )
    names = tuple(tasks)
    if len(set(names)) != len(names):
        raise ValueError(f"{caller}: {parameter} should all be different; got {list(names)}")
    if len(names) < least:
        raise ValueError(f"{caller}: {parameter} should name at least two tasks; got {list(names)}")
    return names


def check_by_task(
    given: Mapping[str, Any], tasks: Sequence[str], *, caller: str, parameter: str, may_lack: bool = False
) -> None:
    """Raise ValueError unless the mapping names exactly these tasks, or some of them if it ``may_lack`` others."""
    for name in given:
        if name not in tasks:
            raise ValueError(
                f"{caller}: {parameter} names '{name}', which is not among the tasks {list(tasks)}; "
                f"{did_you_mean(str(name), tasks)}"
            )
    if not may_lack and (missing := [name for name in tasks if name not in given]):
        raise ValueError(f"{caller}: {parameter} should name every task; {missing} are missing")


def check_positive_by_task(numbers: Mapping[str, Any], tasks: Sequence[str], *, caller: str, parameter: str) -> None:
    """Raise ValueError unless the mapping gives exactly these tasks positive, finite numbers."""
    check_by_task(numbers, tasks, caller=caller, parameter=parameter)
    for task, number in numbers.items():
        check(
            caller, is_number(number) and 0 < number < math.inf, f"{parameter}['{task}']", "positive and finite", number
        )
