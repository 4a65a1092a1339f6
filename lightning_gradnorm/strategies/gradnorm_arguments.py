"""GradNorm's error messages: about arguments, for the rule and the callbacks that pass them on, and about unusable numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_gradnorm._messages import check, check_positive_by_task, is_integer, is_number


def check_arguments(caller: str, tasks: Sequence[str] | None, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument of `GradNormRule` out of range, in the name of ``caller``.

    ``options`` holds all arguments by name. While ``tasks`` is ``None``, because the tasks are not known yet, the names in
    mappings are not checked.

    Example:
        >>> check_arguments("GradNorm", None, {"alpha": -1})
        Traceback (most recent call last):
        ValueError: GradNorm: alpha should be a finite number, at least 0; got -1
    """
    for parameter, value in options.items():
        if parameter in _BY_TASK:
            _check_numbers(caller, tasks, parameter, value)
        else:
            is_right, expected = _CHECKS[parameter]
            check(caller, is_right(value), parameter, expected, value)


_BY_TASK = ("initial_losses", "initial_weights", "priorities")
_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "alpha": (lambda one: is_number(one) and 0 <= one < math.inf, "a finite number, at least 0"),
    "optimizer": (callable, "a callable such as partial(torch.optim.Adam, lr=0.025)"),
    "min_weight": (lambda one: is_number(one) and 0 < one < 1, "a number between 0 and 1"),
    "update_every": (lambda one: is_integer(one, least=1), "an integer, at least 1"),
    "stop_after": (lambda one: one is None or is_integer(one, least=0), "None or an integer, at least 0"),
    "absent_tasks": (lambda one: one in ("leave_out", "last_seen"), "'leave_out' or 'last_seen'"),
    "weight_space": (lambda one: one in ("linear", "log"), "'linear' or 'log'"),
    "smoothing": (lambda one: is_number(one) and 0 <= one < 1, "a number from 0 to below 1"),
    "resume_options": (lambda one: one in ("checkpoint", "given"), "'checkpoint' or 'given'"),
}


def _check_numbers(caller: str, tasks: Sequence[str] | None, parameter: str, numbers: Any) -> None:
    if parameter == "initial_losses" and not (isinstance(numbers, Mapping) and numbers):
        expected = "a number of updates, at least 1, or a mapping from task to number, for some tasks or all"
        check(caller, is_integer(numbers, least=1), parameter, expected, numbers)
    elif numbers is not None:
        check(caller, isinstance(numbers, Mapping), parameter, "a mapping from task to number", numbers)
        is_partial = parameter == "initial_losses" and tasks is not None and set(numbers) <= set(tasks)
        names = list(numbers) if tasks is None or is_partial else tasks
        check_positive_by_task(numbers, names, caller=caller, parameter=parameter)


def why_not_updated(task: str, loss: float, alpha: float) -> str:
    """Return why a task's loss or norm prevented the update."""
    if loss < 0 and alpha > 0:
        return (
            f"the loss of task '{task}' is negative ({loss:g}); add a constant that keeps it positive, or use alpha=0"
        )
    if loss == 0 and alpha > 0:
        return (
            f"the loss of task '{task}' has been 0 from the start, so its training rate is undefined (give "
            f"initial_losses={{'{task}': 1.0}} if it stays 0, or use alpha=0)"
        )
    return f"the loss or the gradient norm of task '{task}' is not finite"
