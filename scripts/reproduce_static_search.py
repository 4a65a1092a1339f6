"""Random static weights against GradNorm: the paper's Figure 4.

    python scripts/reproduce_static_search.py                            # 100 runs of nyuv2_kpts_small: hours on two cores
    python scripts/reproduce_static_search.py --experiment toy_ten --name static_search_toy_ten
    python scripts/reproduce_static_search.py --quick                    # a smoke test with three short runs

Trains networks with constant random weights of sum T, one network with GradNorm, and one with the mean of GradNorm's
weights, held fixed ("GradNorm static"). Each network is a point: the distance of its weights from GradNorm's mean, and the
increase of its test errors over GradNorm's, averaged over the tasks. Every run is a `gradnorm-train` in its own folder below
--runs. Finished runs are skipped, so you can stop the command and start it again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import matplotlib as mpl
from pages import QUIET, error_ratio, finished_runs, write_page

from lightning_gradnorm.experiments.cli.run_folder import quoted
from lightning_gradnorm.experiments.report import Run

mpl.use("Agg")
import matplotlib.pyplot as plt

GRADNORM, STATIC = "gradnorm", "gradnorm_static"


def change(run: Run, reference: Run) -> float:
    """Return the increase of the errors over the reference's in percent, averaged over the tasks."""
    return 100 * (error_ratio(run, reference) - 1)


def correlation(points: list[tuple[float, float]]) -> float:
    """Return Spearman's correlation of the ranks."""
    ranks = [[sorted(values).index(value) for value in values] for values in zip(*points, strict=True)]
    return statistics.correlation(*ranks) if len(points) > 2 else math.nan


def draw(path: Path, points: list[tuple[float, float]], static: tuple[float, float]) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    axes.scatter(*zip(*points, strict=True), s=18, color="#444444", alpha=0.7, label="random static weights")
    axes.scatter(*static, marker="D", color="#009e73", label="GradNorm's mean weights, static", zorder=3)
    axes.axhline(0, color="#0072b2", linewidth=1.5, label="GradNorm")
    axes.set(xlabel="distance of the weights to GradNorm's mean weights", ylabel="test error against GradNorm's, %")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of gradnorm-train for all runs")
    parser.add_argument("--experiment", default="nyuv2_kpts_small")
    parser.add_argument("--count", type=int, default=100, help="number of random weights")
    parser.add_argument("--name", default="static_search", help="name of the output files")
    parser.add_argument("--runs", type=Path, help="default: outputs/NAME")
    parser.add_argument("--at-once", type=int, default=1, help="number of parallel runs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per run")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_intermixed_args()
    if options.quick:
        small = ["trainer.max_epochs=1", "trainer.max_steps=-1", "trainer.limit_train_batches=2"]
        options.count, options.overrides = 3, [*small, "trainer.limit_test_batches=1", *options.overrides]
    folder = (options.runs or Path("outputs") / options.name).resolve()
    shared = [f"experiment={options.experiment}", "logger=csv", *options.overrides]
    shared += [*QUIET, "seed=0"]
    order = {"at_once": options.at_once, "threads": options.threads}

    # All are tested at the end of training. Only GradNorm's run needs a checkpoint, for its weights.
    (gradnorm,) = finished_runs(
        {GRADNORM: [*shared, "balancing=gradnorm", "callbacks.checkpoint=null"]}, folder, **order
    )
    shared += ["callbacks=none"]
    from_run = f"balancing.from_run={quoted(str(folder / GRADNORM))}"
    jobs = {STATIC: [*shared, "balancing=gradnorm_static", from_run]}
    jobs |= {f"random {i}": [*shared, "balancing=random_static", f"balancing.seed={i}"] for i in range(options.count)}
    static, *others = finished_runs(jobs, folder, **order)

    center = json.loads((folder / GRADNORM / "weights.json").read_text())["mean_weights"]

    def point(run: Run) -> tuple[float, float]:
        weights = json.loads((folder / run.name / "weights.json").read_text())["weights"]
        return math.dist([weights[task] for task in center], list(center.values())), change(run, gradnorm)

    points, of_static = [point(run) for run in others], point(static)
    better = sum(y < 0 for _, y in points)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(options.output / f"{options.name}.png", points, of_static)
    near, far = (min(points), max(points))
    described = (
        f". `{' '.join(shared)} balancing=random_static balancing.seed=…` and so on; test error of a task: the paper's on "
        "NYUv2, else the loss."
    )
    parts = [
        f"GradNorm's mean weights: {', '.join(f'{task} {weight:.3f}' for task, weight in center.items())}.",
        f"- Of {len(points)} random weights {better} beat GradNorm; best {min(y for _, y in points):+.1f} %, median "
        f"{statistics.median(y for _, y in points):+.1f} %, worst {max(y for _, y in points):+.1f} %.\n"
        f"- Nearest (distance {near[0]:.2f}): {near[1]:+.1f} %; farthest ({far[0]:.2f}): {far[1]:+.1f} %. Rank correlation of "
        f"distance and change: {correlation(points):.2f}.\n"
        f"- GradNorm's mean weights, held fixed: {of_static[1]:+.1f} %.",
        f"![Change of test error over distance]({options.name}.png)",
    ]
    page = write_page(options.output / f"{options.name}.md", "Random static weights against GradNorm", described, parts)
    print("\n".join(parts[:2]))
    print(f"Wrote {page}")


if __name__ == "__main__":
    main()
