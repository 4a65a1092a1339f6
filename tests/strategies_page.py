"""docs/strategies.md as the site shows it: its rows, and the strategies that it leaves out."""

from __future__ import annotations

from functools import partial
from typing import Any

import strategy_tables
import torchjd.aggregation
import torchjd.scalarization

import lightning_gradnorm
import lightning_gradnorm.strategies
from lightning_gradnorm.experiments.registry import Strategy

TEXT = strategy_tables.filled((strategy_tables.ROOT / "docs" / "strategies.md").read_text(encoding="utf-8"))
ROWS: dict[str, Strategy] = {one.name: one for one in strategy_tables.strategies()}


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


def in_python(name: str) -> Any:
    """Return the callback that the second column of a row makes."""
    written = next(cells[1] for cells in table("# Strategies") if cells[0].startswith(f"[`{name}`]"))
    return eval(written.strip("`"), dict(_NAMES))
