"""The table of docs/strategies.md and a page for each strategy, generated from the registry when the site is built.

Example:
    python scripts/strategy_tables.py        # prints the table and all pages
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from lightning_gradnorm.experiments.registry import NEEDS, Strategy, read_strategies

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("strategies.md",)

COLUMNS: dict[str, Callable[[Strategy], str]] = {
    "`balancing=`": lambda one: f"[`{one.name}`](strategies/{one.name}.md)",
    "in Python": lambda one: "–" if one.callback is None else f"`{one.callback}`",
    "what it does": lambda one: one.summary.partition(": ")[2].partition(". ")[0].rstrip(".") or one.summary,
    "cost besides the backward pass": lambda one: one.costs,
}
DETAILS: dict[str, Callable[[Strategy], str]] = {
    "needs": lambda one: one.needs,
    "cost besides the backward pass": lambda one: one.costs,
    "state in the checkpoint": lambda one: one.remembers,
    "weights sum to": lambda one: one.weights_sum_to + (", may be negative" if one.weights_may_be_negative else ""),
    "several ranks": lambda one: one.on_ranks,
    "tasks": lambda one: f"≥ {one.fewest_tasks}",
    "source": lambda one: citation(one.reference) or "–",
}


@cache
def strategies() -> tuple[Strategy, ...]:
    """Return all strategies, the cheapest kind first."""
    found = read_strategies(ROOT / "conf").values()
    return tuple(one for kind in NEEDS for one in found if one.kind == kind)


def strategy_table() -> str:
    """Return a table of what each strategy does and costs."""
    return _table([list(COLUMNS), *([cell(one) for cell in COLUMNS.values()] for one in strategies())])


def detail_page(one: Strategy) -> str:
    """Return the page of one strategy."""
    in_python = "Leave the callback out." if one.callback is None else f"`{one.callback}`"
    parts = [
        f"# {one.name}",
        one.summary,
        f"**Formula:** {typeset(one.formula)}",
        f"**Command line:** `gradnorm-train balancing={one.name}` ([options](../configuration/balancing.md#{one.name}))",
        f"**Python:** {in_python}",
        _table([["", ""], *([name, cell(one)] for name, cell in DETAILS.items())]),
        "T tasks with losses L<sub>i</sub>; g<sub>i</sub> is the gradient of task i at the place that the strategy uses; M is "
        "the T × T matrix of their inner products, 1 a vector of ones, Δ the set of nonnegative weights that sum to 1. "
        "[What the rows mean](../strategies.md#what-the-rows-mean).",
    ]
    return "\n\n".join(parts) + "\n"


def negative_weights() -> str:
    """Return the names of the strategies whose weights may be negative."""
    return ", ".join(sorted(f"`{one.name}`" for one in strategies() if one.weights_may_be_negative))


def citation(reference: str) -> str:
    """Return a source with at most two authors and a link to arXiv.

    Example:
        >>> citation("Liu, Liu, Jin, Stone, Liu, NeurIPS 2021, arXiv 2110.14048")
        'Liu et al., NeurIPS 2021, [2110.14048](https://arxiv.org/abs/2110.14048)'
    """
    return "; ".join(_shortened(source) for source in reference.split("; "))


def _shortened(source: str) -> str:
    parts = source.split(", ")
    is_author = [re.fullmatch(r"[A-Z][\w-]+", part) is not None for part in parts]
    authors = is_author.index(False) if False in is_author else len(parts)
    first = [f"{parts[0]} et al."] if authors > 2 else parts[:authors]
    return re.sub(r"arXiv (\d+\.\d+)", r"[\1](https://arxiv.org/abs/\1)", ", ".join([*first, *parts[authors:]]))


def typeset(formula: str) -> str:
    """Return a formula with indices and exponents in HTML, for a table cell.

    Example:
        >>> typeset("e^{−s_i} L_i, not min_weight or `a_b`")
        'e<sup>−s<sub>i</sub></sup> L<sub>i</sub>, not min_weight or `a_b`'
    """
    pieces = re.split(r"(`[^`]*`)", formula)
    return "".join(piece if piece.startswith("`") else _marked(piece) for piece in pieces).replace("|", "\\|")


def _marked(text: str) -> str:
    for mark, tag in (("_", "sub"), (r"\^", "sup")):
        found = rf"{mark}(?:\{{([^{{}}]*)\}}|(\w)(?![A-Za-z0-9_]))"
        text = re.sub(found, lambda one, tag=tag: f"<{tag}>{one[1] or one[2]}</{tag}>", text)  # type: ignore[misc]
    return text


def _table(rows: list[list[str]]) -> str:
    first, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([first, "|" + " --- |" * len(rows[0]), *others])


def filled(page: str) -> str:
    """Return a page with the table in place of its comment ``<!-- strategies -->``."""
    page = page.replace("<!-- strategies -->", strategy_table()) if "<!-- strategies -->" in page else page
    return page.replace("<!-- negative weights -->", negative_weights()) if "<!-- negative" in page else page


if __name__ == "__main__":
    for name in PAGES:
        print(filled((ROOT / "docs" / name).read_text(encoding="utf-8")))
    for one in strategies():
        print(detail_page(one))
