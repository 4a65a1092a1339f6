"""Summaries of measured times: quartiles, ratios, floors, the noise of a machine, and tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

NOISE = 0.05
"""How far equal weights may be from equal weights before we call the machine too noisy."""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Return a table whose first ``texts`` columns are text and the others numbers."""
    rule = "|---" * texts + "|---:" * (len(columns) - texts) + "|"
    return "\n".join([table_line(columns), rule, *map(table_line, rows)])


def table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]


def median_and_quartiles(values: Sequence[float], digits: int = 2, more: str = "") -> str:
    """Return the median, with the quartiles and ``more`` in brackets."""
    low, high = quartiles(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f}{more})"


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Return the median over the rounds of the ratios."""
    return statistics.median(ratios(times, reference))


def ratios(times: Sequence[float], reference: Sequence[float]) -> list[float]:
    return [ours / theirs for ours, theirs in zip(times, reference, strict=True)]


def ratio_and_quartiles(times: Sequence[float], reference: Sequence[float], more: str = "") -> str:
    """Return `ratio`, with the quartiles and ``more`` in brackets."""
    return median_and_quartiles(ratios(times, reference), more=more)


def floors(step: Sequence[float], equal: Sequence[float], tasks: int, weight_gradients: Sequence[float]) -> list[float]:
    """Return the overhead of each run over the run of equal weights before it, in units of T weight-gradients."""
    floor = tasks * statistics.median(weight_gradients)
    return [(ours - theirs) / floor for ours, theirs in zip(step, equal, strict=True)]


def equal_against_equal(times: Sequence[float]) -> list[float]:
    """Return the ratio of each run with equal weights to the one before it; 1 on a machine without noise."""
    return [later / sooner for sooner, later in pairwise(times)] or [1.0]


def noise_cell(times: Sequence[float]) -> str:
    """Return how much runs with equal weights differ, marked if it is too much."""
    found = equal_against_equal(times)
    return median_and_quartiles(found) + (" noisy" if is_noisy(times) else "")


def is_noisy(times: Sequence[float]) -> bool:
    """Return True if runs with equal weights differ too much from one another to compare anything with them."""
    low, high = quartiles(equal_against_equal(times))
    return low < 1 - NOISE or high > 1 + NOISE
