"""The picture of the ratios: a panel for each network, a line for each way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter, ScalarFormatter

# Okabe and Ito's, which the colour-blind tell apart; markers and dashes say the same once more.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"
DASHES = ("-", "--", ":")


@dataclass
class Line:
    """A way, and its ratio to equal weights by network and number of tasks."""

    name: str
    ratios: dict[str, dict[int, float]] = field(default_factory=dict)

    @classmethod
    def empty(cls, names: Sequence[str]) -> list[Line]:
        """Return lines without points."""
        return [cls(name) for name in names]

    def add(self, kind: str, tasks: int, ratio: float) -> None:
        self.ratios.setdefault(kind, {})[tasks] = ratio


def draw_ratios(path: Path, lines: Sequence[Line]) -> bool:
    """Draw the networks that were measured with more than one T; say whether there is one."""
    kinds = list(dict.fromkeys(kind for line in lines for kind, of_kind in line.ratios.items() if len(of_kind) > 1))
    if not kinds:
        return False
    figure, panels = plt.subplots(
        1, len(kinds), figsize=(2.4 + 3.2 * len(kinds), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, kind in zip(panels[0], kinds, strict=True):
        for place, line in enumerate(lines):
            points = sorted(line.ratios.get(kind, {}).items())
            panel.plot(
                [tasks for tasks, _ in points],
                [ratio for _, ratio in points],
                color=COLOURS[place % len(COLOURS)],
                marker=MARKERS[place % len(MARKERS)],
                linestyle=DASHES[place // len(COLOURS) % len(DASHES)],
                markersize=5,
                label=line.name,
            )
        panel.axhline(1, color="#777777", linewidth=1)
        panel.set(title=kind, xlabel="T, number of tasks", xscale="log", yscale="log")
        panel.set_xticks(sorted({tasks for line in lines for tasks in line.ratios.get(kind, {})}))
        panel.set_yticks([1, 1.5, 2, 3, 5, 10, 20, 50])
        panel.grid(alpha=0.3)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(ScalarFormatter())
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
