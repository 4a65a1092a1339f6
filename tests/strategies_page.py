"""docs/strategies.md as data: what it says of each strategy, and what is left out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torchjd.aggregation
import torchjd.scalarization

import lightning_gradnorm
import lightning_gradnorm.strategies

PAGE = Path(__file__).parents[1] / "docs" / "strategies.md"
TEXT = PAGE.read_text()


class Row(NamedTuple):
    """One row of the table, without the typography."""

    name: str
    python: str
    needs: str
    remembers: str
    costs: str
    extra: str
    sums: str
    ranks: str
    tasks: str
    reference: str

    @property
    def fewest_tasks(self) -> int:
        return int(self.tasks.removeprefix("≥ "))


def table(under: str) -> list[list[str]]:
    """Return the cells of the first table after the line that begins so."""
    lines = TEXT[("\n" + TEXT).index(f"\n{under}") :].splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


ROWS = {row.name: row for row in (Row(*[cell.strip("`") for cell in cells]) for cells in table("# Strategies"))}
LEFT_OUT = {name.strip("`"): reason for names, reason in table("## What TorchJD has") for name in names.split(", ")}

_NAMES: dict[str, Any] = {
    **{name: getattr(torchjd.scalarization, name) for name in torchjd.scalarization.__all__},
    **{name: getattr(torchjd.aggregation, name) for name in torchjd.aggregation.__all__},
    **{name: getattr(lightning_gradnorm.strategies, name) for name in lightning_gradnorm.strategies.__all__},
    **{name: getattr(lightning_gradnorm, name) for name in lightning_gradnorm.__all__},
    "scalarization": torchjd.scalarization,
    "aggregation": torchjd.aggregation,
    "partial": partial,
}


def in_python(row: Row) -> Any:
    """Return the callback that the row's second column makes."""
    return eval(row.python, dict(_NAMES))
