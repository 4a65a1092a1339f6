"""Prints a Markdown table of GradNorm's accuracy on other packages' models, and of the time it adds to a training step.

    .venv-third-party/bin/python scripts/third_party_times.py

Each round trains every model without GradNorm, with detected heads, and with `heads=None`, in turn, in one process.
A time is the CPU time from the start of a batch to the start of the next, the median over the steps. It is
divided by the plain time in the same round. The table has the median and the quartiles over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_gradnorm import GradNorm
from lightning_gradnorm.callbacks.packages import works_in_both_packages

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from third_party.exactness import Tape, distances
from third_party.projects import PROJECTS

SIZES: dict[str, dict[str, int]] = {
    "BERT": {"width": 128, "layers": 4, "batch": 16},
    "BERT with LoRA": {"width": 128, "layers": 4, "batch": 16},
    "TFT": {"width": 32, "batch": 64},
    "SCVI": {"width": 128, "batch": 128},
    "SCVI, adversarial": {"width": 128, "batch": 128},
    "chemprop": {"width": 300, "batch": 32},
    "neuromancer": {"width": 64, "batch": 128},
    "neuralforecast": {"width": 512, "batch": 256},
    "VAE experiment": {"width": 256, "batch": 64},
}
WAYS: dict[str, dict[str, Any] | None] = {"plain": None, "heads found": {}, "heads=None": {"heads": None}}
PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "peft",
    "pytorch-forecasting",
    "scvi-tools",
    "chemprop",
    "neuromancer",
    "neuralforecast",
)
WARM_UP = 10


class Clock(L.Callback):
    """Records when each batch starts."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def __deepcopy__(self, memo: Any) -> Clock:
        return self

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.process_time())

    def step(self) -> float:
        starts = self.starts[WARM_UP:]
        return statistics.median(later - start for start, later in pairwise(starts))


works_in_both_packages(Clock)


def step_time(name: str, gradnorm: dict[str, Any] | None, steps: int) -> float:
    """Return the CPU time of a step in seconds."""
    torch.manual_seed(0)
    project, clock = PROJECTS[name](**SIZES[name]), Clock()
    ours = [] if gradnorm is None else [GradNorm(**project.gradnorm, **gradnorm)]
    project.fit([clock, *ours], steps=steps)
    return clock.step()


def exactness(name: str, precision: str) -> float:
    """Return the largest difference of a weight from a double backward, with detected heads."""
    torch.manual_seed(0)
    project, tape = PROJECTS[name](), Tape()
    project.fit([tape, GradNorm(**project.gradnorm)], precision=precision)
    return distances(project, tape)[0]


def ratio(times: Sequence[float], plain: Sequence[float]) -> str:
    """Return the ratio to the plain step of the same round: median (quartiles)."""
    of_rounds = [time / base for time, base in zip(times, plain, strict=True)]
    low, middle, high = statistics.quantiles(of_rounds, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="at least 2")
    parser.add_argument("--steps", type=int, default=40, help=f"more than {WARM_UP + 2}")
    parser.add_argument("names", nargs="*", default=list(PROJECTS), metavar="MODEL", help=", ".join(PROJECTS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.chdir(tempfile.mkdtemp())  # some of them write logs
    times: dict[str, dict[str, list[float]]] = {name: {way: [] for way in WAYS} for name in arguments.names}
    for _ in range(arguments.rounds):
        for name, of_way in times.items():
            for way, gradnorm in WAYS.items():
                of_way[way].append(step_time(name, gradnorm, arguments.steps))
    print(f"{time.strftime('%Y-%m-%d')}, {', '.join(f'{one} {version(one)}' for one in PACKAGES)}\n")
    print("| model | float64 | float32 | plain step | heads found | `heads=None` |\n|---|---|---|---|---|---|")
    for name, of_way in times.items():
        exact = [f"{exactness(name, precision):.0e}" for precision in ("64-true", "32-true")]
        plain = of_way["plain"]
        ratios = [ratio(of_way[way], plain) for way in ("heads found", "heads=None")]
        cells = [name, *exact, f"{1000 * statistics.median(plain):.1f} ms", *ratios]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
