"""Small is a feature: lines of code of the core, lines of a file, of a class, and steps of inheritance."""

from __future__ import annotations

import ast
import importlib
import inspect

from structure import allowed
from structure.source import PACKAGE, modules

CORE_LINES, FILE_LINES, CLASS_LINES, STEPS = 7500, 400, 300, 3


def classes() -> list[type]:
    """Return all classes that the package defines."""
    found: dict[type, None] = {}
    for module in modules():
        name = ".".join([PACKAGE, *module.path.removesuffix(".py").split("/")]).removesuffix(".__init__")
        for one in vars(importlib.import_module(name)).values():
            if inspect.isclass(one) and one.__module__ == name:
                found[one] = None
    return list(found)


def steps(kind: type) -> int:
    """Return the length of the longest way through the package's classes to a class that is not its own.

    Example:
        >>> steps(dict)
        0
    """
    return 1 + max(map(steps, kind.__bases__)) if kind.__module__.startswith(PACKAGE) else 0


def test_the_core_is_small() -> None:
    core = sum(module.lines_of_code for module in modules() if module.part != "experiments")
    most = allowed.CORE_LINES_TODAY or CORE_LINES
    assert core <= most, f"{core} lines of code outside experiments; there should be {most} at most"
    is_fixed = allowed.CORE_LINES_TODAY is not None and core <= CORE_LINES
    assert not is_fixed, f"{core} lines: remove the entry from tests/structure/allowed.py"


def test_no_file_is_long() -> None:
    long = {module.path: module.lines for module in modules() if module.lines > FILE_LINES}
    allowed.assert_only_allowed(long, allowed.LONG_FILES, f"files of more than {FILE_LINES} lines")


def test_no_class_is_long() -> None:
    long = {
        f"{module.path}:{node.name}"
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef) and (node.end_lineno or 0) - node.lineno + 1 > CLASS_LINES
    }
    allowed.assert_only_allowed(long, allowed.LONG_CLASSES, f"classes of more than {CLASS_LINES} lines")


def test_no_class_is_more_than_three_steps_from_one_of_torch_or_lightning() -> None:
    deep = {kind.__qualname__ for kind in classes() if steps(kind) > STEPS}
    allowed.assert_only_allowed(deep, allowed.DEEP_CLASSES, f"classes of more than {STEPS} steps")
