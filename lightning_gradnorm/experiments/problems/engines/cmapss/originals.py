"""Recognizes NASA's twelve files by their numbers, because altered and swapped copies circulate under the same names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Original:
    """One of NASA's files.

    Attributes:
        rows: Number of lines with numbers.
        engines: Number of engines; in a RUL file the number of lines.
        fingerprint: The `fingerprint` of its numbers. Blanks, line ends and a header do not count.
    """

    rows: int
    engines: int
    fingerprint: str

    def __str__(self) -> str:
        """Return the size of the file as text."""
        return f"{self.rows:,} rows" + (f" of {self.engines} engines" if self.engines != self.rows else "")


ORIGINALS = {
    "train_FD001.txt": Original(20631, 100, "ee2e430a15cd2607"),
    "test_FD001.txt": Original(13096, 100, "24f3977efbb5b36c"),
    "RUL_FD001.txt": Original(100, 100, "da1da25e3a16a0b5"),
    "train_FD002.txt": Original(53759, 260, "f6b88dd35e205780"),
    "test_FD002.txt": Original(33991, 259, "7574ff9d112309bc"),
    "RUL_FD002.txt": Original(259, 259, "e5e8e0069fc0aa0e"),
    "train_FD003.txt": Original(24720, 100, "92404ccab1bfdc94"),
    "test_FD003.txt": Original(16596, 100, "8b0d7970445d6faf"),
    "RUL_FD003.txt": Original(100, 100, "46598577b9a0dc68"),
    "train_FD004.txt": Original(61249, 249, "5432f0b76f957b56"),
    "test_FD004.txt": Original(41214, 248, "ef205d64eb6ddc29"),
    "RUL_FD004.txt": Original(248, 248, "6e27c1b1fad75330"),
}
"""By NASA's file names. (NASA's readme swaps the numbers of engines in FD004.)"""


def fingerprint(*columns: npt.NDArray[np.generic]) -> str:
    """Return a short SHA-256 of numbers as 64-bit floats.

    Example:
        >>> fingerprint(np.array([112, 98])) == fingerprint(np.array([112.0, 98.0]))
        True
    """
    digest = hashlib.sha256()
    for column in columns:
        digest.update(np.ascontiguousarray(column, dtype="<f8").tobytes())
    return digest.hexdigest()[:16]


def difference(name: str, found: Original) -> str | None:
    """Return how a file differs from NASA's file of the same name, or None if it does not.

    Args:
        name: Name of the file: ``"train_FD001.txt"``.
        found: Contents of the file.

    Example:
        >>> difference("RUL_FD001.txt", Original(90, 90, "0123456789abcdef"))
        'it has 90 rows'
    """
    expected = ORIGINALS[name]
    if found.fingerprint == expected.fingerprint:
        return None
    for other, original in ORIGINALS.items():
        if found.fingerprint == original.fingerprint:
            return f"it has the numbers of NASA's {other}"
    same_size = (found.rows, found.engines) == (expected.rows, expected.engines)
    return "it has as many, but some numbers differ" if same_size else f"it has {found}"
