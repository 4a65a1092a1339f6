"""Reads C-MAPSS's text files.

Blanks separate the columns and end the lines. Some copies have a header or a byte order mark, or end with empty
lines, which are ignored. Anything else that is invalid is an error with file and line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lightning_gradnorm.experiments.problems.engines.cmapss.columns import COLUMNS, SETTINGS
from lightning_gradnorm.experiments.problems.engines.cmapss.errors import existing, wrong

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

Scalar = TypeVar("Scalar", bound=np.generic)

_FETCH_AGAIN = "Fetch the file again."


@dataclass(frozen=True)
class Engines:
    """The concatenated records of some engines.

    Attributes:
        units: The engines' numbers in the file, shape ``(engines,)``.
        lengths: Number of recorded cycles of each engine, shape ``(engines,)``.
        settings: Shape ``(cycles, 3)``, concatenated over the engines: altitude, Mach number, throttle.
        sensors: Shape ``(cycles, 21)``.

    Example:
        >>> engines = Engines(np.array([1, 2]), np.array([3, 2]), np.zeros((5, 3)), np.zeros((5, 21)))
        >>> engines.of_rows(np.array([7, 8])).tolist()
        [7, 7, 7, 8, 8]
    """

    units: Integers
    lengths: Integers
    settings: Array
    sensors: Array

    @property
    def starts(self) -> Integers:
        """Row of each engine's first cycle, shape ``(engines,)``."""
        return np.cumsum(self.lengths) - self.lengths

    def of_rows(self, values: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """Return the value of each cycle's engine: ``(engines,)`` to ``(cycles,)``."""
        return np.repeat(values, self.lengths)

    def chosen(self, engines: npt.NDArray[np.bool_]) -> Engines:
        """Return the engines selected by the mask, shape ``(engines,)``, in the same order."""
        rows = self.of_rows(engines)
        return Engines(self.units[engines], self.lengths[engines], self.settings[rows], self.sensors[rows])


def read_engines(file: Path, what: str = "the engines") -> Engines:
    """Read a train or a test file.

    Args:
        file: The file.
        what: Description of its contents for the error if it is missing.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A line does not have 26 columns, or contains something that is not a number; units are not in order or
            appear twice; the cycles of a unit are not 1, 2, 3 ...
    """
    table, lines = _read_table(existing(file, what), COLUMNS)
    for column in (0, 1):
        _first_wrong(
            file, lines, table[:, column] != np.floor(table[:, column]), table[:, column],
            f"have a whole number as {COLUMNS[column]}",
        )  # fmt: skip
    unit, cycle = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
    first = np.r_[True, unit[1:] != unit[:-1]]
    _check_order(file, lines, unit)
    starts = np.flatnonzero(first)
    lengths = np.diff(np.r_[starts, len(unit)])
    expected = np.arange(len(unit)) - np.repeat(starts, lengths) + 1
    wrong_cycles = np.flatnonzero(cycle != expected)
    if len(wrong_cycles):
        row = wrong_cycles[0]
        wrong(
            f"unit {unit[row]} in line {lines[row]} of {file}",
            f"be at cycle {expected[row]}, since a unit's cycles count from 1 without a gap",
            f"cycle {cycle[row]}",
            "Lines are missing, repeated or out of order: fetch the file again.",
        )
    return Engines(unit[first], lengths, table[:, 2 : 2 + SETTINGS], table[:, 2 + SETTINGS :])


def read_rul(file: Path) -> Array:
    """Read a RUL file: for each test engine, in order, the cycles left after its last recorded one.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A line has more than one column, something that is not a number, or a negative number.
    """
    table, lines = _read_table(existing(file, "the test engines' remaining useful life"), ("remaining useful life",))
    rul = table[:, 0]
    _first_wrong(file, lines, rul < 0, rul, "have cycles left, 0 or more")
    return rul


def _read_table(file: Path, columns: tuple[str, ...]) -> tuple[Array, list[int]]:
    """Return the numbers, shape ``(rows, columns)``, and the line number of each row."""
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    rows = [(number, line.split()) for number, line in enumerate(text.split("\n"), start=1)]
    rows = [(number, fields) for number, fields in rows if fields]
    if rows and _number(rows[0][1][0]) is None:
        del rows[0]  # a header
    if not rows:
        wrong(f"{file}", "have lines of numbers", "none", "Fetch the file again.")
    for number, fields in rows:
        if len(fields) != len(columns):
            wrong(
                f"line {number} of {file}",
                f"have {len(columns)} column{'s' * (len(columns) > 1)}, separated by blanks",
                f"{len(fields)} ({_shortened(' '.join(fields))})",
                _FETCH_AGAIN,
            )
    count = len(rows) * len(columns)
    try:
        values = np.fromiter((float(word) for _, fields in rows for word in fields), dtype=np.float64, count=count)
        sound = bool(np.isfinite(values).all())
    except ValueError:
        sound = False
    if not sound:
        for number, fields in rows:
            for column, word in zip(columns, fields, strict=True):
                if _number(word) is None:
                    wrong(f"{column} in line {number} of {file}", "be a number", repr(word), _FETCH_AGAIN)
    return values.reshape(len(rows), len(columns)), [number for number, _ in rows]


def _number(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def _check_order(file: Path, lines: list[int], unit: Integers) -> None:
    back = np.flatnonzero(np.diff(unit) < 0)
    if len(back):
        row = back[0] + 1
        wrong(
            f"line {lines[row]} of {file}",
            f"belong to unit {unit[row - 1]} or a later one, since units are in order and contiguous",
            f"unit {unit[row]} after unit {unit[row - 1]}",
            "The lines were reordered: fetch the file again.",
        )


def _first_wrong(file: Path, lines: list[int], bad: npt.NDArray[np.bool_], values: Array, expected: str) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        wrong(f"line {lines[row]} of {file}", expected, f"{values[row]:g}", _FETCH_AGAIN)
