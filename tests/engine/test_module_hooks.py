"""Wrappers around a method can be removed in any order."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from lightning_gradnorm.engine.module_hooks import patch_attribute


class Owner(nn.Module):
    def method(self) -> str:
        return "own"


@pytest.mark.parametrize("of_instance", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_shadows_are_undone_in_any_order(order: tuple[int, ...], of_instance: bool) -> None:
    owner = Owner()
    if of_instance:
        owner.__dict__["method"] = lambda: "own"
    before = dict(vars(owner))
    undo = [patch_attribute(owner, "method", lambda i=i: f"shadow {i}") for i in range(3)]
    alive = [0, 1, 2]
    for i in order:
        undo[i]()
        undo[i]()  # twice does nothing more
        alive.remove(i)
        assert owner.method() == (f"shadow {alive[-1]}" if alive else "own")
    assert vars(owner) == before


def test_wrappers_of_others_on_top_stay_until_they_remove_them() -> None:
    owner = Owner()
    undo = patch_attribute(owner, "method", lambda: "shadow")
    owner.__dict__["method"] = theirs = lambda: "theirs"
    undo()
    assert owner.__dict__["method"] is theirs
    again = patch_attribute(owner, "method", lambda: "shadow")
    again()
    assert owner.__dict__["method"] is theirs
