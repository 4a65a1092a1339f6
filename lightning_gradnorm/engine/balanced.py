"""Records which models are being balanced, and by what: the weights of two balancers would multiply."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

from torch import nn

_balanced: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()
"""Model → what balances it, and with which rule."""


def require_unbalanced(model: nn.Module, *, caller: str) -> None:
    """Check that no other `Balancer` balances this model, and that a Balancer and a callback do not both balance it.

    Raises:
        ValueError: one does. For a Balancer and a callback, it is enough that one model is part of the other.
    """
    for other, (who, rule) in list(_balanced.items()):
        of_both_kinds = (who == "Balancer") != (caller == "Balancer")
        is_nested = any(one is model for one in other.modules()) or any(one is other for one in model.modules())
        if (of_both_kinds and is_nested) or (other is model and who == caller == "Balancer"):
            raise ValueError(
                f"{caller}: {type(other).__name__} already has a {who}, with {rule}: both would weight the same losses. Leave "
                f"one of them out{', or call close() on the first' if who == 'Balancer' else ''}."
            )


def claim(model: nn.Module, *, caller: str, rule: str) -> Callable[[], object]:
    """Record that a model is balanced from now on; return a function that ends it."""
    require_unbalanced(model, caller=caller)
    _balanced[model] = caller, rule
    return lambda: _balanced.pop(model, None)
