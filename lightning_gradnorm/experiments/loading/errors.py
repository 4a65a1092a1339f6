"""The one sentence said about data that are not what they should be."""

from __future__ import annotations

from typing import NoReturn


def refuse(owner: str, place: object, expected: str, found: object, mend: str = "") -> NoReturn:
    """Raise an error that says where, what is expected there, what was found and how to mend it.

    Raises:
        ValueError: Always.

    Example:
        >>> refuse("CMAPSS", "line 7 of train_FD001.txt", "have 26 columns", 25, "Fetch the file again.")
        Traceback (most recent call last):
        ValueError: CMAPSS: line 7 of train_FD001.txt should have 26 columns; got 25. Fetch the file again.
    """
    raise ValueError(f"{owner}: {place} should {expected}; got {found}. {mend}".rstrip())
