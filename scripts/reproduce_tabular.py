"""Eight small regressions with several targets: when balancing helps, when it hurts, and the effect of standardizing.

    python scripts/reproduce_tabular.py FOLDER           # writes docs/results/tabular.md; an hour on one core
    python scripts/reproduce_tabular.py FOLDER --quick   # a smoke test: two sets, one seed, few steps; writes outputs/

FOLDER has sarcos/sarcos_inv_test.mat (gaussianprocess.org/gpml/data; split here, none of its rows is from the training file),
mulan/jura.arff, enb.arff, atp1d.arff, oes97.arff and wq.arff (github.com/tsoumakas/mulan), rf1/rf1.arff (the same source) and
parkinsons/parkinsons_updrs_uci_form.data (UCI, Parkinsons Telemonitoring). Finished runs are kept below --runs, so you can
stop the command and start it again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pages import be_quiet, corrected_tests, kept, mean_and_spread, write_page
from torch import Tensor, nn
from torchjd.aggregation import UPGrad
from torchjd.scalarization import DWA, UW

from lightning_gradnorm import Balancer, RandomWeights
from lightning_gradnorm.engine.rule import Rule
from lightning_gradnorm.experiments.problems.small import MLP
from lightning_gradnorm.experiments.problems.tabular import MaskedMSELoss, TabularDataModule, read_table, tabular_tasks
from lightning_gradnorm.strategies import AggregationRule, FixedRule, GradNormRule, ScalarizationRule

BATCH = 64
masked_mse = MaskedMSELoss()


@dataclass(frozen=True)
class Table:
    """A public table: its file below the folder, the names of its targets or their number at the end, and options."""

    file: str
    targets: int | tuple[str, ...]
    options: dict[str, Any]


TABLES = {
    "SARCOS": Table("sarcos/sarcos_inv_test.mat", tuple(str(column) for column in range(21, 28)), {}),
    "jura": Table("mulan/jura.arff", 3, {}),
    "energy": Table("mulan/enb.arff", 2, {}),
    "river flow": Table("rf1/rf1.arff", 8, {"missing": "mean"}),
    "atp1d": Table("mulan/atp1d.arff", 6, {}),
    "oes97": Table("mulan/oes97.arff", 16, {}),
    "water quality": Table("mulan/wq.arff", 14, {}),
    "Parkinson's": Table(
        "parkinsons/parkinsons_updrs_uci_form.data", ("motor_UPDRS", "total_UPDRS"), {"group": "subject#"}
    ),
}

Strategy = Callable[[Sequence[str], int, dict[str, float]], Rule]
"""Functions that create the rule from the tasks, the seed and the mean weights of GradNorm with the same seed."""

ARMS: dict[str, Strategy] = {
    "equal": lambda tasks, seed, mean: FixedRule(dict.fromkeys(tasks, 1.0)),
    "standardized": lambda tasks, seed, mean: FixedRule(dict.fromkeys(tasks, 1.0)),  # targets of standard deviation 1
    "uncertainty": lambda tasks, seed, mean: ScalarizationRule(tasks, UW((len(tasks),))),
    "GradNorm α 1.5": lambda tasks, seed, mean: GradNormRule(tasks, alpha=1.5),
    "GradNorm α 0.5": lambda tasks, seed, mean: GradNormRule(tasks, alpha=0.5),
    "GradNorm α 0": lambda tasks, seed, mean: GradNormRule(tasks, alpha=0.0),
    "GradNorm static": lambda tasks, seed, mean: FixedRule(mean),
    "DWA": lambda tasks, seed, mean: ScalarizationRule(tasks, DWA()),
    "UPGrad": lambda tasks, seed, mean: AggregationRule(tasks, UPGrad()),
    "random static": lambda tasks, seed, mean: FixedRule(RandomWeights(seed, tasks=list(tasks)).weights),
    # In addition to the ten: GradNorm on standardized targets, and two remedies for noisy, unequal scales.
    "standardized, GradNorm α 1.5": lambda tasks, seed, mean: GradNormRule(tasks, alpha=1.5),
    "GradNorm α 1.5, log": lambda tasks, seed, mean: GradNormRule(tasks, alpha=1.5, weight_space="log"),
    "GradNorm α 1.5, smoothing": lambda tasks, seed, mean: GradNormRule(tasks, alpha=1.5, smoothing=0.9),
}
REMEDIES = ("GradNorm α 1.5", "GradNorm α 1.5, log", "GradNorm α 1.5, smoothing")


def train(folder: Path, name: str, arm: str, seed: int, steps: int, mean: dict[str, float]) -> dict[str, Any]:
    """Train once. Return the test errors by task, the mean weights and the trace of GradNorm's weights."""
    table = TABLES[name]
    options = {**table.options, "seed": seed, "standardize_targets": arm.startswith("standardized")}
    data = TabularDataModule(folder / table.file, targets=targets_of(folder, table), **options)
    data.setup()
    inputs, targets = data.train_data.inputs, data.train_data.targets
    tasks = list(targets)
    torch.manual_seed(seed)
    heads = {task: one.head for task, one in tabular_tasks(100, data.scales).items()}
    model = nn.ModuleDict({"encoder": MLP(data.input_dim, hidden=(100, 100)), "heads": nn.ModuleDict(heads)})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    rule, logs, sums = ARMS[arm](tasks, seed, mean), [], torch.zeros(len(tasks))
    lowest, network, epoch = math.inf, {}, 0
    epochs = -(-steps // -(-len(inputs) // BATCH))
    with Balancer(
        model, rule, shared_layer="encoder.layers.2", heads={task: f"heads.{task}" for task in tasks}
    ) as balancer:
        for number in range(1, epochs + 1):
            for rows in torch.randperm(len(inputs)).split(BATCH):
                optimizer.zero_grad()
                z = model["encoder"](inputs[rows])
                balancer.backward({t: masked_mse(head(z), targets[t][rows]) for t, head in model["heads"].items()})
                optimizer.step()
                balancer.step()
                if isinstance(rule, GradNormRule) and rule.last is not None:
                    sums += rule.loss_weights
                    terms = rule.last.terms
                    logs.append((rule.loss_weights.log(), float(terms.loss / terms.grad_norms.sum())))
            balancer.end_epoch()
            error = statistics.mean(score(model, data.val_data.inputs, data.val_data.targets, data.scales)[0].values())
            if error < lowest:
                lowest, epoch = error, number
                network = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.load_state_dict(network)
    errors, r2 = score(model, data.test_data.inputs, data.test_data.targets, data.scales)
    last = logs[2 * len(logs) // 3 :]
    return {
        "errors": errors,
        "r2": r2,
        "scale": {task: float(y[~y.isnan()].std()) for task, y in targets.items()},
        "best_epoch": epoch,
        "epochs": epochs,
        "mean_weights": dict(zip(tasks, (sums / len(logs)).tolist(), strict=True)) if logs else None,
        "spread": float(torch.stack([log for log, _ in last]).std(0).mean()) if logs else None,
        "distance": statistics.mean(distance for _, distance in last) if logs else None,
    }


@torch.no_grad()
def score(
    model: nn.ModuleDict, inputs: Tensor, targets: dict[str, Tensor], scales: dict[str, tuple[float, float]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return, by task, the RMSE relative to predicting the mean of the training rows, and r²."""
    z, errors, r2 = model["encoder"](inputs), {}, {}
    for task, head in model["heads"].items():
        there = ~targets[task].isnan()
        y, found = targets[task][there].double(), head(z)[there].double()
        squares = ((found - y) ** 2).sum()
        errors[task] = float((squares / ((y - scales[task][0]) ** 2).sum()).sqrt())
        r2[task] = float(1 - squares / ((y - y.mean()) ** 2).sum())
    return errors, r2


def targets_of(folder: Path, table: Table) -> Sequence[str]:
    """Return the names of the targets: the given ones, or the last columns."""
    if not isinstance(table.targets, int):
        return table.targets
    return list(read_table(folder / table.file).columns[-table.targets :])


# ---- the page --------------------------------------------------------------------------------------------------------

Found = dict[tuple[str, str, int], dict[str, Any]]
"""The results, by table, arm and seed."""


def error(found: Found, name: str, arm: str, seed: int) -> float:
    """Return the relative RMSE, averaged over the targets."""
    return statistics.mean(found[name, arm, seed]["errors"].values())


def errors_table(found: Found, names: Sequence[str], arms: Sequence[str], seeds: Sequence[int]) -> str:
    """Return the mean relative RMSE of each arm on each table, marked if it differs from equal weights (Holm)."""
    lines = [f"| relative RMSE | {' | '.join(names)} | better, worse |", "|---" + "|---:" * (len(names) + 1) + "|"]
    marks: dict[tuple[str, str], str] = {}
    for name in names:
        rivals = [arm for arm in arms if arm != "equal"]
        differences = {
            arm: [error(found, name, arm, seed) - error(found, name, "equal", seed) for seed in seeds] for arm in rivals
        }
        for arm, (test, p) in corrected_tests(differences).items():
            marks[name, arm] = "" if p >= 0.05 else " **−**" if test.mean < 0 else " **+**"
    for arm in arms:
        cells = [mean_and_spread([error(found, n, arm, s) for s in seeds], 3) + marks.get((n, arm), "") for n in names]
        counts = [sum(marks.get((name, arm), "") == mark for name in names) for mark in (" **−**", " **+**")]
        lines.append(f"| {arm} | {' | '.join(cells)} | {'' if arm == 'equal' else f'{counts[0]}, {counts[1]}'} |")
    return "\n".join(lines)


def targets_table(found: Found, names: Sequence[str], seeds: Sequence[int]) -> str:
    """Return facts about the targets: scales, how learnable they are, and the weights they get."""
    head = [
        "targets",
        "largest ÷ smallest sd",
        "r² if standardized: lowest, highest",
        "weight of the least learnable target",
    ]
    lines = [f"| | {' | '.join(head)} |", "|---" + "|---:" * len(head) + "|"]
    for name in names:
        scale = found[name, "equal", seeds[0]]["scale"]
        r2 = {t: statistics.mean(found[name, "standardized", seed]["r2"][t] for seed in seeds) for t in scale}
        hardest = min(r2, key=lambda task: r2[task])
        weights = [found[name, "GradNorm α 1.5", seed]["mean_weights"][hardest] for seed in seeds]
        cells = [
            str(len(scale)),
            f"{max(scale.values()) / min(scale.values()):,.0f}",
            f"{min(r2.values()):.2f}, {max(r2.values()):.2f}",
            f"{mean_and_spread(weights, 2)} of {len(scale)}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def remedies_table(found: Found, names: Sequence[str], seeds: Sequence[int]) -> str:
    """Return, for each remedy, the spread of the log weights, the distance from the target norms, and the error."""
    head = [f"{name}: sd of log w, distance, error" for name in names]
    lines = [f"| | {' | '.join(head)} |", "|---" + "|---:" * len(names) + "|"]
    for arm in REMEDIES:
        cells = []
        for name in names:
            runs = [found[name, arm, seed] for seed in seeds]
            spread, distance = (statistics.mean(run[key] for run in runs) for key in ("spread", "distance"))
            mean = statistics.mean(error(found, name, arm, seed) for seed in seeds)
            cells.append(f"{spread:.3f}, {distance:.2f}, {mean:.3f}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: Found, names: Sequence[str], arms: Sequence[str], seeds: Sequence[int], path: Path) -> None:
    """Draw each arm's error divided by that of equal weights, one point per seed, and weight against learnability."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rivals = [arm for arm in arms if arm != "equal"]
    figure, axes = plt.subplots(2, len(names) // 2 or 1, figsize=(11, 6.5), sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for row, arm in enumerate(rivals):
            ratios = [error(found, name, arm, seed) / error(found, name, "equal", seed) for seed in seeds]
            axis.plot(ratios, [row] * len(ratios), "o", color="0.6", markersize=3)
            axis.plot(statistics.mean(ratios), row, "|", color="C0", markersize=14, markeredgewidth=2)
        axis.axvline(1, color="0.3", linewidth=0.8)
        axis.set(title=name, yticks=range(len(rivals)), yticklabels=rivals)
        axis.locator_params(axis="x", nbins=4)
        axis.invert_yaxis() if axis is axes[0, 0] else None
    figure.supxlabel("relative RMSE ÷ that of equal weights: left is better")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    figure, axis = plt.subplots(figsize=(6.5, 4))
    for name in names:
        tasks = list(found[name, "equal", seeds[0]]["scale"])
        r2 = [max(-0.2, statistics.mean(found[name, "standardized", s]["r2"][t] for s in seeds)) for t in tasks]
        weights = [statistics.mean(found[name, "GradNorm α 1.5", s]["mean_weights"][t] for s in seeds) for t in tasks]
        axis.plot(r2, [w / len(tasks) for w in weights], "o", markersize=5, alpha=0.7, label=name)
    axis.set(
        xlabel="r² of the target, standardized (below −0.2 drawn there)", ylabel="share of GradNorm's weight (α 1.5)"
    )
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_name(f"{path.stem}_weights.png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=1500, help="number of steps, rounded up to whole epochs")
    parser.add_argument("--runs", type=Path, default=Path("outputs/tabular"), help="folder of the finished runs")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.tables, options.seeds, options.steps, options.output = ["jura", "energy"], [0, 1], 60, Path("outputs")
    be_quiet()
    warnings.filterwarnings("ignore", message=".*task .* has held more than")  # studied here
    found: Found = {}
    # First, because its mean weights become the static ones.
    arms = ["GradNorm α 1.5", *(arm for arm in ARMS if arm != "GradNorm α 1.5")]
    for seed, name, arm in itertools.product(options.seeds, options.tables, arms):
        mean = found.get((name, "GradNorm α 1.5", seed), {}).get("mean_weights")
        settings = {"table": name, "arm": arm, "seed": seed, "steps": options.steps}
        make = lambda: train(options.folder, name, arm, seed, options.steps, mean)  # noqa: B023, E731
        found[name, arm, seed] = kept(options.runs, f"{name}_{arm}_{seed}".replace(" ", "_"), settings, make)
        print(
            f"[{len(found)}/{len(options.seeds) * len(options.tables) * len(ARMS)}] {name}, {arm}, {seed}", flush=True
        )
    compared = [arm for arm in ARMS if arm not in REMEDIES[1:]]
    options.output.mkdir(parents=True, exist_ok=True)
    plot(found, options.tables, compared, options.seeds, options.output / "tabular.png")
    parts = [
        errors_table(found, options.tables, compared, options.seeds),
        "**−** and **+**: lower and higher than with equal weights, p < 0.05 in a t-test paired over the seeds, corrected "
        "for the table's ten tests (Holm).",
        "![Error of each arm, divided by that of equal weights](tabular.png)",
        "## The targets",
        targets_table(found, options.tables, options.seeds),
        "![Share of GradNorm's weight against how much of the target can be learned](tabular_weights.png)",
        "## Log space and smoothing",
        "Over the last third of training: the standard deviation of log w, mean over the tasks; the distance of the gradient "
        "norms from their targets, Σ |G − target| / Σ G, of averages if they are smoothed; and the error.",
        remedies_table(found, options.tables, options.seeds),
    ]
    about = (
        f". Seeds {', '.join(map(str, options.seeds))}, for the splits and the network; {options.steps:,} steps, batches of "
        "64, Adam (lr 1e-3), MLP of 2 × 100, one linear head per target. 70 % of the rows for training, 15 % for validation, "
        "15 % for the test; Parkinson's is split by subject; missing inputs of river flow get the training rows' means. Tests "
        "the network from the epoch with the lowest mean relative RMSE on the validation rows. Relative RMSE: 1 means "
        "predicting the training rows' mean; averaged over the targets. Targets are in their original units, except in "
        "`standardized`, which is equal weights on targets of mean 0 and standard deviation 1, and `standardized, GradNorm`. "
        "`GradNorm static` fixes the mean weights of GradNorm with α 1.5 and the same seed. Mean ± standard deviation "
        "over the seeds."
    )
    print(write_page(options.output / "tabular.md", "Small regressions with several targets", about, parts))


if __name__ == "__main__":
    main()
