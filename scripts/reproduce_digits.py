"""Two digits and their sum: the effect of `weight_space="log"` and `smoothing` if one loss has a different scale.

    python scripts/reproduce_digits.py           # writes docs/results/digits.md; half an hour on one core
    python scripts/reproduce_digits.py --quick   # a smoke test with one seed and few steps; writes outputs/digits.md

Each run is a `gradnorm-train experiment=multimnist` in its own folder below --runs. Finished runs are skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from pages import BARE, finished_runs, mean_and_spread, write_page
from weight_traces import read_weights, traces_table

from lightning_gradnorm.experiments.report import Run
from lightning_gradnorm.experiments.report.significance import paired_test

BY_SUM = "callbacks.checkpoint.monitor=val/loss"
"""Tests the network from the epoch with the lowest sum of validation losses."""

ARMS = {
    "equal": ["balancing=equal"],
    "gradnorm": ["balancing=gradnorm"],
    "gradnorm, log": ["balancing=gradnorm", "balancing.weight_space=log"],
    "gradnorm, smoothing": ["balancing=gradnorm", "balancing.smoothing=0.9"],
}
COLUMNS = {"test/accuracy/left": 100, "test/accuracy/right": 100, "test/r2/sum": 1}
"""The metrics and their factors."""


def table(results: Mapping[str, Sequence[Run]]) -> str:
    """Return one row per arm: means, spreads and, for a remedy, p of a paired t-test against GradNorm without it."""
    lines = ["| | left, % | right, % | r² of the sum |", "|---|---:|---:|---:|"]
    for arm, runs in results.items():
        cells = []
        for metric, factor in COLUMNS.items():
            values = [run.metrics[metric] * factor for run in runs]
            cell = mean_and_spread(values, 2 if factor > 1 else 3)
            if arm.startswith("gradnorm,") and len(values) > 1:
                plain = [run.metrics[metric] * factor for run in results["gradnorm"]]
                p = paired_test([a - b for a, b in zip(values, plain, strict=True)]).p
                cell += "" if p is None else f" (p {p:.3f})"
            cells.append(cell)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(weights: Path, results: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Draw the weights of one run over its steps, and the results of each arm, one point per seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, *others) = plt.subplots(1, 4, figsize=(12, 3.2), width_ratios=(2.2, 1, 1, 1))
    for color, (task, (steps, values)) in enumerate(read_weights(weights).items()):
        left.plot(steps, values, color=f"C{color}", label=task)
    left.legend(loc="lower left")
    left.set(title="GradNorm's task weights", xlabel="step", yscale="log")
    for axis, (metric, factor), color in zip(others, COLUMNS.items(), ("C0", "C1", "C2"), strict=True):
        for place, arm in enumerate(("equal", "gradnorm")):
            values = [run.metrics[metric] * factor for run in results[arm]]
            axis.plot([place] * len(values), values, "o", color=color, alpha=0.5, markersize=4)
            axis.plot(place, sum(values) / len(values), "_", color=color, markersize=24, markeredgewidth=2)
        what = "r²" if "r2" in metric else "accuracy, %"
        axis.set(
            title=f"{metric.rsplit('/', 1)[1]}: {what}",
            xticks=(0, 1),
            xticklabels=("equal", "GradNorm"),
            xlim=(-0.6, 1.6),
        )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("outputs/digits"), help="folder of the finished runs")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    quick = []
    if options.quick:
        quick, options.seeds, options.output = ["trainer.max_epochs=1"], options.seeds[:1], Path("outputs")
    jobs = {
        f"{arm}/{seed}": ["experiment=multimnist", *given, f"seed={seed}", *BARE, BY_SUM, *quick]
        for seed in options.seeds
        for arm, given in ARMS.items()
    }
    results: dict[str, list[Run]] = {}
    for run in finished_runs(jobs, options.runs, threads=1):
        results.setdefault(run.name.split("/")[0], []).append(run)
    folders = {arm: [options.runs / run.name for run in runs] for arm, runs in results.items() if arm != "equal"}
    about = (
        f". Seeds {', '.join(map(str, options.seeds))}. Each run is `gradnorm-train experiment=multimnist balancing=… seed=… "
        f"{BY_SUM}`, "
        "tested with the network of the epoch with the lowest sum of validation losses. Mean ± standard deviation over the "
        "seeds; p: t-test paired over the seeds against GradNorm without the remedy, not corrected for multiple tests."
    )
    options.output.mkdir(parents=True, exist_ok=True)
    plot(options.runs / f"gradnorm/{options.seeds[0]}", results, options.output / "digits.png")
    picture = "![Task weights of one run, and accuracies and r² of equal weights and GradNorm](digits.png)"
    trace = (
        "GradNorm's weights over the last third of training, means over the seeds; with smoothing, norms are averages:"
    )
    page = write_page(
        options.output / "digits.md",
        "Two digits and their sum",
        about,
        [table(results), picture, trace, traces_table(folders)],
    )
    print(table(results), traces_table(folders), f"Wrote {page}", sep="\n\n")


if __name__ == "__main__":
    main()
