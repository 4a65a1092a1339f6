"""Reads parameters of constructors from their source, so a schema needs to import neither torch nor Lightning."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional, Union

_PLAIN = {"bool": bool, "int": int, "float": float, "str": str, "None": type(None)}
_OPAQUE = object()
"""Stands for a default that is an object."""
REQUIRED = object()
"""Stands for a missing default."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class UnreadableError(Exception):
    """The source is not explicit enough; import the constructor instead."""


@dataclass(frozen=True)
class Parameter:
    """A named parameter: its type if that is a plain one, otherwise ``Any``, and its default or `REQUIRED`."""

    name: str
    hint: Any
    default: Any


@dataclass(frozen=True)
class Definition:
    """A class or function, and the module that defines it."""

    module: str
    node: ast.ClassDef | Function = field(compare=False)
    name: str


@dataclass(frozen=True)
class _Module:
    defined: dict[str, ast.ClassDef | Function]
    imported: dict[str, tuple[str, str]]
    """Name → module and its name there."""
    values: dict[str, ast.expr]


def find(dotted: str) -> Definition:
    """Return the definition of a dotted name, including re-exported ones.

    Raises:
        UnreadableError: the name does not exist, or the source does not show its origin.

    Example:
        >>> find("lightning.Trainer").module
        'lightning.pytorch.trainer.trainer'
    """
    module, _, name = dotted.rpartition(".")
    return _resolve(module, name)


def public_name(found: Definition) -> str:
    """Return the shortest dotted name, such as ``lightning_gradnorm.GradNorm`` instead of the defining module's."""
    package = found.module.split(".")
    for depth in range(1, len(package) + 1):
        module = ".".join(package[:depth])
        try:
            if _resolve(module, found.name) == found:
                return f"{module}.{found.name}"
        except UnreadableError:
            continue
    raise UnreadableError(found.name)


def parameters(found: Definition) -> list[Parameter]:
    """Return the named parameters of a class or function.

    Raises:
        UnreadableError: the source does not list them.

    Example:
        >>> [one.name for one in parameters(find("torch.optim.Adam"))][:3]
        ['params', 'lr', 'betas']
    """
    if not isinstance(found.node, ast.ClassDef):
        return list(_of_function(found.module, found.node, skip=0))
    init = _init(found)
    return [] if init is None else list(_of_function(*init, skip=1))


def _init(found: Definition) -> tuple[str, Function] | None:
    """Return the ``__init__`` that the class has or inherits, or ``None`` if it comes from `object`."""
    assert isinstance(found.node, ast.ClassDef)
    if any("dataclass" in ast.unparse(one) for one in found.node.decorator_list):
        raise UnreadableError(found.name)
    for one in found.node.body:
        if isinstance(one, Function) and one.name == "__init__":
            return found.module, one
    for base in found.node.bases:
        name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        if hasattr(builtins, name) or name.rpartition(".")[2] in ("ABC", "Generic", "Protocol"):
            continue
        above = _init(_resolve_expression(found.module, name))
        if above is not None:
            return above
    return None


def _of_function(module: str, function: Function, *, skip: int) -> Iterator[Parameter]:
    given = function.args
    positional: Sequence[ast.arg] = [*given.posonlyargs, *given.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults))
    pairs = list(zip(positional, [*missing, *given.defaults], strict=True))[skip:]
    for one, default in [*pairs, *zip(given.kwonlyargs, given.kw_defaults, strict=True)]:
        value = REQUIRED if default is None else _value(module, default)
        yield Parameter(one.arg, Any if one.annotation is None else _hint(module, one.annotation), value)


def _hint(module: str, annotation: ast.expr) -> Any:
    """Return the type if it is a union of plain types, otherwise ``Any``."""
    if isinstance(annotation, ast.Constant):
        if isinstance(annotation.value, str):
            return _hint(module, ast.parse(annotation.value, mode="eval").body)
        return type(None) if annotation.value is None else Any
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return Union[_hint(module, annotation.left), _hint(module, annotation.right)]  # noqa: UP007
    if isinstance(annotation, ast.Subscript):
        outer, inner = ast.unparse(annotation.value).rpartition(".")[2], annotation.slice
        kinds = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if outer == "Optional":
            return Optional[_hint(module, inner)]  # noqa: UP045
        return Union[tuple(_hint(module, kind) for kind in kinds)] if outer == "Union" else Any  # noqa: UP007
    if not isinstance(annotation, ast.Name):
        return Any
    if annotation.id in _PLAIN:
        return _PLAIN[annotation.id]
    known = _read(module)  # perhaps an alias of plain types
    if annotation.id in known.values:
        return _hint(module, known.values[annotation.id])
    if annotation.id in known.imported:
        home, name = known.imported[annotation.id]
        try:
            aliased = _read(home).values.get(name)
        except UnreadableError:
            return Any
        return Any if aliased is None else _hint(home, aliased)
    return Any


def _value(module: str, default: ast.expr) -> Any:
    try:
        return ast.literal_eval(default)
    except ValueError:
        pass
    if isinstance(default, ast.Name):
        known = _read(module)
        if default.id in known.values:
            return _value(module, known.values[default.id])
        if default.id in known.imported:
            home, name = known.imported[default.id]
            found = _read(home).values.get(name)
            if found is not None:
                return _value(home, found)
        _resolve(module, default.id)  # raises if it is unreadable
    elif isinstance(default, ast.Subscript) and isinstance(default.slice, ast.Slice):
        bounds = [None if one is None else ast.literal_eval(one) for one in (default.slice.lower, default.slice.upper)]
        return _value(module, default.value)[slice(*bounds)]
    elif not (isinstance(default, ast.Call) and ast.unparse(default.func).rpartition(".")[2] == "partial"):
        raise UnreadableError(ast.unparse(default))
    return _OPAQUE


# ---- where a name is from --------------------------------------------------------------------------------------------


def _resolve(module: str, name: str) -> Definition:
    known = _read(module)
    if name in known.defined:
        return Definition(module, known.defined[name], name)
    if name not in known.imported:
        raise UnreadableError(f"{module}.{name}")
    return _resolve(*known.imported[name])


def _resolve_expression(module: str, name: str) -> Definition:
    """Return the definition of ``Callback`` or ``L.Callback`` in a module."""
    first, *others = name.split(".")
    if not others:
        return _resolve(module, name)
    home, own = _read(module).imported.get(first, ("", ""))
    return find(".".join([home, *filter(None, [own]), *others]))


@cache
def _read(module: str) -> _Module:
    file = _file(module)
    if file is None:
        raise UnreadableError(module)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = _Module({}, {}, {})
    for statement in _statements(ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(statement, ast.ClassDef | Function):
            found.defined[statement.name] = statement
        elif isinstance(statement, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - statement.level + 1] if statement.level else []
            home = ".".join([*above, *filter(None, [statement.module])])
            found.imported.update({one.asname or one.name: (home, one.name) for one in statement.names})
        elif isinstance(statement, ast.Import):
            found.imported.update({one.asname: (one.name, "") for one in statement.names if one.asname})
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            found.values[statement.targets[0].id] = statement.value
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            found.values[statement.target.id] = statement.value
    return found


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for one in body:
        yield one
        if isinstance(one, ast.If | ast.Try):
            yield from _statements([*one.body, *one.orelse])


@cache
def _file(module: str) -> Path | None:
    """Return a module's file without importing any package."""
    top, *below = module.split(".")
    spec = find_spec(top)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(place, *below)
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return file
    return None
