"""Prints a Markdown table of GradNorm's accuracy on other packages' models, and of the time it adds to a training step.

    .venv-third-party/bin/python scripts/third_party_times.py

Each round trains every model with detected heads and with `heads=None`, and without GradNorm before each, in one process.
A time is the CPU time from the start of a batch to the start of the next, the median over the steps. It is divided by
the plain time before it. The column after the ratio gives the difference in floors: T gradients of the shared layer's weight,
measured between the forward and the backward pass of a plain training in the same round. The table has the median and the
quartiles over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from benchmarking.summaries import floors, median_and_quartiles, noise_cell, ratio_and_quartiles, table
from torch import Tensor

from lightning_gradnorm import GradNorm
from lightning_gradnorm.callbacks.packages import works_in_both_packages
from lightning_gradnorm.engine.plan import Plan
from lightning_gradnorm.gradients.graph import tensors_with_gradient

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
WAYS: dict[str, dict[str, Any]] = {"heads found": {}, "heads=None": {"heads": None}}
COLUMNS = ("model", "float64", "float32", "plain step", "T", "weight-gradient", "plain against plain")
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


@works_in_both_packages
class Recorder(L.Callback):
    """A callback that a package may copy together with its model, and that still records in one place."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class Clock(Recorder):
    """Records when each batch starts."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.process_time())


class Finding(Recorder):
    """Records what GradNorm has found in a model."""

    plan: Plan

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        gradnorm = next(one for one in trainer.callbacks if isinstance(one, GradNorm))
        assert gradnorm._engine is not None
        self.plan = gradnorm._engine.inspection.plan


class WeightGradient(Recorder):
    """Times one gradient of W in each step of a plain training, from the input of a head, or from W's layer without one."""

    def __init__(self, plan: Plan) -> None:
        self._names = list(plan.shared_layer)
        self._head = next(iter((plan.heads or {}).values()), None)
        self._seeds: list[tuple[Tensor, Tensor]] = []
        self.seconds: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._head is None:
            layer = pl_module.get_submodule(self._names[0].rpartition(".")[0])
            layer.register_forward_hook(lambda _, __, output: self._take(output))
        else:
            head = pl_module.get_submodule(self._head)
            head.register_forward_pre_hook(lambda _, *arguments: self._take(arguments), with_kwargs=True)

    def _take(self, tree: Any) -> None:
        self._seeds = [(z, torch.randn_like(z)) for z in tensors_with_gradient(tree)]

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if not self._seeds:
            return  # the backward pass of another optimizer
        outputs, seeds = zip(*self._seeds, strict=True)
        self._seeds = []
        W = [pl_module.get_parameter(name) for name in self._names]
        began = time.process_time()
        torch.autograd.grad(outputs, W, seeds, retain_graph=True)
        self.seconds.append(time.process_time() - began)


def train(name: str, recorder: Recorder, steps: int, gradnorm: dict[str, Any] | None = None) -> None:
    """Train a model, without GradNorm unless its arguments are given."""
    torch.manual_seed(0)
    project = PROJECTS[name](**SIZES[name])
    ours = [] if gradnorm is None else [GradNorm(**project.gradnorm, **gradnorm)]
    project.fit([recorder, *ours], steps=steps)


def step_time(name: str, steps: int, gradnorm: dict[str, Any] | None = None) -> float:
    """Return the CPU time of a step in seconds."""
    train(name, clock := Clock(), steps, gradnorm)
    starts = clock.starts[WARM_UP:]
    return statistics.median(later - start for start, later in pairwise(starts))


class Times:
    """The CPU times of one model in each round, in seconds."""

    def __init__(self, name: str, steps: int) -> None:
        train(name, finding := Finding(), 3, {})
        self._name, self._steps, self._plan = name, steps, finding.plan
        self.weight_gradients: list[float] = []
        self.of_way: dict[str, list[float]] = {way: [] for way in WAYS}
        self.plain: dict[str, list[float]] = {way: [] for way in WAYS}
        """Of the plain training before each way."""

    def measure(self) -> None:
        """Measure one round."""
        train(self._name, gradient := WeightGradient(self._plan), self._steps)
        self.weight_gradients.append(statistics.median(gradient.seconds[WARM_UP:]))
        for way, gradnorm in WAYS.items():
            self.plain[way].append(step_time(self._name, self._steps))
            self.of_way[way].append(step_time(self._name, self._steps, gradnorm))

    def cells(self) -> list[str]:
        """Return the model's cells in the table."""
        tasks = len(PROJECTS[self._name]().gradnorm["tasks"])
        plain = [step for of_round in zip(*self.plain.values(), strict=True) for step in of_round]
        one = median_and_quartiles([1000 * seconds for seconds in self.weight_gradients], 3)
        cells = [f"{1000 * statistics.median(plain):.1f} ms", str(tasks), f"{one} ms", noise_cell(plain)]
        for way, times in self.of_way.items():
            in_floors = floors(times, self.plain[way], tasks, self.weight_gradients)
            cells += [ratio_and_quartiles(times, self.plain[way]), median_and_quartiles(in_floors)]
        return cells


def exactness(name: str, precision: str) -> float:
    """Return the largest difference of a weight from a double backward, with detected heads."""
    torch.manual_seed(0)
    project, tape = PROJECTS[name](), Tape()
    project.fit([tape, GradNorm(**project.gradnorm)], precision=precision)
    return distances(project, tape)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="at least 2")
    parser.add_argument("--steps", type=int, default=40, help=f"more than {WARM_UP + 2}")
    parser.add_argument("names", nargs="*", default=list(PROJECTS), metavar="MODEL", help=", ".join(PROJECTS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.chdir(tempfile.mkdtemp())  # some of them write logs
    times = {name: Times(name, arguments.steps) for name in arguments.names}
    for _ in range(arguments.rounds):
        for of_model in times.values():
            of_model.measure()
    print(f"{time.strftime('%Y-%m-%d')}, {', '.join(f'{one} {version(one)}' for one in PACKAGES)}\n")
    columns = [*COLUMNS, *(column for way in WAYS for column in (way, "in floors"))]
    rows = [
        [name, *(f"{exactness(name, bits):.0e}" for bits in ("64-true", "32-true")), *of_model.cells()]
        for name, of_model in times.items()
    ]
    print(table(columns, rows))


if __name__ == "__main__":
    main()
