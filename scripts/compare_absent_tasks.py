"""GradNorm on two alternating data sets, with one task per batch: the benefit of `absent_tasks="last_seen"`.

    python scripts/compare_absent_tasks.py FOLDER           # writes docs/results/absent_tasks.md; some minutes
    python scripts/compare_absent_tasks.py FOLDER --quick   # a smoke test with one seed and one epoch; writes outputs/

FOLDER has two public files: sarcos_inv_test.mat (gaussianprocess.org/gpml/data: a robot arm's torques; its rows are split
here, none is from the training file) and parkinsons_updrs_uci_form.data (UCI, Parkinsons Telemonitoring). Two targets of each
are the tasks. Half of the training rows have only the first, half only the second, like two data sets.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.io
import torch
from pages import mean_and_spread, write_page
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_gradnorm import Balancer
from lightning_gradnorm.engine.rule import Rule
from lightning_gradnorm.strategies import FixedRule, GradNormRule

BATCH = 32
ARMS = {
    "equal weights": "each batch a step",
    "GradNorm, leave_out": "each batch a step",
    "GradNorm, last_seen": "each batch a step",
    "GradNorm, two batches a step": "one batch of each task",
    "equal weights, two batches a step": "one batch of each task",
}


def sarcos(folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Return 21 positions, velocities and accelerations, and two of the seven torques, in their original units."""
    rows = torch.from_numpy(scipy.io.loadmat(folder / "sarcos_inv_test.mat")["sarcos_inv_test"]).float()
    return rows[:, :21], {"torque 1": rows[:, 21:22], "torque 5": rows[:, 25:26]}


def parkinsons(folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Return age, sex, time and 16 measures of the voice, and two scores."""
    rows = torch.from_numpy(
        np.genfromtxt(folder / "parkinsons_updrs_uci_form.data", delimiter=",", skip_header=1)
    ).float()
    return torch.cat([rows[:, 1:4], rows[:, 6:]], dim=1), {"motor_UPDRS": rows[:, 4:5], "total_UPDRS": rows[:, 5:6]}


def rule_of(arm: str, tasks: list[str]) -> Rule:
    """Return the balancing rule."""
    if arm.startswith("equal"):
        return FixedRule(dict.fromkeys(tasks, 1.0))
    return GradNormRule(tasks, absent_tasks="last_seen" if "last_seen" in arm else "leave_out")


def batches(rows: Tensor) -> Iterator[Tensor]:
    """Yield indices of batches, in a new order."""
    yield from rows[torch.randperm(len(rows))].split(BATCH)


def train(
    arm: str, inputs: Tensor, targets: dict[str, Tensor], seed: int, epochs: int
) -> tuple[list[float], list[float]]:
    """Train once. Return each task's validation error, as a share of the target's variance, and mean weight."""
    torch.manual_seed(seed)
    order = torch.randperm(len(inputs))
    validation, training = order[: len(order) // 5], order[len(order) // 5 :]
    inputs = (inputs - inputs[training].mean(0)) / inputs[training].std(0).clamp(min=1e-6)
    encoder = nn.Sequential(nn.Linear(inputs.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    heads = nn.ModuleList(nn.Linear(64, 1) for _ in targets)
    model = nn.ModuleDict({"encoder": encoder, "heads": heads})
    own = dict(zip(targets, training.tensor_split(2), strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Balancer(model, rule_of(arm, list(targets)), shared_layer="encoder.2", heads=None) as balancer:
        for _ in range(epochs):
            for together in zip(*map(batches, own.values()), strict=False):
                for task, head, rows in zip(targets, heads, together, strict=True):
                    balancer.backward({task: mse_loss(head(encoder(inputs[rows])), targets[task][rows])})
                    if "two batches" not in arm or task == list(targets)[-1]:
                        optimizer.step()
                        balancer.step()
                        optimizer.zero_grad()
        weights = getattr(balancer, "mean_weights" if arm.startswith("GradNorm") else "weights")
    with torch.no_grad():
        z = encoder(inputs[validation])
        errors = [
            float(mse_loss(head(z), y[validation]) / y[training].var())
            for head, y in zip(heads, targets.values(), strict=True)
        ]
    return errors, [weights[task] for task in targets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs, options.output = 1, 1, Path("outputs")
    torch.set_num_threads(1)
    # Expected here: there is one task per batch, and torque 5, on a small scale, gets most of the weight.
    warnings.filterwarnings("ignore", message="Balancer: (in none of the last|task .* has held more than)")
    parts = []
    for name, load in {"SARCOS": sarcos, "Parkinsons Telemonitoring": parkinsons}.items():
        inputs, targets = load(options.folder)
        found = {
            (arm, seed): train(arm, inputs, targets, seed, options.epochs)
            for arm, seed in itertools.product(ARMS, range(options.seeds))
        }
        columns = ["a step is", *(f"error of {task}" for task in targets), "mean error", "better than equal"]
        lines = [f"| {' | '.join([name, *columns, f'mean weight of {next(iter(targets))}'])} |"]
        lines += ["|---|---|---:|---:|---:|---:|---:|"]
        for arm, step in ARMS.items():
            errors, weights = zip(*(found[arm, seed] for seed in range(options.seeds)), strict=True)
            means = [sum(one) / len(one) for one in errors]
            baseline = "equal weights, two batches a step" if "two" in arm else "equal weights"
            equal = [sum(found[baseline, seed][0]) / 2 for seed in range(options.seeds)]
            better = (
                f"{sum(a < b for a, b in zip(means, equal, strict=True))} of {options.seeds}" if arm != baseline else ""
            )
            numbers = [*zip(*errors, strict=True), means]
            cells = [mean_and_spread(one) for one in numbers]
            lines += [
                f"| {arm} | {step} | {' | '.join(cells)} | {better} | {mean_and_spread([w[0] for w in weights], 3)} |"
            ]
        parts.append("\n".join(lines))
    about = (
        f". Seeds 0 to {options.seeds - 1}, {options.epochs} epochs, batches of {BATCH}, Adam (lr 1e-3), MLP of 2 × 64, "
        f"GradNorm with its defaults (alpha 1.5). Half of the training rows (80 %) have only the first target, the other "
        f"half only the second, in their original units; batches of both alternate. Errors are mean squared errors on "
        f"the other 20 %, divided by the target's variance: 1 means predicting the mean. Mean ± standard deviation "
        f"over the seeds. Better than equal: number of seeds with a mean error below that of equal weights with the same "
        f"steps. Mean weights are over training."
    )
    print(write_page(options.output / "absent_tasks.md", "One task per batch: left out, or as last seen", about, parts))


if __name__ == "__main__":
    main()
