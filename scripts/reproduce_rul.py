"""Remaining useful life of engines: fixed weights against five strategies, several seeds, beside the published figures.

    python scripts/reproduce_rul.py                 # simulated engines, a small network; writes docs/results/rul.md
    python scripts/reproduce_rul.py --root FOLDER   # NASA's files
    python scripts/reproduce_rul.py --full --root FOLDER --seeds 0 1 2 3 4   # the book's network and 100 epochs, on a GPU
    python scripts/reproduce_rul.py --set trainer.max_epochs=30 model.encoder.hidden=64
    python scripts/reproduce_rul.py --quick         # one seed, one epoch: shows that it runs; writes outputs/rul.md

Each run is a `gradnorm-train experiment=cmapss_small data.subset=… balancing=… seed=…` (``--full``:
``experiment=cmapss_fd001`` …) with a folder of its own below --runs, tested with the network of the epoch that was best on
the validation engines, by RMSE. All seeds have the same engines: a seed is that of the network's weights and of dropout.
What is finished is not run again, so that the command may be stopped and given anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pages import QUIET, finished_runs, mean_and_spread, write_page

from lightning_gradnorm.experiments.cli.run_folder import TIME, quoted

METHODS = {
    "fixed": ["balancing=fixed", "balancing.weights={rul: 0.5, health: 0.5}"],
    "uncertainty": ["balancing=uncertainty", "balancing.scalarizer.classification=[health]"],
    "dwa": ["balancing=dwa"],
    "gradnorm": ["balancing=gradnorm"],
    "amnl": ["balancing=amnl", "model.tasks.weighted=true"],
    "gaba": ["balancing=gaba"],
    # The second edition's AMNL is no balancing at all: equal weights, and windows near the failure count more.
    "amnl_2": ["balancing=amnl", "balancing.scalarizer.edition=2", "model.tasks.weighted=true"],
}
COMPARED = [name for name in METHODS if name != "amnl_2"]
"""By default."""


@dataclass(frozen=True)
class Column:
    """A column of measured figures."""

    title: str
    metric: str
    digits: int
    factor: float = 1.0


COLUMNS = (
    Column("RMSE", "test/rmse/rul", 2),
    Column("MAE", "test/mae/rul", 2),
    Column("NASA score", "test/nasa_score/rul", 0),
    Column("health accuracy, %", "test/accuracy/health", 1, factor=100),
)

PUBLISHED = ("RMSE, 1st ed.", "time, 1st ed.", "RMSE, 2nd ed.", "NASA score, 2nd ed.")
"""Columns that were published: book-ai.org, a book on predictive maintenance, editions 1 (section 9.3) and 2 (five seeds)."""

FIGURES: dict[str, dict[str, tuple[str, ...]]] = {
    "FD001": {
        "fixed": ("11.8", "1.0", "10.08 ± 1.71", "143.2 ± 48.4"),
        "uncertainty": ("12.4", "1.0", "9.15 ± 0.42", "115.4 ± 4.7"),
        "dwa": ("", "", "10.58 ± 1.66", "146.1 ± 40.3"),
        "gradnorm": ("11.5", "2.8", "9.38 ± 1.53", "127.6 ± 44.3"),
        "amnl": ("10.8", "1.0", "", ""),
        "gaba": ("", "", "9.63 ± 1.90", "130.4 ± 41.8"),
        "amnl_2": ("", "", "10.43 ± 1.94", "434.4 ± 239.8"),
    },
    "FD002": {
        "fixed": ("16.2", "1.0", "", "224.5"),
        "uncertainty": ("17.1", "1.0", "", "224.4"),
        "dwa": ("", "", "", "234.4"),
        "gradnorm": ("15.8", "2.8", "8.19 ± 0.78", "260.9 ± 36.1"),
        "amnl": ("13.9", "1.0", "", ""),
        "gaba": ("", "", "7.53 ± 0.65", "224.2 ± 22.4"),
        "amnl_2": ("", "", "6.74 ± 0.91", ""),
    },
}


@dataclass(frozen=True)
class Result:
    """What a run has left in its folder."""

    metrics: dict[str, float]
    training: dict[str, Any]


def overrides(method: str, subset: str, seed: int, options: argparse.Namespace) -> list[str]:
    """Return what ``gradnorm-train`` is given; of a run nothing but the best checkpoint is kept."""
    setting = [f"experiment=cmapss_{subset.lower()}"] if options.full else ["experiment=cmapss_small"]
    engines = [] if options.full else ["data.engines=100", "data.test_engines=100"]
    # Not those that an earlier simulator has left.
    engines.append(f"data.folder={quoted(str(options.runs / 'engines'))}")
    data = engines if options.root is None else ["data=cmapss", f"data.root={quoted(str(options.root))}"]
    quiet = [f"callbacks.{one}=null" for one in ("last", "interrupt", "learning_rate", "dashboard")]
    quiet += ["logger=csv", *QUIET]
    best = "callbacks.checkpoint.monitor=val/rmse/rul"
    chosen = [f"data.subset={subset}", "data.seed=0", *data, *METHODS[method], f"seed={seed}"]
    return [*setting, *chosen, *quiet, best, *options.set]


def jobs(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the runs, named subset/method/seed, the methods innermost: what else the machine does falls on all alike."""
    return {
        f"{subset}/{method}/{seed}": overrides(method, subset, seed, options)
        for subset in options.subsets
        for seed in options.seeds
        for method in options.methods
    }


# ---- the page --------------------------------------------------------------------------------------------------------


def table(subset: str, results: Mapping[str, Sequence[Result]]) -> str:
    """Return a row for each method: measured columns, then published ones."""
    ours, theirs = [column.title for column in COLUMNS] + ["time ÷ fixed"], [f"*{one}*" for one in PUBLISHED]
    lines = [f"| {subset} | {' | '.join([*ours, *theirs])} |", "|---" + "|---:" * len(ours + theirs) + "|"]
    for method, runs in results.items():
        cells = [mean_and_spread([run.metrics[c.metric] * c.factor for run in runs], c.digits) for c in COLUMNS]
        pairs = zip(runs, results.get("fixed", ()), strict=False)
        ratios = [run.training["processor_seconds"] / base.training["processor_seconds"] for run, base in pairs]
        cells.append(mean_and_spread(ratios, 2) if ratios else "")
        published = [f"*{figure}*" if figure else "" for figure in FIGURES.get(subset, {}).get(method, ("",) * 4)]
        lines.append(f"| {method} | {' | '.join([*cells, *published])} |")
    return "\n".join(lines)


def verdict(results: Mapping[str, Sequence[Result]]) -> str:
    """Say who is best in each column, and how clearly; higher is better where it is an accuracy."""
    sentences = []
    for column in COLUMNS:
        by_method = {name: [run.metrics[column.metric] for run in runs] for name, runs in results.items()}
        sign = -1 if "accuracy" in column.metric else 1
        best = min(by_method, key=lambda name: sign * statistics.mean(by_method[name]))
        # Compared seed by seed, since all methods share a seed's network at the start.
        wins = {
            name: sum(sign * a < sign * b for a, b in zip(by_method[best], values, strict=True))
            for name, values in by_method.items()
            if name != best
        }
        seeds = len(by_method[best])
        beaten = ", ".join(f"{name} in {count}" for name, count in wins.items())
        sentences.append(f"- {column.title}: best on average is **{best}**; of {seeds} seeds it beats {beaten}.")
    return "\n".join(sentences)


def described(options: argparse.Namespace, given: Sequence[str], results: Sequence[Result]) -> str:
    """Say what was trained on what."""
    where = (
        "**Simulated engines** (no --root was given), which stand in for NASA's and are easier or harder than those: "
        "the published figures beside them are of other data"
        if options.root is None
        else "NASA's C-MAPSS files"
    )
    size = "the book's network and length" if options.full else "a small network and a short training"
    shown = " ".join(one for one in given if not one.startswith(("balancing", "seed=", "data.subset=", "data.folder=")))
    seconds = statistics.median(result.training["processor_seconds"] for result in results)
    return (
        f". {where}. Seeds {', '.join(map(str, options.seeds))}; {size}: {results[0].training['steps']:,} steps, {seconds:.0f} "
        f"s of training with one thread. Each run is `gradnorm-train {shown} data.subset=… balancing=… seed=…`, tested "
        "with its best epoch by RMSE on validation engines. Mean ± standard deviation over the seeds; RMSE and MAE in cycles, "
        "lower is better, as is the NASA score, a sum over the test engines. Time: training alone, in seconds of the "
        "processor, divided by that of fixed weights with the same seed (`scripts/benchmark.py --cases engine64:2` measures "
        "steps interleaved). *In italics: published* (a book on predictive maintenance, book-ai.org, editions 1 and 2), with "
        "a larger network, 100 epochs and NASA's files; not measured here."
    )


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder of NASA's text files; without it engines are simulated")
    parser.add_argument("--full", action="store_true", help="experiment=cmapss_fd00k instead of cmapss_small")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=COMPARED)
    parser.add_argument(
        "--subsets", nargs="+", choices=["FD001", "FD002", "FD003", "FD004"], default=["FD001", "FD002"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more options of gradnorm-train")
    parser.add_argument("--runs", type=Path, default=Path("outputs/rul"), help="folder of the finished runs")
    parser.add_argument("--output", type=Path, help="default: docs/results; with --quick, outputs")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.root is not None:
        options.root = options.root.resolve()
    if options.quick:
        small = ["trainer.max_epochs=1", "trainer.limit_train_batches=3"]
        few = ["data.engines=8", "data.test_engines=8"] if options.root is None else []
        options.seeds, options.set = options.seeds[:1], [*small, *few, *options.set]
    options.output = options.output or Path("outputs" if options.quick else "docs/results")
    return options


def main() -> None:
    options = read_options()
    told = "Simulated engines; with NASA's files: --root FOLDER"
    print(told if options.root is None else f"NASA's files: {options.root}")
    planned = jobs(options)
    results: dict[str, dict[str, list[Result]]] = {}
    for run in finished_runs(planned, options.runs, threads=1):
        subset, method, _ = run.name.split("/")
        result = Result(run.metrics, json.loads((options.runs / run.name / TIME).read_text()))
        results.setdefault(subset, {}).setdefault(method, []).append(result)
    parts = []
    for subset, of_subset in results.items():
        parts += [f"## {subset}", table(subset, of_subset)]
        if len(of_subset) > 1 and len(options.seeds) > 1:  # one seed decides nothing
            parts.append(verdict(of_subset))
    every = [result for of_subset in results.values() for of_method in of_subset.values() for result in of_method]
    about = described(options, next(iter(planned.values())), every)
    page = write_page(options.output / "rul.md", "Remaining useful life of engines", about, parts)
    print("\n\n".join(parts))
    print(f"Wrote {page}")


if __name__ == "__main__":
    main()
