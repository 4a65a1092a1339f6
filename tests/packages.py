"""Runs a test with both packages that publish Lightning: the same models and callbacks with another Trainer."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import lightning as L
import models
import pytest
import torch
from torch.utils import _pytree as pytree

from lightning_gradnorm.callbacks.packages import works_in_both_packages

PACKAGES = ("lightning", "pytorch_lightning")
OUR_MODULE = (
    "module",
    "own",
    "MultiTaskModule",
)  # parameters for which a test takes a MultiTaskModule, which is lightning's


@contextmanager
def using(package: str) -> Iterator[ModuleType]:
    """The test models are LightningModules of this package."""
    namespace = importlib.import_module(package)
    bases = {
        cls: cls.__bases__
        for cls in vars(models).values()
        if isinstance(cls, type) and L.LightningModule in cls.__bases__ and cls.__module__ == models.__name__
    }
    try:
        for cls in bases:
            cls.__bases__ = (namespace.LightningModule,)
        yield namespace
    finally:
        for cls, own in bases.items():
            cls.__bases__ = own


def adopt(callbacks: Iterable[Any]) -> None:
    """Make callbacks that tests define fit the other package's Trainer, as ours do by themselves."""
    for callback in callbacks:
        for cls in type(callback).__mro__:
            if L.Callback in cls.__bases__ and cls.__module__.partition(".")[0] != "lightning":
                works_in_both_packages(cls)


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Give a test marked `both_packages` the parameter `package`."""
    if metafunc.definition.get_closest_marker("both_packages"):
        metafunc.parametrize("package", PACKAGES, indirect=True)


def select(items: list[pytest.Item]) -> None:
    """Drop what takes a MultiTaskModule with the other package, and mark all but one combination per value of it slow."""
    seen: set[tuple[str, str, str]] = set()
    kept = []
    for item in items:
        values: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        if values.get("package") == "pytorch_lightning":
            if any(isinstance(value, str) and value in OUR_MODULE for value in values.values()):
                continue
            name = item.nodeid.partition("[")[0]
            new = {(name, axis, repr(value)) for axis, value in values.items()} - seen
            if not new:
                item.add_marker(pytest.mark.slow)
            elif item.get_closest_marker("slow") is None:
                seen |= new
        kept.append(item)
    items[:] = kept


def submodule(package: ModuleType, name: str) -> Any:
    """Return `lightning.pytorch.callbacks` or `pytorch_lightning.callbacks`."""
    return importlib.import_module(package.Trainer.__module__.partition(".trainer")[0] + "." + name)


def assert_identical(found: Any, expected: Any) -> None:
    """Nested states have the same structure and the same numbers, to the bit."""
    (leaves, structure), (wanted, wanted_structure) = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    assert structure == wanted_structure
    for leaf, value in zip(leaves, wanted, strict=True):
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(leaf, value, rtol=0, atol=0, equal_nan=True)
        else:
            assert leaf == value or (leaf != leaf and value != value), (leaf, value)
