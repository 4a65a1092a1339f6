"""Optimizers of the task weights and of a scalarizer's parameters: which ones work, and the options they were created with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, str)


def made_optimizer(
    factory: Callable[[list[Tensor]], object], parameters: list[Tensor], *, caller: str
) -> torch.optim.Optimizer:
    """Return the optimizer that ``factory`` creates.

    Args:
        factory: such as ``torch.optim.Adam``, or a ``functools.partial`` of it.
        parameters: the parameters to update.
        caller: begins the error messages.

    Raises:
        TypeError: the factory cannot be called, or returns something else.
        ValueError: the optimizer needs more than a gradient and a call of ``step()``.

    Example:
        >>> made_optimizer(torch.optim.SGD, [torch.ones(2)], caller="GradNorm").param_groups[0]["lr"]
        0.001
    """
    try:
        made = factory(parameters)
    except TypeError as reason:
        raise TypeError(f"{expectation(caller)}; calling it failed: {reason}") from reason
    kind = type(made).__name__
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"{expectation(caller)}; it returned {kind}")
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError(
            f"{expectation(caller)}; LBFGS does not step by their gradient alone but evaluates the loss repeatedly."
        )
    if all(callable(getattr(made, mode, None)) for mode in ("train", "eval")):
        raise ValueError(
            f"{expectation(caller)}; {kind} has modes, train() and eval(), and moves the parameters between them, but here "
            f"they are read and set in every step. Use optimizer=partial(torch.optim.Adam, lr=0.025). For the network's "
            f"parameters {kind} is fine."
        )
    return made


def expectation(caller: str) -> str:
    """Return the beginning of a message about the argument ``optimizer``."""
    return f"{caller}: optimizer should make a torch optimizer of the parameters it receives, as torch.optim.Adam does"


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a parameter group that are plain numbers, strings or tuples of them.

    Example:
        >>> options_of(torch.optim.SGD([torch.ones(2)], lr=0.1).param_groups[0])["lr"]
        0.1
    """
    found = {name: _plain(value) for name, value in group.items() if name != "params"}
    return {name: value for name, value in found.items() if isinstance(value, (*_PLAIN, tuple))}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple) and all(isinstance(one, _PLAIN) for one in value):
        return tuple(value)
    return value if isinstance(value, _PLAIN) else {}
