"""The report as one self-contained HTML page, without scripts, external fonts or external images."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_gradnorm.experiments.report.comparison import Comparison
from lightning_gradnorm.experiments.report.plots import Figure, figures
from lightning_gradnorm.experiments.report.summary import Cell, Sheet, run_sheets, sheets, summary, title_of
from lightning_gradnorm.experiments.report.svg import dash, element, marker, style, text

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1d21; --soft: #5a616c; --rule: #d9dce1; --box: #f5f6f8;
  --c0: #1b1d21; --c1: #0072b2; --c2: #d55e00; --c3: #009e73; --c4: #cc79a7; --c5: #b98300; --c6: #2f9bd6; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #15171b; --ink: #e8eaee; --soft: #a3abb8;
  --rule: #363b44; --box: #1e2127; --c0: #e8eaee; --c1: #4c9be8; --c2: #f0803c; --c3: #2bc598; --c4: #e29fc6;
  --c5: #e6b422; --c6: #8fd3ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem clamp(.75rem, 3vw, 2rem) 3rem; max-width: 84rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; overflow-wrap: anywhere; }
p, ul.summary { max-width: 70ch; margin: .4rem 0; overflow-wrap: anywhere; }
ul.summary { padding-left: 1.1rem; }
.note, footer { color: var(--soft); font-size: .875rem; }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; border: 1px solid var(--rule); border-radius: 6px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
thead th { background: var(--box); font-weight: 600; vertical-align: bottom; white-space: normal; }
tr > :first-child { text-align: left; position: sticky; left: 0; background: var(--paper); max-width: 45vw;
  white-space: normal; overflow-wrap: break-word; min-width: 8.5rem; }
thead tr > :first-child { background: var(--box); }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 500; }
.words th, .words td { text-align: left; }
.words td:last-child { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
small { display: block; white-space: pre; color: var(--soft); font-size: .9em; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .875rem; font-weight: 600; overflow-wrap: anywhere; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem 1.25rem; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 2rem; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; list-style: none; margin: .5rem 0 .75rem; padding: 0;
  font-size: .875rem; }
.legend li { display: flex; align-items: center; gap: .4rem; overflow-wrap: anywhere; }
.legend svg { width: 34px; height: 14px; flex: none; }
.wide { display: grid; gap: 1rem; } .wide .chart { max-width: 66rem; }
.chart { display: block; width: 100%; max-width: 28rem; height: auto; }
svg text { font-size: 11px; fill: var(--soft); font-family: inherit; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: var(--rule); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; }
.zero { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 5 4; }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.band { fill: var(--c); opacity: .14; } .bar { stroke: var(--c); stroke-width: 1.3; }
.mark { fill: var(--c); stroke: var(--paper); stroke-width: .8; vector-effect: non-scaling-stroke; } .faint { opacity: .6; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); }
.s4 { --c: var(--c4); } .s5 { --c: var(--c5); } .s6 { --c: var(--c6); }
details > summary { cursor: pointer; } details > summary h2 { display: inline-block; }
@page { size: landscape; margin: 12mm; }
@media print { body { padding: 0; max-width: none; font-size: 10pt; } h2, figcaption, .legend { break-after: avoid; }
  figure, tr { break-inside: avoid; } .scroll { overflow: visible; border: 0; } table { font-size: 7.5pt; }
  th, td { padding: .15rem .3rem; } tr > :first-child { position: static; min-width: 0; }
  .panels { grid-template-columns: 1fr 1fr 1fr; } .beside .panels { grid-template-columns: 1fr; }
  .mark, .line, .band, .bar { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(comparison: Comparison, origin: str) -> str:
    """Return the whole page.

    Args:
        comparison: the results. All text from runs is escaped.
        origin: a line with the command, the date and the versions.
    """
    title = title_of(comparison)
    without_results, all_runs = run_sheets(comparison)
    pictures = figures(comparison)
    parts = [
        element("h1", text(title)),
        element("ul", *(element("li", text(line)) for line in summary(comparison)), class_="summary"),
        *map(_sheet, sheets(comparison)),
        "" if without_results is None else _sheet(without_results),
        *_figures(pictures),
        _folded(all_runs),
        element("footer", element("p", text(origin))),
    ]
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<link rel="icon" href="data:,">',
        element("title", text(title)),
        element("style", _STYLE),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{chr(10).join(head)}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    )


def _sheet(sheet: Sheet) -> str:
    return element("section", element("h2", text(sheet.title)), _table(sheet), *_notes(sheet.notes))


def _folded(sheet: Sheet) -> str:
    heading = element("summary", element("h2", text(f"{sheet.title} ({len(sheet.rows)})")))
    return element("details", heading, _table(sheet), *_notes(sheet.notes))


def _table(sheet: Sheet) -> str:
    head = element("tr", *(element("th", text(name), scope="col") for name in sheet.header))
    rows = [
        element("tr", _cell(row[0], "th", scope="row"), *(_cell(cell, "td") for cell in row[1:])) for row in sheet.rows
    ]
    table = element("table", element("thead", head), element("tbody", *rows), class_="words" if sheet.words else None)
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label=sheet.title)


def _cell(cell: Cell, tag: str, **attributes: str) -> str:
    words = element("strong", text(cell.text)) if cell.strong else text(cell.text)
    return element(tag, words, element("small", text(cell.note)) if cell.note else "", **attributes)


def _notes(notes: Sequence[str]) -> list[str]:
    return [element("p", text(note), class_="note") for note in notes]


def _figures(pictures: Sequence[Figure]) -> list[str]:
    """Return the figures below each other, those with a single chart side by side if there is room."""
    small = [picture for picture in pictures if len(picture.panels) == 1 and not picture.is_wide]
    large = [picture for picture in pictures if picture not in small]
    beside = [element("div", *map(_figure, small), class_="beside")] if small else []
    return [*map(_figure, large), *beside]


def _figure(figure: Figure) -> str:
    panels = [
        element("figure", element("figcaption", text(panel.title)) if panel.title else "", panel.svg)
        for panel in figure.panels
    ]
    return element(
        "section",
        element("h2", text(figure.title)),
        element("p", text(figure.caption), class_="note"),
        _legend(figure),
        element("div", *panels, class_="wide" if figure.is_wide else "panels"),
    )


def _legend(figure: Figure) -> str:
    items = []
    for name, number in figure.legend:
        line = element("line", class_=f"line {style(number)}", x1=1, x2=33, y1=7, y2=7, stroke_dasharray=dash(number))
        sample = [line] if figure.is_line else []
        sample.append(marker(number, 17, 7, 4.0))
        items.append(
            element("li", element("svg", *sample, viewBox="0 0 34 14", aria_hidden="true"), element("span", text(name)))
        )
    return element("ul", *items, class_="legend") if items else ""
