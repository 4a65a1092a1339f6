"""The columns of C-MAPSS's files, and the numbers of engines in NASA's."""

from __future__ import annotations

from dataclasses import dataclass

SETTINGS = 3
"""Altitude in 1000 feet, Mach number, throttle resolver angle in degrees."""
ALL_SENSORS = 21
COLUMNS = (
    "unit",
    "cycle",
    *(f"setting {i + 1}" for i in range(SETTINGS)),
    *(f"sensor {i + 1}" for i in range(ALL_SENSORS)),
)
"""The columns of the train and test files."""

SENSORS = (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21)
"""The sensors that are commonly used. 1, 5, 18 and 19 never change within an operating condition, and neither does 16 at sea
level. Two omitted sensors show wear in some subsets: 6 in FD002 (its correlation with the remaining life, capped at 125
cycles, is -0.36), 10 in FD003 and FD004 (-0.50 and -0.36)."""


@dataclass(frozen=True)
class Subset:
    """One of C-MAPSS's four parts.

    Attributes:
        conditions: Number of operating conditions.
        faults: Number of fault modes: 1 if only the high-pressure compressor wears, 2 if it or the fan wears.
        train_engines: Number of engines in NASA's train file.
        test_engines: Number of engines in NASA's test file.
        first_rul: The first lines of NASA's RUL file, which identify it.
    """

    conditions: int
    faults: int
    train_engines: int
    test_engines: int
    first_rul: tuple[int, ...]


SUBSETS = {
    "FD001": Subset(1, 1, 100, 100, (112, 98, 69, 82, 91, 93, 91, 95, 111, 96)),
    "FD002": Subset(6, 1, 260, 259, (18, 79, 106, 110, 15, 155, 6, 90, 11, 79)),
    "FD003": Subset(1, 2, 100, 100, (44, 51, 27, 120, 101, 99, 71, 55, 55, 66)),
    "FD004": Subset(6, 2, 249, 248, (22, 39, 107, 75, 149, 78, 94, 14, 99, 162)),
}
