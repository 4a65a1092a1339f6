"""The tasks' names as a user gives them, and everything else he gives by task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_gradnorm._messages import did_you_mean, is_number


def checked_names(tasks: Sequence[str] | Mapping[str, str], *, caller: str) -> tuple[str, ...]:
    """Return the names of at least two different tasks.

    Raises:
        TypeError: not a list of names or a mapping from name to name.
        ValueError: fewer than two, or one twice.
    """
    is_list = isinstance(tasks, Sequence | Mapping) and not isinstance(tasks, str)
    flat = [*tasks, *tasks.values()] if isinstance(tasks, Mapping) else tasks
    if not is_list or not all(isinstance(one, str) for one in flat):
        raise TypeError(
            f"{caller}: tasks should be a list of names, such as ['seg', 'depth'], or a mapping from task to the "
            f"name under which its loss is logged; got {tasks!r}"
        )
    if isinstance(tasks, Mapping) and len(set(tasks.values())) != len(tasks):
        raise ValueError(f"{caller}: tasks should have different losses; got {dict(tasks)}")
    names = tuple(tasks)
    if "loss" in names and not isinstance(tasks, Mapping):
        raise ValueError(
            f"{caller}: tasks names 'loss', which is what is back-propagated, the sum of all; it should name the losses "
            f"that are added up in it. Got {list(names)}"
        )
    if len(set(names)) != len(names):
        raise ValueError(f"{caller}: tasks should all be different; got {list(names)}")
    if len(names) < 2:
        raise ValueError(
            f"{caller}: tasks should be at least two, for there is nothing to balance; got {list(names)}"
        )
    return names


def check_by_task(numbers: Mapping[str, Any], tasks: Sequence[str], *, caller: str, parameter: str) -> None:
    """Refuse a mapping that does not name the very tasks there are."""
    unknown = [name for name in numbers if name not in tasks]
    missing = [name for name in tasks if name not in numbers]
    if unknown:
        raise ValueError(
            f"{caller}: {parameter} names '{unknown[0]}', which is not among the tasks "
            f"{list(tasks)}; {did_you_mean(unknown[0], tasks)}"
        )
    if missing:
        raise ValueError(f"{caller}: {parameter} should name every task; {missing} are missing")


def check_positive_by_task(numbers: Mapping[str, Any], tasks: Sequence[str], *, caller: str, parameter: str) -> None:
    """Refuse a mapping that does not give each of the tasks a positive number."""
    check_by_task(numbers, tasks, caller=caller, parameter=parameter)
    for task, number in numbers.items():
        if not (is_number(number) and math.isfinite(number) and number > 0):
            raise ValueError(f"{caller}: {parameter}['{task}'] should be positive and finite; got {number!r}")
