"""All values that a user can read from a callback after training."""

from __future__ import annotations

from typing import Any

PUBLIC = ("weights", "mean_weights", "suggested_weights")


def all_that_is_read(callback: Any) -> dict[str, Any]:
    """Numbers, sentences and state; of modules that learn, their state."""
    found = {name: getattr(callback, name) for name in PUBLIC if hasattr(callback, name)}
    for name in ("scalarizer", "aggregator"):
        if getattr(callback, name, None) is not None:
            found[name] = dict(getattr(callback, name).state_dict())
    if hasattr(callback, "summary"):
        last = callback.last
        found |= {"summary": callback.summary(), "last": None if last is None else (dict(last), last.products)}
    elif callback._trained._rule is not None:
        found |= {"rule": callback.rule.state_dict(), "dtype": callback.rule.weights.dtype}
    return {**found, "repr": repr(callback), "state": callback.state_dict()}
