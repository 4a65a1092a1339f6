"""Draws the ratios: one panel per network, one line per way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

# Okabe and Ito's colors, distinct for color-blind readers. Markers and dashes repeat the distinction.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
MARKERS = "osD^vPX*"


@dataclass
class Line:
    """A way, if it is ours, and its ratio to equal weights by network and number of tasks."""

    name: str
    is_ours: bool = True
    ratios: dict[str, dict[int, float]] = field(default_factory=dict)

    def add(self, kind: str, tasks: int, ratio: float) -> None:
        self.ratios.setdefault(kind, {})[tasks] = ratio


def draw_ratios(path: Path, lines: Sequence[Line]) -> bool:
    """Draw the networks measured with more than one T, ours solid, others' dashed. Return True if there are any."""
    kinds = list(dict.fromkeys(kind for line in lines for kind, of_kind in line.ratios.items() if len(of_kind) > 1))
    if not kinds:
        return False
    places = {line.name: [one.name for one in lines if one.is_ours == line.is_ours].index(line.name) for line in lines}
    figure, panels = plt.subplots(
        1, len(kinds), figsize=(2.4 + 3.2 * len(kinds), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, kind in zip(panels[0], kinds, strict=True):
        for line in lines:
            place = places[line.name]
            points = sorted(line.ratios.get(kind, {}).items())
            panel.plot(
                [tasks for tasks, _ in points],
                [ratio for _, ratio in points],
                color=COLORS[place % len(COLORS)],
                marker=MARKERS[place % len(MARKERS)],
                linestyle="-" if line.is_ours else "--",
                markerfacecolor=None if line.is_ours else "white",
                markersize=5,
                label=line.name,
            )
        panel.axhline(1, color="#777777", linewidth=1)
        panel.set(title=kind, xlabel="T, number of tasks", xscale="log", yscale="log")
        panel.set_xticks(sorted({tasks for line in lines for tasks in line.ratios.get(kind, {})}))
        panel.set_yticks([1, 1.5, 2, 3, 5, 10, 20, 50])
        panel.grid(alpha=0.3)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        panel.minorticks_off()
    highest = max(ratio for line in lines for of_kind in line.ratios.values() for ratio in of_kind.values())
    panels[0][0].set(ylabel="time of a step ÷ equal weights", ylim=(0.9, 1.2 * max(highest, 1.5)))
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
