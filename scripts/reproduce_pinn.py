"""Physics-informed networks: the error of the solution and the cost of each strategy.

    python scripts/reproduce_pinn.py             # writes docs/results/pinn.md; 80 minutes on one core
    python scripts/reproduce_pinn.py --problems burgers --arms equal "GradNorm α 1"
    python scripts/reproduce_pinn.py --quick     # a smoke test with two seeds and few steps; writes outputs/

The problems are experiment=pinn_…, trained in a Trainer without loggers and checkpoints. Each finished run is a line of the CSV
--runs and is not repeated, so the command can be stopped and started again. Lines of other settings are kept and ignored.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from pages import be_quiet, corrected_tests, write_page
from torchjd.aggregation import Aggregator, ConFIG, UPGrad

from lightning_gradnorm import (
    Aggregation,
    FixedWeights,
    GradNorm,
    InverseNorm,
    LRAnnealing,
    NormWeighting,
    NTKWeights,
    Scalarization,
)
from lightning_gradnorm.experiments.cli.build import build
from lightning_gradnorm.experiments.cli.config import conf_dir, register
from lightning_gradnorm.strategies import NormFormula, ReLoBRaLo, SoftAdapt, Uncertainty

PROBLEMS = {"helmholtz": "Helmholtz", "burgers": "Burgers", "plate": "Kirchhoff's plate"}
EVERY = 10
"""Strategies that need gradient norms read them every this many steps."""
STATIC, BEST_STATIC = "static", "best static"
DRAWS = 20
METRIC = "relative_l2"


def over_the_network(formula: NormFormula) -> L.Callback:
    return NormWeighting(formula, shared_layer="all")


def aggregation(aggregator: Aggregator) -> L.Callback:
    return Aggregation(aggregator, at="parameters")


ARMS: dict[str, Callable[[], L.Callback | None]] = {
    "equal": lambda: None,
    "GradNorm α 0": partial(GradNorm, alpha=0.0, update_every=EVERY),
    "GradNorm α 1": partial(GradNorm, alpha=1.0, update_every=EVERY),
    "GradNorm α 1.5": partial(GradNorm, alpha=1.5, update_every=EVERY),
    "InverseNorm": lambda: over_the_network(InverseNorm(update_every=EVERY)),
    "LRAnnealing": lambda: over_the_network(LRAnnealing("pde", update_every=EVERY)),
    "LRAnnealing, L2": lambda: over_the_network(LRAnnealing("pde", norm="l2", update_every=EVERY)),
    "NTK": lambda: over_the_network(NTKWeights(update_every=EVERY)),
    "ReLoBRaLo": partial(Scalarization, ReLoBRaLo),
    "SoftAdapt": partial(Scalarization, SoftAdapt),
    "uncertainty": partial(Scalarization, Uncertainty),
    "UPGrad": lambda: aggregation(UPGrad()),
    "ConFIG": lambda: aggregation(ConFIG()),
}
"""Functions that create the strategies. `best static` comes in addition."""


def static_weights(tasks: Sequence[str], draw: int) -> dict[str, float]:
    """Return the weights of a draw, with logarithms uniform over four decades, scaled to the sum T."""
    logs = np.random.default_rng([draw, len(tasks)]).uniform(-2, 2, size=len(tasks))
    weights = 10**logs
    return dict(zip(tasks, (len(tasks) * weights / weights.sum()).tolist(), strict=True))


@dataclass(frozen=True)
class Result:
    """One line of the CSV."""

    problem: str
    arm: str
    seed: int
    settings: str
    """Everything else that the result depends on: the configuration as JSON, without its seed."""
    test: float
    """Final relative L2 error on the test grid."""
    val: float
    seconds: float
    """CPU time of the training."""
    steps: int
    weights: str
    """Final weights as JSON by task; empty for strategies without weights."""


Found = dict[tuple[str, str, int], Result]


def config_of(problem: str, seed: int, epochs: int | None, steps: int | None) -> DictConfig:
    """Return the configuration of the experiment."""
    register()
    more = [] if epochs is None else [f"trainer.max_epochs={epochs}"]
    more += [] if steps is None else [f"data.steps_per_epoch={steps}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=[f"experiment=pinn_{problem}", f"seed={seed}", "paths.run_dir=none", *more])


def settings_of(config: DictConfig, arm: str) -> str:
    """Return everything that a result depends on, besides problem, arm and seed."""
    plain = {group: OmegaConf.to_container(config[group], resolve=True) for group in ("data", "model")}
    plain["data"].pop("seed")
    used = GradNorm.__name__ in arm or arm in ("InverseNorm", "LRAnnealing", "LRAnnealing, L2", "NTK")
    return json.dumps(
        {**plain, "epochs": config.trainer.max_epochs, **({"every": EVERY} if used else {})}, sort_keys=True
    )


class Clock(L.Callback):
    """Adds up the CPU time of the training."""

    seconds = 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        self._began = time.process_time()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds += time.process_time() - self._began


def train(problem: str, arm: str, config: DictConfig, strategy: L.Callback | None) -> Result:
    """Train once and measure the error at the end."""
    L.seed_everything(config.seed, verbose=False)
    data, model = build(config, "data"), build(config, "model")
    clock = Clock()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=config.trainer.max_epochs,
        check_val_every_n_epoch=config.trainer.max_epochs,
        num_sanity_val_steps=0,
        log_every_n_steps=10**9,
        callbacks=[clock] if strategy is None else [strategy, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    val = float(trainer.callback_metrics[f"val/{METRIC}"])
    steps = trainer.global_step
    trainer.test(model, datamodule=data, verbose=False)
    test = float(trainer.callback_metrics[f"test/{METRIC}"])
    weights = getattr(strategy, "weights", None)
    shown = json.dumps({task: float(weight) for task, weight in weights.items()}) if weights else ""
    return Result(problem, arm, config.seed, settings_of(config, arm), test, val, clock.seconds, steps, shown)


def refuse_what_fails(arm: str) -> None:
    """Train two steps with a strategy. Exit before hours of training if it fails."""
    try:
        train("poisson", arm, config_of("poisson", 0, epochs=1, steps=2), ARMS[arm]())
    except (TypeError, ValueError) as error:
        sys.exit(f"reproduce_pinn: {arm} fails ({str(error).split(';')[0]}); choose others with --arms.")


# ---- finished runs ---------------------------------------------------------------------------------------------------


def read_runs(file: Path) -> list[Result]:
    """Return the lines of the CSV. Skips an incomplete last line, from stopping the command."""
    if not file.is_file():
        return []
    kinds = {"seed": int, "steps": int, "test": float, "val": float, "seconds": float}
    found = []
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if None not in row.values():
                found.append(Result(**{name: kinds.get(name, str)(value) for name, value in row.items()}))
    return found


def append_run(file: Path, result: Result) -> None:
    """Write a line at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    is_new = not file.is_file()
    if not is_new and not file.read_bytes().endswith(b"\n"):
        whole = file.read_bytes()
        file.write_bytes(whole[: whole.rfind(b"\n") + 1])  # without an incomplete line
    with file.open("a", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, fieldnames=list(asdict(result)))
        writer.writeheader() if is_new else None
        writer.writerow(asdict(result))


class Study:
    """Trains the runs that are not in the file yet.

    Args:
        file: The CSV.
        epochs: Replaces the experiment's number of epochs.
        steps: Replaces the experiment's steps per epoch.
    """

    def __init__(self, file: Path, epochs: int | None = None, steps: int | None = None) -> None:
        self.file, self.epochs, self.steps = file, epochs, steps
        self.known = {(one.problem, one.arm, one.seed, one.settings): one for one in read_runs(file)}
        self.made = 0

    def run(self, problem: str, arm: str, seed: int, weights: dict[str, float] | None = None) -> Result:
        """Return the result of a run. ``weights`` are for static ones."""
        config = config_of(problem, seed, self.epochs, self.steps)
        key = (problem, arm, seed, settings_of(config, arm))
        if key not in self.known:
            strategy = ARMS[arm]() if weights is None else FixedWeights(weights)
            self.known[key] = result = train(problem, arm, config, strategy)
            append_run(self.file, result)
            self.made += 1
            print(f"{problem}, {arm}, seed {seed}: {result.test:.4f} in {result.seconds:.0f} s", flush=True)
        return self.known[key]

    def static(self, problem: str, seeds: Sequence[int], draws: int) -> Iterator[Result]:
        """Yield one run per seed of the draw with the best validation for the first seed."""
        tasks = build(config_of(problem, 0, None, None), "data").tasks
        first = {
            draw: self.run(problem, f"{STATIC} {draw}", seeds[0], static_weights(tasks, draw)) for draw in range(draws)
        }
        best = min(first, key=lambda draw: (math.isnan(first[draw].val), first[draw].val))
        for seed in seeds:
            yield self.run(problem, f"{STATIC} {best}", seed, static_weights(tasks, best))


# ---- the page --------------------------------------------------------------------------------------------------------


def median_and_quartiles(values: Sequence[float], digits: int = 3) -> str:
    """Return the median with the quartiles in brackets."""
    ordered = sorted(values)
    if len(ordered) < 2:
        return f"{ordered[0]:.{digits}g}"
    low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return f"{middle:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def table(found: Found, problem: str, arms: Sequence[str], seeds: Sequence[int]) -> str:
    """Return one row per arm: error, error relative to equal weights, time, and final weights."""
    equal = [found[problem, "equal", seed] for seed in seeds]
    differences = {
        arm: [math.log(found[problem, arm, s].test / e.test) for s, e in zip(seeds, equal, strict=True)]
        for arm in arms
        if arm != "equal" and all(math.isfinite(found[problem, arm, seed].test) for seed in seeds)
    }
    marks = {}
    if len(seeds) > 1:
        for arm, (test, p) in corrected_tests(differences).items():
            marks[arm] = "" if p >= 0.05 else " **−**" if test.mean < 0 else " **+**"
    lines = [
        "| | relative L2 error | ÷ equal weights | time ÷ equal weights | weights at the end |",
        "|---|---:|---:|---:|---|",
    ]
    for arm in arms:
        runs = [found[problem, arm, seed] for seed in seeds]
        ratios = [run.test / one.test for run, one in zip(runs, equal, strict=True)]
        times = [run.seconds / one.seconds for run, one in zip(runs, equal, strict=True)]
        weights = [json.loads(run.weights) for run in runs if run.weights]
        middle = {task: statistics.median(one[task] for one in weights) for task in (weights[0] if weights else ())}
        cells = [
            median_and_quartiles([run.test for run in runs]) + marks.get(arm, ""),
            "" if arm == "equal" else median_and_quartiles(ratios),
            "" if arm == "equal" else f"{statistics.median(times):.2f}",
            ", ".join(f"{task} {weight:.3g}" for task, weight in middle.items()),
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: Found, problems: Sequence[str], arms: Sequence[str], seeds: Sequence[int], path: Path) -> None:
    """Draw the errors, with one point per seed and a line at the median."""
    import matplotlib as mpl
    import matplotlib.ticker

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(problems), figsize=(3.7 * len(problems) + 1, 4.2), sharey=True, squeeze=False)
    for axis, problem in zip(axes[0], problems, strict=True):
        for row, arm in enumerate(arms):
            errors = [found[problem, arm, seed].test for seed in seeds]
            axis.plot(errors, [row] * len(errors), "o", color="0.6", markersize=4)
            axis.plot(statistics.median(errors), row, "|", color="C0", markersize=16, markeredgewidth=2)
        axis.axvline(
            statistics.median(found[problem, "equal", seed].test for seed in seeds), color="0.3", linewidth=0.8
        )
        axis.set(title=PROBLEMS[problem], xscale="log", yticks=range(len(arms)), yticklabels=arms)
        axis.xaxis.set_major_locator(mpl.ticker.FixedLocator([0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes[0, 0].invert_yaxis()
    figure.supxlabel("relative L2 error: left is better; the line is equal weights' median")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def described(problems: Sequence[str], seeds: Sequence[int], study: Study, draws: int) -> str:
    """Return a description of what was trained."""
    settings = []
    for problem in problems:
        config = config_of(problem, 0, study.epochs, study.steps)
        points = ", ".join(f"{task} {count}" for task, count in config.data.points.items())
        steps = config.trainer.max_epochs * config.data.steps_per_epoch
        hidden = list(config.model.network.hidden)
        settings.append(f"{PROBLEMS[problem]}: {steps:,} steps, points {points}, tanh layers of {hidden}")
    one = config.model
    return (
        f". Seeds {', '.join(map(str, seeds))} for the network and the points, which differ in each step. "
        f"{'. '.join(settings)}. Adam, learning rate {one.optimizer.lr:g}, times {one.lr_scheduler.gamma:g} in each step. "
        "The error is ‖u − u*‖ / ‖u*‖ on a regular grid for the final network: the median over the seeds, with the "
        f"quartiles. GradNorm, InverseNorm, LRAnnealing and NTK read gradient norms in every {EVERY}th step, the last three "
        f"over the whole network. `{BEST_STATIC}`: of {draws} draws of fixed weights, logarithms uniform over four decades, "
        "the one with the lowest validation error for the first seed; finding it costs that many trainings. Time: "
        "CPU time of the training, median of the ratios to equal weights with the same seed; one run after the other "
        "on a shared machine, so only large differences count. **−** and **+**: lower and higher than with equal "
        "weights, p < 0.05 "
        "in a t-test of the logarithms paired over the seeds, corrected for the number of arms (Holm)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = ["equal", BEST_STATIC, *(arm for arm in ARMS if arm != "equal")]
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--arms", nargs="+", choices=everything, default=everything)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--draws", type=int, default=DRAWS, help="draws of static weights")
    parser.add_argument("--epochs", type=int, help="replaces the experiments' number of epochs")
    parser.add_argument("--runs", type=Path, default=Path("outputs/pinn.csv"), help="file with the finished runs")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    steps = None
    if options.quick:
        options.seeds, options.draws, options.epochs, steps, options.output = [0, 1], 2, 1, 20, Path("outputs")
    be_quiet()
    warnings.filterwarnings("ignore", message=".*task .* has held more than")  # studied here
    arms = list(dict.fromkeys(["equal", *options.arms]))
    for arm in arms:
        if arm != BEST_STATIC:
            refuse_what_fails(arm)
    study, found = Study(options.runs, options.epochs, steps), Found()
    for seed in options.seeds:
        for problem in options.problems:
            for arm in arms:
                if arm != BEST_STATIC:
                    found[problem, arm, seed] = study.run(problem, arm, seed)
    if BEST_STATIC in arms:
        for problem in options.problems:
            for seed, result in zip(options.seeds, study.static(problem, options.seeds, options.draws), strict=True):
                found[problem, BEST_STATIC, seed] = result
    options.output.mkdir(parents=True, exist_ok=True)
    plot(found, options.problems, arms, options.seeds, options.output / "pinn.png")
    parts = ["![Relative L2 error of each arm, a point for each seed](pinn.png)"]
    for problem in options.problems:
        parts += [f"## {PROBLEMS[problem]}", table(found, problem, arms, options.seeds)]
    about = described(options.problems, options.seeds, study, options.draws)
    print(write_page(options.output / "pinn.md", "Physics-informed networks", about, parts))


if __name__ == "__main__":
    main()
