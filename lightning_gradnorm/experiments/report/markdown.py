"""The report as Markdown: its text and tables."""

from __future__ import annotations

import re

from lightning_gradnorm.experiments.report.comparison import Comparison
from lightning_gradnorm.experiments.report.summary import Cell, Sheet, run_sheets, sheets, summary, title_of


def markdown(comparison: Comparison, origin: str) -> str:
    """Return the report.

    Args:
        comparison: the results.
        origin: a line with the command, the date and the versions.
    """
    without_results, _ = run_sheets(comparison)
    parts = [f"# {plain(title_of(comparison))}", *(f"- {plain(line)}" for line in summary(comparison))]
    text = parts[0] + "\n\n" + "\n".join(parts[1:]) + "\n"
    for sheet in (*sheets(comparison), without_results):
        if sheet is not None:
            text += f"\n{_sheet(sheet)}"
    return f"{text}\n{plain(origin)}\n"


def _sheet(sheet: Sheet) -> str:
    lines = [f"## {plain(sheet.title)}", "", _row([plain(name) for name in sheet.header])]
    lines.append(_row(["---" if sheet.words or not number else "---:" for number in range(len(sheet.header))]))
    lines += [_row([_cell(cell) for cell in row]) for row in sheet.rows]
    lines += ["", *map(plain, sheet.notes)] if sheet.notes else []
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    words = plain(cell.text)
    words = f"**{words}**" if cell.strong and words else words
    return f"{words} {plain(cell.note)}" if cell.note else words


def plain(text: str) -> str:
    r"""Return text escaped for Markdown, on one line.

    Example:
        >>> plain("a|b <script> *x*\n_y_")
        'a\\|b &lt;script&gt; \\*x\\* \\_y\\_'
    """
    one_line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", one_line)
