"""`make demo`: equal weights and GradNorm on the same network, the same digits and the same seed, side by side.

python scripts/demo.py                        # about four minutes on two CPU cores
python scripts/demo.py trainer.max_epochs=1   # any option of gradnorm-train
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from rich.console import Console

from lightning_gradnorm.experiments.report import comparison_table, read_run

STRATEGIES = ("equal", "gradnorm")
# In so small a network threads wait for each other more than they compute, above all beside other work.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ}


def main() -> None:
    parent = Path("outputs") / "demo" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    console = Console()
    for balancing in STRATEGIES:
        options = [
            "experiment=multimnist",
            f"balancing={balancing}",
            f"hydra.run.dir={parent / balancing}",
            *sys.argv[1:],
        ]
        console.rule(f"gradnorm-train {' '.join(options)}")
        trained = subprocess.run(
            [sys.executable, "-m", "lightning_gradnorm.experiments.cli.train", *options], check=False, env=ENVIRONMENT
        )
        if trained.returncode:
            sys.exit(trained.returncode)
    console.rule()
    console.print(comparison_table([read_run(parent / balancing) for balancing in STRATEGIES]))
    tensorboard = Path(sys.executable).with_name("tensorboard")
    console.print(f"Both runs in pictures:\n  {tensorboard} --logdir {parent}", soft_wrap=True, highlight=False)
    console.print("and open http://localhost:6006/#custom_scalars: weights, gradient norms and losses, task by task.")


if __name__ == "__main__":
    main()
