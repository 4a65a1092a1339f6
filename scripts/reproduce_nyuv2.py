"""NYUv2: single-task networks, equal weights and GradNorm over α, with several seeds, in one table.

    python scripts/reproduce_nyuv2.py                    # small, on rendered rooms: writes docs/results/nyuv2_rooms.md
    python scripts/reproduce_nyuv2.py --experiment nyuv2_seg_vgg --name nyuv2_seg_vgg data=nyuv2 data.root=FOLDER
    python scripts/reproduce_nyuv2.py --quick            # a smoke test with one seed, a few rooms and one epoch

Every run is a `gradnorm-train` in its own folder below --runs. Finished runs are skipped, so you can stop the command and
start it again. All runs of a seed see the same images in the same order for the same number of steps, and are tested at
the end of training.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import matplotlib as mpl
from pages import QUIET, error_ratio, errors, finished_runs, mean_and_spread, write_page

from lightning_gradnorm.experiments.report import PAPER, Run, delta_m

mpl.use("Agg")
import matplotlib.pyplot as plt

SYMBOLS = {
    "segmentation": "segmentation error",
    "depth": "depth RMSE, m",
    "normals": "normals 1 − \\|cos\\|",
    "keypoints": "keypoints, %",
}
QUICK = ["trainer.max_epochs=1", "data.train_size=8", "data.val_size=2", "data.test_size=4", "data.batch_size=4"]


def jobs(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the runs, named method/seed."""
    shared = [f"experiment={options.experiment}", "logger=csv", "callbacks=none", *options.overrides]
    shared += [*QUIET, "trainer.check_val_every_n_epoch=5"]
    methods = {f"single-task {task}": ["balancing=equal", f"tasks=[{task}]"] for task in options.tasks}
    methods["equal weights"] = ["balancing=equal"]
    methods |= {gradnorm(alpha): ["balancing=gradnorm", f"alpha={alpha:g}"] for alpha in options.alphas}
    methods |= {name: [f"balancing={name}"] for name in options.also}
    return {
        f"{method}/seed {seed}": [*shared, *chosen, f"seed={seed}"]
        for seed in options.seeds
        for method, chosen in methods.items()
    }


def gradnorm(alpha: float) -> str:
    """Return the name of GradNorm with this α."""
    return f"GradNorm α = {alpha:g}"


def table(found: dict[str, dict[int, Run]], tasks: list[str]) -> list[str]:
    """Return the rows: errors, change from equal weights, and Δm over single-task networks, mean ± std over seeds."""
    lines = [
        "| method | " + " | ".join(SYMBOLS[task] for task in tasks) + " | error ÷ equal weights | lower in | Δm, % |",
        "|---|" + "---:|" * (len(tasks) + 3),
    ]
    equal = found["equal weights"]
    single: dict[int, dict[str, float]] = {}
    for method, by_seed in found.items():
        for seed, run in by_seed.items():
            if method.startswith("single-task"):
                single.setdefault(seed, {}).update(run.metrics)
    for method, by_seed in found.items():
        of_tasks = [[errors(run).get(task) for run in by_seed.values()] for task in tasks]
        cells = [
            "–" if None in values else mean_and_spread([v for v in values if v is not None]) for values in of_tasks
        ]
        if method.startswith("single-task"):
            lines.append(f"| {method} | " + " | ".join(cells) + " | – | – | – |")
            continue
        ratios = [error_ratio(run, equal[seed]) for seed, run in by_seed.items()]
        gains = [delta_m(run.metrics, single[seed], PAPER) for seed, run in by_seed.items()]
        wins = "–" if method == "equal weights" else f"{sum(r < 1 for r in ratios)} of {len(ratios)}"
        lines.append(
            f"| {method} | "
            + " | ".join(cells)
            + f" | {mean_and_spread(ratios, 3)} | {wins} | {mean_and_spread(gains, 1)} |"
        )
    return lines


def draw(path: Path, found: dict[str, dict[int, Run]], tasks: list[str], alphas: list[float]) -> None:
    """Draw each task's error relative to equal weights, and the mean, over α."""
    equal = {seed: errors(run) for seed, run in found["equal weights"].items()}
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axes.axhline(0, color="#444444", linewidth=1)
    styles = zip([*tasks, "mean"], ("#0072b2", "#d55e00", "#009e73", "#000000"), ("o:", "s:", "^:", "D-"), strict=False)
    for name, color, style in styles:
        chosen = tasks if name == "mean" else [name]
        changes = [
            [
                100 * (statistics.mean(errors(run)[task] / equal[seed][task] for task in chosen) - 1)
                for seed, run in found[gradnorm(alpha)].items()
            ]
            for alpha in alphas
        ]
        means = [statistics.mean(values) for values in changes]
        spread = [statistics.stdev(values) if len(values) > 1 else 0 for values in changes] if name == "mean" else None
        axes.errorbar(alphas, means, yerr=spread, fmt=style, color=color, label=name, capsize=3)
    axes.set(xlabel="α of GradNorm", ylabel="test error against equal weights, %")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of gradnorm-train for all runs")
    parser.add_argument("--experiment", default="nyuv2_seg_small")
    parser.add_argument("--tasks", nargs="+", default=["segmentation", "depth", "normals"], choices=list(PAPER))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0])
    parser.add_argument("--also", nargs="+", default=[], help="more options of balancing=, such as uncertainty")
    parser.add_argument("--name", default="nyuv2_rooms", help="name of the output file")
    parser.add_argument("--runs", type=Path, help="default: outputs/NAME")
    parser.add_argument("--at-once", type=int, default=1, help="number of parallel runs")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads per run")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_intermixed_args()
    if options.quick:
        options.seeds, options.alphas = [0], [1.5]
        options.overrides = [*options.overrides, *QUICK]
    folder = options.runs or Path("outputs") / options.name
    planned = jobs(options)
    found: dict[str, dict[int, Run]] = {}
    for run in finished_runs(planned, folder, at_once=options.at_once, threads=options.threads):
        method, seed = run.name.split("/seed ")
        found.setdefault(method, {})[int(seed)] = run
    described = (
        f". Seeds {', '.join(map(str, options.seeds))}; `{' '.join(next(iter(planned.values()))[:-1])}` and so on. Test errors "
        "at the end of training, lower is better; error ÷ equal weights is averaged over the tasks, with the same seed; Δm is "
        "the mean gain over the single-task networks, higher is better. Mean ± standard deviation over the seeds."
    )
    real = any(override.startswith("data=nyuv2") for override in options.overrides)
    title = f"NYUv2's tasks{'' if real else ' on rendered rooms'}"
    lines = "\n".join(table(found, options.tasks))
    options.output.mkdir(parents=True, exist_ok=True)
    draw(options.output / f"{options.name}.png", found, options.tasks, options.alphas)
    parts = [lines, f"![Change of the test errors over α]({options.name}.png)"]
    report = write_page(options.output / f"{options.name}.md", title, described, parts)
    print(lines)
    print(f"Wrote {report}")


if __name__ == "__main__":
    main()
