"""Remaining useful life of engines: fixed weights against thirteen balancing strategies, next to published figures.

    python scripts/reproduce_rul.py --root FOLDER            # NASA's files; writes docs/results/rul_cmapss.md; 1.5 hours
    python scripts/reproduce_rul.py --root FOLDER --choose   # the settings, by fixed weights on validation engines; 10 min
    python scripts/reproduce_rul.py --root FOLDER --ablate   # FD001, fixed weights: writes docs/results/rul_ablation.md
    python scripts/reproduce_rul.py --root FOLDER --network small --subsets FD001 --seeds 0 1 2
    python scripts/reproduce_rul.py --root FOLDER --network book --subsets FD001 --seeds 0 --methods fixed gradnorm
    python scripts/reproduce_rul.py                          # simulated engines; writes docs/results/rul.md
    python scripts/reproduce_rul.py --quick                  # a smoke test with two methods and one epoch; writes outputs/

Each run is a `gradnorm-train` in its own folder below --runs. It tests the network from the epoch with the best RMSE on
the validation engines. All seeds have the same engines: the seed only affects the network's weights and dropout.
Finished runs are skipped, so you can stop the command and start it again. Networks: ``mlp`` has 70,000
parameters, ``small`` is a small version of the book's, ``book`` is the book's, whose 100 epochs take a night on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pages import BARE, corrected_tests, finished_runs, mean_and_spread, write_page
from weight_traces import read_rows, traces_table

from lightning_gradnorm.experiments.cli.run_folder import TIME, quoted
from lightning_gradnorm.experiments.report import Run

METHODS = {
    "fixed": ["balancing=fixed", "balancing.weights={rul: 0.5, health: 0.5}"],
    "equal": ["balancing=equal"],
    "uncertainty": ["balancing=uncertainty", "balancing.scalarizer.classification=[health]"],
    "dwa": ["balancing=dwa"],
    "gradnorm": ["balancing=gradnorm"],
    "gradnorm, α 0.5": ["balancing=gradnorm", "alpha=0.5"],
    "gradnorm, lr 0.005": ["balancing=gradnorm", "balancing.optimizer.lr=0.005"],
    "gradnorm, log": ["balancing=gradnorm", "balancing.weight_space=log"],
    "gradnorm, smoothing": ["balancing=gradnorm", "balancing.smoothing=0.9"],
    "amnl": ["balancing=amnl", "model.tasks.weighted=true"],
    # The second edition's AMNL does not balance: equal weights, with more weight for windows near the failure.
    "amnl_2": ["balancing=amnl", "balancing.scalarizer.edition=2", "model.tasks.weighted=true"],
    "gaba": ["balancing=gaba"],
    "upgrad": ["balancing=upgrad"],
    "famo": ["balancing=famo"],
}
SUBSETS = {"FD001": 5, "FD002": 5, "FD003": 3, "FD004": 3}
"""The number of seeds of each."""


@dataclass(frozen=True)
class Network:
    """A network and its training length. The choices were made with --choose."""

    experiment: str
    settings: tuple[str, ...] = ()
    of_subset: Mapping[str, tuple[str, ...]] | None = None


FEW, MANY = ("trainer.max_epochs=30",), ("trainer.max_epochs=18",)
NETWORKS = {
    "mlp": Network("cmapss_mlp", of_subset={"FD001": FEW, "FD002": MANY, "FD003": FEW, "FD004": MANY}),
    "small": Network("cmapss_small", ("model.encoder.funnel=[80,32]",)),
    "book": Network("cmapss_{subset}"),
}
GRID = {"model.optimizer.lr": ("3e-4", "1e-3", "3e-3"), "data.batch_size": ("256", "512")}
"""The settings that --choose tries, with more epochs than necessary."""

ABLATIONS = {
    "as in the table": [],
    "test labels not capped": ["data.cap_test=false"],
    "window of 20": ["data.window=20"],
    "window of 50, padded": ["data.window=50"],
    "the last epoch": ["callbacks.checkpoint=null"],
    "no gradient clipping": ["model.gradient_clip_val=null"],
    "wider: 256, 128, 32": ["model.encoder.hidden=[256,128,32]"],
    "all engines to train on": ["data.val_fraction=0", "callbacks.checkpoint=null"],
    "the book's network in small": ["experiment=cmapss_small", "trainer.max_epochs=30"],
}
"""The changes that --ablate makes to fixed weights on FD001. All are reported, and none affects a choice."""


@dataclass(frozen=True)
class Column:
    """A column of measured figures."""

    title: str
    metric: str
    digits: int
    factor: float = 1.0

    @property
    def sign(self) -> int:
        """1 if lower is better, -1 if higher is better."""
        return -1 if "f1" in self.metric else 1


COLUMNS = (
    Column("RMSE", "test/rmse/rul", 2),
    Column("NASA score", "test/nasa_score/rul", 0),
    Column("health F1, %", "test/f1/health", 1, factor=100),
)

PUBLISHED = ("RMSE, 1st ed.", "time, 1st ed.", "RMSE, 2nd ed.", "NASA score, 2nd ed.")
"""Published columns: book-ai.org, a book on predictive maintenance, editions 1 (section 9.3) and 2 (five seeds)."""

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
    "FD003": {"fixed": ("12.4", "", "11.53", ""), "amnl_2": ("11.2", "", "9.51 ± 1.74", "")},
    "FD004": {"fixed": ("19.4", "", "", ""), "amnl_2": ("17.4", "", "8.16 ± 2.17", "")},
}
"""FD003 and FD004: edition 1, section 10.1, with 0.3 of the loss for the remaining life (fixed), and 0.5 (AMNL)."""


@dataclass(frozen=True)
class Result:
    """The results in a run's folder."""

    folder: Path
    metrics: dict[str, float]
    training: dict[str, Any]

    @classmethod
    def of(cls, run: Run, runs: Path) -> Result:
        """Read the results."""
        return cls(runs / run.name, run.metrics, json.loads((runs / run.name / TIME).read_text()))


def measured(runs: Sequence[Result]) -> list[str]:
    """Return the cells of the measured columns."""
    return [mean_and_spread([run.metrics[c.metric] * c.factor for run in runs], c.digits) for c in COLUMNS]


Results = Mapping[str, Sequence[Result]]
"""For each method, one result per seed."""


def overrides(method: str, subset: str, seed: int, options: argparse.Namespace) -> list[str]:
    """Return the overrides for ``gradnorm-train``. Each run keeps only its best checkpoint."""
    network = NETWORKS[options.network]
    setting = [f"experiment={network.experiment.format(subset=subset.lower())}", *network.settings]
    setting += (network.of_subset or {}).get(subset, ())
    engines = [] if options.network == "book" else ["data.engines=100", "data.test_engines=100"]
    # Not the files from an earlier simulator.
    engines.append(f"data.folder={quoted(str(options.runs / 'engines'))}")
    data = engines if options.root is None else ["data=cmapss", f"data.root={quoted(str(options.root))}"]
    best = "callbacks.checkpoint.monitor=val/rmse/rul"
    chosen = [f"data.subset={subset}", "data.seed=0", *data, *METHODS[method], f"seed={seed}"]
    return [*setting, *chosen, *BARE, best, *options.set]


def jobs(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the runs, named network/subset/method/seed. Methods are innermost, so other load affects all equally."""
    return {
        f"{options.network}/{subset}/{method}/{seed}": overrides(method, subset, seed, options)
        for subset in options.subsets
        for seed in options.seeds or range(SUBSETS[subset])
        for method in options.methods
    }


# ---- the settings ----------------------------------------------------------------------------------------------------


def choose(options: argparse.Namespace) -> None:
    """Print the validation error of fixed weights for each setting in the grid, and the epoch with the lowest error."""
    planned, names = {}, {}
    for subset, values, seed in itertools.product(options.subsets, itertools.product(*GRID.values()), (0, 1)):
        setting = [f"{key}={value}" for key, value in zip(GRID, values, strict=True)]
        name = f"choose/{options.network}/{subset}/{'_'.join(values)}/{seed}"
        planned[name] = [*overrides("fixed", subset, seed, options), "trainer.max_epochs=40", *setting]
        names.setdefault((subset, *values), []).append(name)
    finished_runs(planned, options.runs, threads=1)
    print(f"| subset | {' | '.join(GRID)} | RMSE on validation engines, two seeds | in epoch |")
    print("|---" * (len(GRID) + 3) + "|")
    for (subset, *values), runs in names.items():
        found = [lowest(options.runs / name) for name in runs]
        epochs = ", ".join(str(epoch) for _, epoch in found)
        print(f"| {subset} | {' | '.join(values)} | {mean_and_spread([rmse for rmse, _ in found], 2)} | {epochs} |")


def lowest(folder: Path) -> tuple[float, int]:
    """Return the lowest validation RMSE of a run, and its epoch, from 1."""
    rmse = "val/rmse/rul"
    return min((float(row[rmse]), int(row["epoch"]) + 1) for row in read_rows(folder, rmse))


def ablate(options: argparse.Namespace) -> None:
    """Write the effect of each change on the test error of fixed weights."""
    planned = {}
    for (name, changed), seed in itertools.product(ABLATIONS.items(), options.seeds or range(SUBSETS["FD001"])):
        given = overrides("fixed", "FD001", seed, options)
        if "callbacks.checkpoint=null" in changed:
            given = [one for one in given if not one.startswith("callbacks.checkpoint.")]
        keys = [one.partition("=")[0] for one in changed]
        given = [one for one in given if one.partition("=")[0] not in keys]
        planned[f"ablate/{options.network}/{name}/{seed}"] = [*given, *changed]
    results: dict[str, list[Result]] = {}
    for run in finished_runs(planned, options.runs, threads=1):
        results.setdefault(run.name.split("/")[2], []).append(Result.of(run, options.runs))
    lines = [f"| fixed weights, FD001 | {' | '.join(column.title for column in COLUMNS)} |", "|---|---:|---:|---:|"]
    for name, runs in results.items():
        lines.append(f"| {name} | {' | '.join(measured(runs))} |")
    every = [result for runs in results.values() for result in runs]
    about = described(options, next(iter(planned.values())), every)
    print(
        write_page(options.output / "rul_ablation.md", "What the error on FD001 depends on", about, ["\n".join(lines)])
    )


# ---- the page --------------------------------------------------------------------------------------------------------


def table(subset: str, results: Results) -> str:
    """Return one row per method: measured columns, then published ones."""
    ours, theirs = [column.title for column in COLUMNS] + ["time ÷ fixed"], [f"*{one}*" for one in PUBLISHED]
    lines = [f"| {subset} | {' | '.join([*ours, *theirs])} |", "|---" + "|---:" * len(ours + theirs) + "|"]
    for method, runs in results.items():
        cells = measured(runs)
        pairs = zip(runs, results.get("fixed", ()), strict=False)
        ratios = [run.training["processor_seconds"] / base.training["processor_seconds"] for run, base in pairs]
        cells.append(mean_and_spread(ratios, 2) if ratios else "")
        published = [f"*{figure}*" if figure else "" for figure in FIGURES.get(subset, {}).get(method, ("",) * 4)]
        lines.append(f"| {method} | {' | '.join([*cells, *published])} |")
    return "\n".join(lines)


def tests(results: Results) -> str:
    """Return the paired t-tests of each method against fixed weights, corrected for their number (Holm) in each column."""
    rivals = [method for method in results if method != "fixed"]
    lines = [f"| against fixed | {' | '.join(f'{c.title}: difference, p' for c in COLUMNS)} |"]
    lines.append("|---" + "|---:" * len(COLUMNS) + "|")
    cells: dict[str, list[str]] = {method: [] for method in rivals}
    for column in COLUMNS:
        base = [run.metrics[column.metric] for run in results["fixed"]]
        differences = {}
        for method in rivals:
            values = [run.metrics[column.metric] for run in results[method]]
            differences[method] = [(a - b) * column.factor for a, b in zip(values, base, strict=True)]
        for method, (test, p) in corrected_tests(differences).items():
            better = test.mean * column.sign < 0
            mark = f" **{'better' if better else 'worse'}**" if p < 0.05 else ""
            raw = 1.0 if test.p is None else test.p
            cells[method].append(f"{test.mean:+.{column.digits}f}, {raw:.3f}{mark}")
    return "\n".join([*lines, *(f"| {method} | {' | '.join(row)} |" for method, row in cells.items())])


def described(options: argparse.Namespace, given: Sequence[str], results: Sequence[Result]) -> str:
    """Return a description of the training and its data."""
    where = (
        "**Simulated engines** (no --root was given), which stand in for NASA's: the published figures next to them are for "
        "other data"
        if options.root is None
        else "NASA's C-MAPSS files"
    )
    hidden = ("balancing", "alpha=", "seed=", "data.subset=", "data.folder=", "data.root=", "model.tasks.weighted")
    shown = " ".join(one for one in given if not one.startswith(hidden))
    hours = sum(result.training["seconds"] for result in results) / 3600
    return (
        f". {where}; network: {options.network}. {len(results)} runs, {hours:.1f} hours of training with one thread. Each run "
        f"is `gradnorm-train {shown} data.subset=… balancing=… seed=…`, tested with its best epoch by RMSE on validation "
        "engines; no setting was chosen on test engines. Mean ± standard deviation over the seeds; RMSE in cycles, the "
        "remaining life of the test engines capped at 125; lower is better, as is the NASA score, a sum over the test "
        "engines. Time: CPU time of the training divided by that of fixed weights with the same seed. "
        "Tests: paired over the seeds, p of Student's t; **better** and **worse** if p < 0.05 after Holm's correction for "
        "the column's tests. *In italics: published* (a book on predictive maintenance, book-ai.org, editions 1 and 2), with "
        "a larger network and 100 epochs; not measured here."
    )


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder with NASA's text files; default: simulated engines")
    parser.add_argument("--network", choices=list(NETWORKS), default="mlp")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--subsets", nargs="+", choices=list(SUBSETS), default=list(SUBSETS))
    parser.add_argument("--seeds", type=int, nargs="+", help="default: five on FD001 and FD002, three on the others")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more options of gradnorm-train")
    parser.add_argument("--choose", action="store_true", help="compare settings on validation engines; writes no page")
    parser.add_argument("--ablate", action="store_true", help="change one thing at a time; writes a separate page")
    parser.add_argument("--runs", type=Path, default=Path("outputs/rul"), help="folder of the finished runs")
    parser.add_argument("--output", type=Path, help="default: docs/results; with --quick, outputs")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.root is not None:
        options.root = options.root.resolve()
    if options.quick:
        small = ["trainer.max_epochs=1", "trainer.limit_train_batches=20", "trainer.log_every_n_steps=1"]
        few = ["data.engines=8", "data.test_engines=8"] if options.root is None else []
        options.subsets, options.seeds, options.methods = ["FD001"], [0], ["fixed", "gradnorm"]
        options.set = [*small, *few, *options.set]
    options.output = options.output or Path("outputs" if options.quick else "docs/results")
    return options


def main() -> None:
    options = read_options()
    told = "Simulated engines; with NASA's files: --root FOLDER"
    print(told if options.root is None else f"NASA's files: {options.root}")
    if options.choose or options.ablate:
        choose(options) if options.choose else ablate(options)
        return
    planned = jobs(options)
    results: dict[str, dict[str, list[Result]]] = {}
    for run in finished_runs(planned, options.runs, threads=1):
        _, subset, method, _ = run.name.split("/")
        results.setdefault(subset, {}).setdefault(method, []).append(Result.of(run, options.runs))
    parts = []
    for subset, of_subset in results.items():
        parts += [f"## {subset}", table(subset, of_subset)]
        seeds = len(next(iter(of_subset.values())))
        if "fixed" in of_subset and len(of_subset) > 1 and seeds > 1:  # one seed is not enough
            parts.append(tests(of_subset))
        folders = {m: [run.folder for run in runs] for m, runs in of_subset.items() if m.startswith("gradnorm")}
        if folders:
            parts += [
                "GradNorm's weights over the last third of training, means over the seeds:",
                traces_table(folders),
            ]
    every = [result for of_subset in results.values() for of_method in of_subset.values() for result in of_method]
    about = described(options, next(iter(planned.values())), every)
    name = "rul" if options.root is None else "rul_cmapss"
    name += "" if options.network == "mlp" else f"_{options.network}"
    page = write_page(options.output / f"{name}.md", "Remaining useful life of engines", about, parts)
    print("\n\n".join(parts))
    print(f"Wrote {page}")


if __name__ == "__main__":
    main()
