"""What was probably meant by a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, existing: Iterable[str]) -> str | None:
    """Return the existing name that is most like ``name``, or ``None`` if none is.

    Example:
        >>> nearest("gradnrom", ["equal", "gradnorm"])
        'gradnorm'
    """
    near = difflib.get_close_matches(name, list(existing), n=1)
    return near[0] if near else None


def did_you_mean(name: str, existing: Iterable[str]) -> str:
    """Return the end of an error's sentence: the near match of ``name``, or all that exists.

    Example:
        >>> did_you_mean("encoder.layr4", ["encoder.layer4", "head"])
        "did you mean 'encoder.layer4'?"
        >>> did_you_mean("trunk", ["encoder", "head"])
        "it has 'encoder', 'head'"
    """
    existing = list(existing)
    near = nearest(name, existing)
    if near is not None:
        return f"did you mean '{near}'?"
    shown = ", ".join(f"'{one}'" for one in existing[:20]) + (", …" if len(existing) > 20 else "")
    return f"it has {shown or 'none'}"
