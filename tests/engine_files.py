"""C-MAPSS's files written by hand: every number follows from unit, cycle and column, so tests can predict it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

PLACES = ((0, 0, 100), (10, 0.25, 100), (20, 0.7, 100), (25, 0.62, 60), (35, 0.84, 100), (42, 0.84, 100))
"""The settings of the six conditions."""


def place(unit: int, cycle: int) -> int:
    """The condition that a unit flies in, if there are six."""
    return (unit * 7 + cycle * 5 + cycle * cycle // 3) % 6


def settings(unit: int, cycle: int, conditions: int) -> list[float]:
    altitude, mach, throttle = PLACES[place(unit, cycle) if conditions > 1 else 0]
    return [
        round(altitude + 0.001 * math.sin(unit + cycle), 4),
        round(mach + 0.0002 * math.cos(unit * cycle), 4),
        throttle,
    ]


def sensor(unit: int, cycle: int, number: int, conditions: int) -> float:
    """Sensors 1, 5, 10 and so on do not change within a condition."""
    level = 100.0 * number * (1 + (place(unit, cycle) if conditions > 1 else 0))
    moves = number % 5 not in (0, 1)
    return round(level + (math.sin(3 * unit + number * cycle) + 0.05 * cycle * number if moves else 0.0), 4)


def row(unit: int, cycle: int, conditions: int = 1) -> list[float]:
    """The 26 numbers of a line."""
    sensors = [sensor(unit, cycle, number, conditions) for number in range(1, 22)]
    return [unit, cycle, *settings(unit, cycle, conditions), *sensors]


def lines(lengths: Sequence[int], conditions: int = 1, first: int = 1) -> list[str]:
    """The lines of a train or test file, with NASA's two blanks at the end of each."""
    return [
        " ".join(f"{number:g}" if i < 2 else f"{number:.4f}" for i, number in enumerate(row(unit, cycle, conditions)))
        + "  "
        for unit, length in enumerate(lengths, start=first)
        for cycle in range(1, length + 1)
    ]


def write_engines(
    root: Path,
    train: Sequence[int] = (5, 7, 4, 6),
    test: Sequence[int] = (4, 6, 3),
    rul: Sequence[float] = (9, 2, 40),
    subset: str = "FD001",
    conditions: int = 1,
) -> Path:
    """Write the three files of engines of these lengths; the test engines' numbers start at 1, as NASA's do."""
    root.mkdir(parents=True, exist_ok=True)
    (root / f"train_{subset}.txt").write_text("\n".join(lines(train, conditions)) + "\n")
    (root / f"test_{subset}.txt").write_text("\n".join(lines(test, conditions)) + "\n")
    (root / f"RUL_{subset}.txt").write_text("".join(f"{left:g} \n" for left in rul))
    return root
