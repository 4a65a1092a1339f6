"""Derives a configuration's schema from a constructor, so names, types and defaults are written only once."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from types import UnionType
from typing import Any, Union

from omegaconf import MISSING

from lightning_gradnorm.experiments.cli.signatures import REQUIRED, Parameter

_PLAIN = (bool, int, float, str)


def schema_of(constructor: Callable[..., Any], *, leave_out: Collection[str] = (), partial: bool = False) -> type:
    """Return a dataclass with the constructor's parameters, which Hydra can instantiate.

    Plain types (bool, int, float, str, their unions, with or without None) are checked. All others are ``Any``. Defaults
    that yaml can express are copied. Any other parameter is missing and left to the constructor.

    Args:
        constructor: a class or function.
        leave_out: parameters that are set elsewhere.
        partial: make a factory that is called with the parameters left out (Hydra's ``_partial_``).

    Example:
        >>> from lightning_gradnorm.experiments.problems.small import MLP
        >>> [(field.name, field.type) for field in dataclasses.fields(schema_of(MLP, leave_out=["activation"]))][1:]
        [('in_features', <class 'int'>), ('hidden', typing.Any), ('out_features', typing.Optional[int])]
        >>> schema_of(MLP)(in_features=250).hidden
        [100, 100, 100, 100]
    """
    hints = typing.get_type_hints(constructor.__init__ if inspect.isclass(constructor) else constructor)
    found = [
        Parameter(name, hints.get(name, Any), REQUIRED if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    return schema_from(_dotted_name(constructor), found, leave_out=leave_out, partial=partial)


def schema_from(
    target: str, parameters: Iterable[Parameter], *, leave_out: Collection[str] = (), partial: bool = False
) -> type:
    """Return the same as `schema_of` without importing the constructor.

    Args:
        target: its dotted name.
        parameters: its parameters, as returned by `signatures.parameters`.
        leave_out: parameters that are set elsewhere.
        partial: make a factory.
    """
    fields: list[Any] = [("_target_", str, target)]
    if partial:
        fields.append(("_partial_", bool, True))
    fields += [
        (one.name, _checkable(one.hint), _default(one.default)) for one in parameters if one.name not in leave_out
    ]
    return dataclasses.make_dataclass(target.rpartition(".")[2], fields)


def _dotted_name(constructor: Callable[..., Any]) -> str:
    """Return the shortest public name, such as ``lightning_gradnorm.GradNorm`` instead of the defining module's."""
    package = constructor.__module__.split(".")
    for depth in range(1, len(package) + 1):
        module = importlib.import_module(".".join(package[:depth]))
        if getattr(module, constructor.__name__, None) is constructor:
            return f"{module.__name__}.{constructor.__name__}"
    raise ValueError(f"{constructor!r} is not a name of the module {constructor.__module__}")


def _checkable(hint: Any) -> Any:
    if hint in _PLAIN:
        return hint
    if typing.get_origin(hint) not in (Union, UnionType):
        return Any
    kinds = typing.get_args(hint)
    if not all(kind in (*_PLAIN, type(None)) for kind in kinds):
        return Any
    return Union[kinds]  # noqa: UP007  OmegaConf supports this spelling, not `int | float`


def _default(value: Any) -> Any:
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, _PLAIN) for item in value):
        return dataclasses.field(default_factory=lambda: list(value))
    if isinstance(value, Mapping) and not value:
        return dataclasses.field(default_factory=dict)
    return MISSING
