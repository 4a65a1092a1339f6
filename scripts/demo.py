"""`make demo`: compares equal weights and GradNorm on the same network, digits and seed.

python scripts/demo.py                        # about a minute on two CPU cores
python scripts/demo.py trainer.max_epochs=8   # any option of gradnorm-train
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from rich.console import Console

from lightning_gradnorm.experiments.cli.console import executable
from lightning_gradnorm.experiments.report import (
    Run,
    by_task,
    comparison_table,
    higher_is_better,
    read_run,
    tasks_of,
)

STRATEGIES = ("equal", "gradnorm")
# In such a small network, threads mostly wait for each other, especially on a busy machine.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ}


def main() -> None:
    parent = Path("outputs") / "demo" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    console = Console()
    for balancing in STRATEGIES:
        options = [
            "experiment=multimnist",
            "trainer.max_epochs=5",
            f"balancing={balancing}",
            f"hydra.run.dir={parent / balancing}",
            *sys.argv[1:],
        ]
        console.rule()
        say(console, shlex.join([executable("gradnorm-train"), *options]))
        trained = subprocess.run(
            [sys.executable, "-m", "lightning_gradnorm.experiments.cli.train", *options], check=False, env=ENVIRONMENT
        )
        if trained.returncode:
            sys.exit(trained.returncode)
    console.rule()
    equal, gradnorm = (read_run(parent / balancing) for balancing in STRATEGIES)
    console.print(comparison_table([equal, gradnorm]))
    for sentence in explained(equal, gradnorm):
        console.print(sentence, highlight=False)
    say(console, f"\nView both runs:\n  {executable('tensorboard')} --logdir {parent}")
    say(console, "  http://localhost:6006/#custom_scalars: weights, gradient norms and losses, task by task")


def say(console: Console, text: str) -> None:
    """Print a command without wrapping, so you can copy it in a terminal of any width."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def explained(equal: Run, gradnorm: Run) -> tuple[str, str]:
    """Return one sentence about the table, and one about why the sum of the losses is misleading.

    Args:
        equal: the run with equal weights.
        gradnorm: the run to compare with it.
    """
    gains, costs = [], []
    for task in tasks_of(equal.metrics):
        old, new = by_task(equal.metrics)[task], by_task(gradnorm.metrics)[task]
        metric = next((name for name in old if name != "loss" and higher_is_better(name) is not None), "loss")
        is_better = (new[metric] > old[metric]) == bool(higher_is_better(metric))
        (gains if is_better else costs).append(f"{task} ({metric} {old[metric]:.3g} → {new[metric]:.3g})")
    losses = {task: by_task(equal.metrics)[task]["loss"] for task in tasks_of(equal.metrics)}
    largest = max(losses, key=lambda task: losses[task])
    share = losses[largest] / sum(losses.values())
    first = (
        f"GradNorm gave every task a similar influence on the shared layers: better in {', '.join(gains) or 'no task'}"
    )
    first += f", worse in {', '.join(costs)}." if costs else "."
    second = (
        f"The sum of the losses ('all') is misleading: {share:.0%} of it is the loss of '{largest}', only because of "
        "its units, so compare the tasks one by one."
    )
    return first, second


if __name__ == "__main__":
    main()
