"""What GradNorm says of wrong arguments, for the rule and for the callbacks that pass them on, and of numbers it cannot use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning_gradnorm._messages import check, check_positive_by_task, is_integer, is_number


def check_arguments(
    caller: str,
    tasks: Sequence[str] | None,
    by_task: Mapping[str, Any],
    alpha: Any,
    optimizer: Any,
    min_weight: Any,
    update_every: Any,
    stop_after: Any,
) -> None:
    """Raise ValueError for an argument of `GradNormRule` out of range, in the name of ``caller``.

    ``by_task`` holds ``initial_losses``, ``initial_weights`` and ``priorities``. While ``tasks`` is ``None``, because they are
    not known yet, the names in these mappings are not checked.

    Example:
        >>> check_arguments("GradNorm", None, {"initial_losses": 1}, -1, print, 1e-4, 1, None)
        Traceback (most recent call last):
        ValueError: GradNorm: alpha should be a finite number, at least 0; got -1
    """
    check_one = partial(check, caller)
    check_one(is_number(alpha) and 0 <= alpha < math.inf, "alpha", "a finite number, at least 0", alpha)
    check_one(callable(optimizer), "optimizer", "a callable such as partial(torch.optim.Adam, lr=0.025)", optimizer)
    check_one(is_number(min_weight) and 0 < min_weight < 1, "min_weight", "a number between 0 and 1", min_weight)
    check_one(is_integer(update_every, least=1), "update_every", "an integer, at least 1", update_every)
    stops = stop_after is None or is_integer(stop_after, least=0)
    check_one(stops, "stop_after", "None or an integer, at least 0", stop_after)
    for parameter, numbers in by_task.items():
        if parameter == "initial_losses" and not (isinstance(numbers, Mapping) and numbers):
            expected = "a number of updates, at least 1, or a mapping from task to number, for some tasks or all"
            check_one(is_integer(numbers, least=1), parameter, expected, numbers)
        elif numbers is not None:
            check_one(isinstance(numbers, Mapping), parameter, "a mapping from task to number", numbers)
            is_partial = parameter == "initial_losses" and tasks is not None and set(numbers) <= set(tasks)
            names = list(numbers) if tasks is None or is_partial else tasks
            check_positive_by_task(numbers, names, caller=caller, parameter=parameter)


def why_not_updated(task: str, loss: float, alpha: float) -> str:
    """Return why a task's loss, or its norm, allowed no update."""
    if loss < 0 and alpha > 0:
        return (
            f"the loss of task '{task}' is negative ({loss:g}); add a constant that keeps it positive, or use alpha=0"
        )
    if loss == 0 and alpha > 0:
        return (
            f"the loss of task '{task}' has been 0 from the start, so that its training rate is undefined (give "
            f"initial_losses={{'{task}': 1.0}} if it will stay so, or use alpha=0)"
        )
    return f"the loss or the gradient norm of task '{task}' is not finite"
