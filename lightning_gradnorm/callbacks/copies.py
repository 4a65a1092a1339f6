"""Deep copies of callbacks: a library may train a copy while the user holds the original, which then shows the copy's state."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

Copied = TypeVar("Copied")


def linked_copy(original: Copied, memo: dict[int, Any], fresh: Mapping[str, Any]) -> Copied:
    """Return a deep copy that knows its original. Attributes in ``fresh`` are not copied, but get these values."""
    new = type(original).__new__(type(original))
    memo[id(original)] = new
    own = {**fresh, "_original": original, "_trained_copy": None}
    vars(new).update({name: copy.deepcopy(value, memo) for name, value in vars(original).items() if name not in own})
    vars(new).update(own)
    return new


def tell_originals(copied: Any) -> None:
    """Have all originals of a copy show its state: it is the one that is trained."""
    original = copied._original
    while original is not None:
        original._trained_copy, original = copied, original._original
