"""Accepts scalarizers and aggregators in either form: an object, or a function that makes one for T tasks."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

Made = TypeVar("Made", bound=nn.Module)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_BUILT_WITH = {"QuadprogProjector": ["UPGrad", "DualProj"]}
"""Part of TorchJD that needs a solver → the classes of ours that do without it."""


@runtime_checkable
class TaskAware(Protocol):
    """A scalarizer or aggregator with options that name tasks. A class of your own only needs the method."""

    def name_tasks(self, tasks: Sequence[str]) -> None:
        """Receive the tasks in the order of the losses; called before the first step."""


def instantiate(tasks: Sequence[str], given: nn.Module | Callable[[int], nn.Module], *, caller: str) -> nn.Module:
    """Return the module itself, or the one that ``given`` makes from the number of tasks. Calls its `name_tasks` if any.

    A class that needs no arguments is called without any, because its first may be something else: a temperature in `DWA`.

    Raises:
        TypeError: ``given`` cannot be called with a number, or does not return a module.
        ImportError: it needs a package that is not installed.

    Example:
        >>> import torchjd.scalarization
        >>> instantiate(["seg", "depth"], torchjd.scalarization.UW, caller="scalarizer")
        UW(shape=(2,))
        >>> instantiate(["seg", "depth"], torchjd.scalarization.DWA, caller="scalarizer")
        DWA(temperature=2.0)
    """
    made: Any = given
    expected = f"{caller} should be a module, or make one from the number of tasks, as torchjd.scalarization.UW does"
    if not isinstance(given, nn.Module):
        arguments = _arguments(given, len(tasks), caller)
        try:
            made = given(*arguments)
        except TypeError as reason:
            raise TypeError(f"{expected}; calling it with {len(tasks)} failed: {reason}") from reason
        except ImportError as reason:
            if (missing := missing_solver(reason)) is None:
                raise
            raise ModuleNotFoundError(f"{caller}: {missing}") from reason
    if not isinstance(made, nn.Module):
        raise TypeError(f"{expected}; got {made!r}")
    if isinstance(made, TaskAware):
        made.name_tasks(tasks)
    return made


def with_equal_preferences(number_of_tasks: int, /, scalarizer: Callable[..., Made], **options: Any) -> Made:
    """Return ``scalarizer(weights=[1/T, …, 1/T], **options)`` for T tasks.

    For torchjd's ``PBI`` (Zhang, Li, *MOEA/D*, 2007), ``COSMOS`` (Ruchte, Grabocka, arXiv 2103.13392) and ``Constant``. Bind
    everything but the number of tasks to get what a callback expects, in Python or in a Hydra configuration::

        _target_: lightning_gradnorm.strategies.with_equal_preferences
        _partial_: true
        scalarizer: {_target_: torchjd.scalarization.PBI, _partial_: true, theta: 5.0}

    Args:
        number_of_tasks: T.
        scalarizer: called with ``weights``.
        options: its other arguments.

    Example:
        >>> from functools import partial
        >>> from torchjd.scalarization import COSMOS
        >>> make = partial(with_equal_preferences, scalarizer=COSMOS, lambda_=1.0)
        >>> make(4).weights
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    made = scalarizer(weights=torch.full((number_of_tasks,), 1 / number_of_tasks), **options)
    weights = vars(made).get("weights")
    # A plain attribute would stay behind when the module moves to another device or precision.
    if isinstance(weights, Tensor):
        del made.weights
        made.register_buffer("weights", weights)
    return made


def missing_solver(error: BaseException) -> str | None:
    """Return our install hint if ``error`` is TorchJD's about a missing solver (TorchJD names its own extras).

    Example:
        >>> error = ImportError('''X requires ['scipy'] to be installed. Install them with: pip install "torchjd[x]"''')
        >>> print(missing_solver(error))
        X requires ['scipy'] to be installed. Run pip install "lightning-gradnorm[solvers]".
    """
    what, hint, _ = str(error).partition(' Install them with: pip install "torchjd[')
    if not hint or not isinstance(error, ImportError):
        return None
    kind = what.partition(" ")[0].strip("_").removesuffix("Weighting")
    ours = sys.modules["lightning_gradnorm.strategies"]
    names = _BUILT_WITH.get(kind, [kind] if hasattr(ours, kind) else [])
    listed = " or ".join(f"{ours.__name__}.{name}" for name in names)
    instead = f", or use {listed}, which needs none" if listed else ""
    return f'{what} Run pip install "lightning-gradnorm[solvers]"{instead}.'


def _arguments(given: Callable[..., Any], number_of_tasks: int, caller: str) -> tuple[int, ...]:
    """Return the arguments to call ``given`` with: the number of tasks, or nothing."""
    made_by = given.func if isinstance(given, partial) else given
    try:
        parameters = inspect.signature(given).parameters.values()
    except ValueError:  # written in C, without a signature
        return (number_of_tasks,)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p.name for p in positional if p.default is p.empty]
    if not needed and (isinstance(made_by, type) or not parameters):
        return ()
    if made_by.__module__.startswith("torchjd.") and needed[0] not in ("shape", "n_tasks"):
        kind, options = made_by.__name__, ", ".join(f"{name}=…" for name in needed)
        raise TypeError(
            f"{caller} {kind} cannot be made from the number of tasks alone: it needs {' and '.join(needed)}. Give "
            f"{kind}({options}), or partial({kind}, {options})."
        )
    return (number_of_tasks,)


def move_to(
    module: nn.Module,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    only: torch.dtype | None = None,
) -> nn.Module:
    """Move a module in place, including its plain attributes, where TorchJD's classes keep their history; return it.

    This covers tensors, devices and dtypes, also inside lists, tuples and dicts, and the state of optimizers. If ``only`` is
    given, plain attributes of another precision keep theirs.

    Example:
        >>> import torchjd.scalarization
        >>> preferences = torch.tensor([0.2, 0.8])
        >>> move_to(torchjd.scalarization.Constant(preferences), device="cpu", dtype=torch.float64).weights.dtype
        torch.float64
    """
    before = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    module.to(device=device, dtype=dtype)
    after = dict((*module.named_parameters(), *module.named_buffers()))
    # "cuda" is never equal to "cuda:0", the device of a tensor.
    place = None if device is None else torch.empty(0, device=device).device

    def moved(value: Any) -> Any:
        if id(value) in before:
            return after[before[id(value)]]
        if isinstance(value, Tensor):
            converts = value.is_floating_point() and only in (None, value.dtype)
            return value.to(device=place, dtype=dtype if converts else None)
        if isinstance(value, torch.dtype):
            return dtype if dtype is not None and value == only else value
        if isinstance(value, torch.device):
            return value if place is None else place
        if type(value) in (list, tuple):
            return type(value)(moved(item) for item in value)
        if type(value) is dict:
            return {key: moved(item) for key, item in value.items()}
        if isinstance(value, torch.optim.Optimizer):
            follow_parameters(value)
        return value

    for part in module.modules():
        for name in vars(part).keys() - _OF_EVERY_MODULE:
            part.__dict__[name] = moved(part.__dict__[name])
    return module


def follow_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Move the state of an optimizer to the device and precision of its parameters."""
    optimizer.load_state_dict(optimizer.state_dict())
