"""Imports only point downward, and each part of the package only imports its allowed third-party packages."""

from __future__ import annotations

import pytest
from structure import allowed
from structure.source import Import, Module, imports, imports_of, is_foreign, part_imported

LEAVES = {"_messages", "_moved"}
PARTS: dict[str, set[str]] = {
    "_messages": set(),
    "_moved": set(),
    "strategies": {"_messages"},
    "gradients": {"_messages"},
    "engine": {"_messages", "gradients"},
    "callbacks": {*LEAVES, "engine", "gradients", "strategies"},
    "monitor": {"_messages", "callbacks", "engine", "gradients"},  # callbacks: the Lightning side that both share
    "multitask": {"_messages", "callbacks", "engine", "gradients"},
    "__init__": {*LEAVES, "callbacks", "engine", "gradients", "monitor", "multitask", "strategies"},
    "experiments": {
        *LEAVES,
        "__init__",
        "callbacks",
        "engine",
        "gradients",
        "monitor",
        "multitask",
        "strategies",
    },
}
"""Part → the parts it may import."""

TORCH = {"torch", "typing_extensions"}
LIGHTNING = {*TORCH, "lightning", "pytorch_lightning", "torchmetrics"}
FOREIGN: dict[str, set[str]] = {
    "_messages": set(),
    "_moved": set(),
    "strategies": {*TORCH, "torchjd"},
    "gradients": TORCH,
    "engine": TORCH,
    "callbacks": {*LIGHTNING, "torchjd"},
    "monitor": LIGHTNING,
    "multitask": LIGHTNING,
    "__init__": set(),
}
"""Part → the third-party packages it may import; `experiments` may import what its extras declare (test_dependencies.py)."""

NOT_IN_THE_CORE = ("torch.utils.tensorboard",)
"""Of an allowed package, modules that need one that is not."""


def violations(found: list[Import]) -> set[tuple[str, str]]:
    wrong = set()
    for one in found:
        part = one.module.part
        ours = part_imported(one)
        if ours is not None and ours != part and ours not in PARTS[part]:
            wrong.add((one.module.path, ours))
        if is_foreign(one) and part in FOREIGN and one.distribution not in FOREIGN[part]:
            wrong.add((one.module.path, one.distribution))
        if part in FOREIGN and one.name.startswith(NOT_IN_THE_CORE):
            wrong.add((one.module.path, one.name))
    return wrong


def test_every_part_of_the_package_has_its_rules() -> None:
    assert {one.module.part for one in imports()} <= set(PARTS)
    assert set(PARTS) - set(FOREIGN) == {"experiments"}


def test_imports_point_down_only_and_each_part_keeps_to_its_third_party_packages() -> None:
    found = violations(imports())
    allowed.assert_only_allowed(found, allowed.IMPORTS, "imports that DESIGN does not allow")


def test_the_parts_have_no_cycle() -> None:
    seen: dict[str, int] = {}
    while len(seen) < len(PARTS):
        free = [part for part in PARTS if part not in seen and PARTS[part] <= set(seen)]
        assert free, f"a cycle among {sorted(set(PARTS) - set(seen))}"
        seen |= dict.fromkeys(free, len(seen))


def test_forbidden_imports_are_found_wherever_they_are_written() -> None:
    source = """
from typing import TYPE_CHECKING
import torch
if TYPE_CHECKING:
    from lightning.pytorch import Trainer
def f():
    import yaml
    from torch.utils.tensorboard import SummaryWriter
    from lightning_gradnorm import callbacks, GradNorm
    from lightning_gradnorm.strategies import balance
    importlib.import_module("rich.console")
"""
    module = Module("engine/fish.py", source)
    found = {name for _, name in violations(imports_of(module))}
    assert found == {
        "lightning",
        "yaml",
        "torch.utils.tensorboard",
        "callbacks",
        "__init__",
        "strategies",
        "rich",
    }


def test_the_list_of_exceptions_can_only_shrink() -> None:
    allowed.assert_only_allowed({"a"}, {"a": "why"}, "rule")
    with pytest.raises(AssertionError, match=r"rule: \['b'\]"):
        allowed.assert_only_allowed({"a", "b"}, {"a": "why"}, "rule")
    with pytest.raises(AssertionError, match=r"remove what has been fixed .*: \['a'\]"):
        allowed.assert_only_allowed(set(), {"a": "why"}, "rule")
