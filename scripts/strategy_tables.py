"""The table of docs/strategies.md, and a page for each strategy on the site. Both are generated from the registry.

The table is committed, so that you can read it in a clone, where each name links to the strategy's file. On the site the same
link leads to the strategy's page, which exists only there.

Example:
    python scripts/strategy_tables.py        # updates docs/strategies.md
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from torchjd import _mixins

from lightning_gradnorm.experiments.registry import NEEDS, Strategy, read_strategies

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("strategies.md",)

COLUMNS: dict[str, Callable[[Strategy], str]] = {
    "`balancing=`": lambda one: f"[`{one.name}`](../conf/balancing/{one.name}.yaml)",
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
    """Return a page with its generated parts renewed: the table, and the names of strategies with negative weights.

    Each part is between a comment with its name and ``<!-- end -->``.
    """
    for name, made in (("strategies", lambda: f"\n\n{strategy_table()}\n\n"), ("negative weights", negative_weights)):
        begin, end = f"<!-- {name} -->", "<!-- end -->"
        before, found, rest = page.partition(begin)
        if found:
            page = f"{before}{begin}{made()}{end}{rest.partition(end)[2]}"
    return page


def on_the_site(page: str) -> str:
    """Return a page with links to the strategies' pages instead of their files.

    Example:
        >>> on_the_site("[`equal`](../conf/balancing/equal.yaml)")
        '[`equal`](strategies/equal.md)'
    """
    return re.sub(r"\]\(\.\./conf/balancing/(\w+)\.yaml\)", r"](strategies/\1.md)", page)


def main() -> None:
    _mixins.find_spec = lambda name: name  # type: ignore[assignment]  # solvers are described, not called
    for name in PAGES:
        file = ROOT / "docs" / name
        file.write_text(filled(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
