"""Scalarizers and aggregators as a user gives them: one that is made already, or what makes one for T tasks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class NamesTasks(Protocol):
    """A scalarizer or aggregator whose options go by the tasks' names."""

    def name_tasks(self, tasks: Sequence[str]) -> None:
        """Take note of the tasks, in the order of the losses; called before the first step."""


def made_for(tasks: Sequence[str], given: nn.Module | Callable[[int], nn.Module], *, asked_by: str) -> nn.Module:
    """Return the module itself, or the one that ``given`` makes from the number of tasks, with the tasks' names told.

    A class that needs no arguments is called without any: the first of `DWA`, for one, is a temperature.

    Raises:
        TypeError: ``given`` cannot be called with a number, or makes no module.
        ImportError: it needs a package that is not installed.

    Example:
        >>> import torchjd.scalarization
        >>> made_for(["seg", "depth"], torchjd.scalarization.UW, asked_by="scalarizer")
        UW(shape=(2,))
        >>> made_for(["seg", "depth"], torchjd.scalarization.DWA, asked_by="scalarizer")
        DWA(temperature=2.0)
    """
    made: Any = given
    if not isinstance(given, nn.Module):
        arguments = _arguments(given, len(tasks), asked_by)
        try:
            made = given(*arguments)
        except TypeError as reason:
            raise TypeError(
                f"{asked_by} should be a module, or make one from the number of tasks, as torchjd.scalarization.UW does; "
                f"calling it with {len(tasks)} failed: {reason}"
            ) from reason
        except ImportError as reason:
            if (missing := missing_solver(reason)) is None:
                raise
            raise ModuleNotFoundError(f"{asked_by}: {missing}") from reason
    if not isinstance(made, nn.Module):
        raise TypeError(f"{asked_by} should be a module, or make one from the number of tasks; got {made!r}")
    if isinstance(made, NamesTasks):
        made.name_tasks(tasks)
    return made


def missing_solver(error: BaseException) -> str | None:
    """Return what to install, if ``error`` is what torchjd says of a solver that it does not find; it knows but its own extras.

    Example:
        >>> error = ImportError('''X requires ['scipy'] to be installed. Install them with: pip install "torchjd[x]"''')
        >>> print(missing_solver(error))
        X requires ['scipy'] to be installed. Run pip install "lightning-gradnorm[solvers]".
    """
    what, hint, _ = str(error).partition(' Install them with: pip install "torchjd[')
    return f'{what} Run pip install "lightning-gradnorm[solvers]".' if hint and isinstance(error, ImportError) else None


def _arguments(given: Callable[..., Any], number_of_tasks: int, asked_by: str) -> tuple[int, ...]:
    """Return what ``given`` is to be called with: the number of tasks, or nothing."""
    made_by = given.func if isinstance(given, partial) else given
    try:
        parameters = inspect.signature(given).parameters.values()
    except ValueError:  # written in C, without a signature
        return (number_of_tasks,)
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if not needed and (isinstance(made_by, type) or not parameters):
        return ()
    if made_by.__module__.startswith("torchjd.") and needed[0] not in ("shape", "n_tasks"):
        kind = made_by.__name__
        options = ", ".join(f"{name}=…" for name in needed)
        raise TypeError(
            f"{asked_by} {kind} cannot be made from the number of tasks alone: it needs {' and '.join(needed)}. Give "
            f"{kind}({options}), or partial({kind}, {options})."
        )
    return (number_of_tasks,)


def placed(module: nn.Module, *, device: torch.device | str | None, dtype: torch.dtype) -> nn.Module:
    """Move a module, and with it the tensors that it has as plain attributes, as torchjd's have their preferences.

    Example:
        >>> import torchjd.scalarization
        >>> preferences = torch.tensor([0.2, 0.8])
        >>> placed(torchjd.scalarization.Constant(preferences), device="cpu", dtype=torch.float64).weights.dtype
        torch.float64
    """
    module.to(device=device, dtype=dtype)
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor):
                setattr(part, name, value.to(device=device, dtype=dtype if value.is_floating_point() else None))
    return module
