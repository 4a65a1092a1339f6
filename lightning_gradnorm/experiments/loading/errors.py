"""The error message for invalid data."""

from __future__ import annotations

from typing import NoReturn


def refuse(owner: str, place: object, expected: str, found: object, fix: str = "") -> NoReturn:
    """Raise an error with the place, the expectation, what was found and the fix.

    Raises:
        ValueError: Always.

    Example:
        >>> refuse("CMAPSS", "line 7 of train_FD001.txt", "have 26 columns", 25, "Fetch the file again.")
        Traceback (most recent call last):
        ValueError: CMAPSS: line 7 of train_FD001.txt should have 26 columns; got 25. Fetch the file again.
    """
    raise ValueError(f"{owner}: {place} should {expected}; got {found}. {fix}".rstrip())
