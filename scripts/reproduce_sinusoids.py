"""GradNorm on two correlated sinusoid tasks: test r² and its ceiling over several draws, and training curves.

    python scripts/reproduce_sinusoids.py           # ten draws, 50 epochs each, writes docs/results/sinusoids.md
    python scripts/reproduce_sinusoids.py --quick   # a smoke test with one draw and one epoch

Each draw is a different pair of tasks, with other directions, frequencies and phases. Part of the labels is noise that no
model can predict, so r² cannot exceed 1 − σ²_noise / Var(y). The table has this ceiling, too. Everything else is the same
as in `gradnorm-train experiment=sinusoids`, whose configuration the script composes.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
from hydra import compose, initialize_config_dir
from pages import be_quiet, kept, write_page
from typing_extensions import override

from lightning_gradnorm import GradNorm
from lightning_gradnorm.experiments.cli.build import build
from lightning_gradnorm.experiments.cli.config import conf_dir, register

mpl.use("Agg")
import matplotlib.pyplot as plt

TASKS = ("first", "second")


class Curves(L.Callback):
    """Records validation r² and weighted squared error ``w_i L_i`` of each task after each epoch."""

    def __init__(self, gradnorm: GradNorm) -> None:
        self.gradnorm = gradnorm
        self.r2: dict[str, list[float]] = {task: [] for task in TASKS}
        self.weighted: dict[str, list[float]] = {task: [] for task in TASKS}

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for task in TASKS:
            self.r2[task].append(float(trainer.callback_metrics[f"val/r2/{task}"]))
            error = float(trainer.callback_metrics[f"val/mse/{task}"])
            self.weighted[task].append(self.gradnorm.weights[task] * error)


def run(seed: int, epochs: int | None) -> dict[str, dict[str, Any]]:
    """Train one draw. Return r², its ceiling, the final weight and the curves of each task."""
    overrides = ["experiment=sinusoids", f"seed={seed}"] + ([f"trainer.max_epochs={epochs}"] if epochs else [])
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=overrides)
    L.seed_everything(seed, verbose=False)
    data, model, gradnorm = (build(config, group) for group in ("data", "model", "balancing"))
    assert isinstance(gradnorm, GradNorm)
    curves = Curves(gradnorm)
    trainer = L.Trainer(
        max_epochs=config.trainer.max_epochs,
        accelerator="cpu",
        callbacks=[gradnorm, curves],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    (tested,) = trainer.test(model, datamodule=data, verbose=False)
    return {
        task: {
            "r2": tested[f"test/r2/{task}"],
            "ceiling": data.r2_ceiling[task],
            "w": gradnorm.weights[task],
            "r2 curve": curves.r2[task],
            "weighted curve": curves.weighted[task],
        }
        for task in TASKS
    }


def draw(path: Path, found: list[dict[str, dict[str, Any]]]) -> None:
    """Plot both curves of the first draw, and r² ÷ ceiling of all draws."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for task, color, style in zip(TASKS, ("#0072b2", "#d55e00"), ("-", "--"), strict=True):
        one = found[0][task]
        epochs = range(1, len(one["r2 curve"]) + 1)
        left.plot(epochs, one["r2 curve"], style, color=color, label=f"{task} task")
        left.axhline(one["ceiling"], color=color, linestyle=":", linewidth=1)
        middle.plot(epochs, one["weighted curve"], style, color=color, label=f"{task} task")
        for draw in found:
            relative = [value / draw[task]["ceiling"] for value in draw[task]["r2 curve"]]
            right.plot(epochs, relative, style, color=color, alpha=0.5, linewidth=1)
    left.set(xlabel="epoch", ylabel="validation r²", title="first draw (dotted: ceiling)", ylim=(0, 1.02))
    middle.set(xlabel="epoch", ylabel="validation $w_i L_i$", title="first draw: weighted squared error", yscale="log")
    right.set(xlabel="epoch", ylabel="validation r² ÷ ceiling", title=f"{len(found)} draws", ylim=(0, 1.02))
    left.legend(loc="lower right")
    middle.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--epochs", type=int, default=None, help="replaces the experiment's number of epochs")
    parser.add_argument(
        "--runs", type=Path, default=Path("outputs/reproduce_sinusoids"), help="folder of the finished runs"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs = [0], 1
    be_quiet()
    register()
    every = []
    lines = ["| draw | " + " | ".join(f"r² {t} | ceiling | ratio | w" for t in TASKS) + " | Σ w |", "|---" * 10 + "|"]
    ratios = []
    for seed in options.seeds:
        settings = {"seed": seed, "epochs": options.epochs}
        found = kept(options.runs, f"seed{seed}", settings, partial(run, seed, options.epochs))
        every.append(found)
        cells = []
        for task in TASKS:
            one = found[task]
            ratios.append(one["r2"] / one["ceiling"])
            cells += [f"{one['r2']:.4f}", f"{one['ceiling']:.4f}", f"{ratios[-1]:.4f}", f"{one['w']:.3f}"]
        total = sum(one["w"] for one in found.values())
        lines.append(f"| {seed} | " + " | ".join(cells) + f" | {total:.4f} |")
        print(lines[-1], flush=True)
    described = (
        ". The configuration is that of `gradnorm-train experiment=sinusoids` (α = 0.15, batch 100, lr 1e-3, "
        f"{options.epochs or 50} epochs); draw 0 is its default."
    )
    parts = [
        "\n".join(lines),
        f"Median of r² ÷ ceiling over {len(ratios)} tasks: {statistics.median(ratios):.4f}, lowest {min(ratios):.4f}.",
        "![Validation r², weighted squared error, and r² ÷ ceiling of all draws](sinusoids.png)",
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    draw(options.output / "sinusoids.png", every)
    page = write_page(options.output / "sinusoids.md", "Two correlated sinusoid tasks", described, parts)
    print(f"Wrote {page}: median ratio {statistics.median(ratios):.4f}")


if __name__ == "__main__":
    main()
