"""GradNorm on two correlated sinusoid tasks: r² on the test split beside its ceiling, over several draws.

    python scripts/reproduce_sinusoids.py           # ten draws, 50 epochs each, writes docs/results/sinusoids.md
    python scripts/reproduce_sinusoids.py --quick   # one draw, one epoch: shows that it runs

Each draw is another pair of tasks: other directions, frequencies and phases. Part of the labels is noise that no model can
know, so that r² cannot exceed 1 − σ²_noise / Var(y); that ceiling is given beside it. Everything else is as in
`gradnorm-train experiment=sinusoids`, whose configuration the script composes.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import lightning as L
from hydra import compose, initialize_config_dir
from pages import be_quiet, write_page

from lightning_gradnorm import GradNorm
from lightning_gradnorm.cli.build import build
from lightning_gradnorm.cli.config import conf_dir, register

TASKS = ("first", "second")


def run(seed: int, epochs: int | None) -> dict[str, dict[str, float]]:
    """Train one draw; return r², its ceiling and the final weight of each task."""
    overrides = ["experiment=sinusoids", f"seed={seed}"] + ([f"trainer.max_epochs={epochs}"] if epochs else [])
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=overrides)
    L.seed_everything(seed, verbose=False)
    data, model, gradnorm = (build(config, group) for group in ("data", "model", "balancing"))
    assert isinstance(gradnorm, GradNorm)
    trainer = L.Trainer(
        max_epochs=config.trainer.max_epochs,
        accelerator="cpu",
        callbacks=[gradnorm],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    (tested,) = trainer.test(model, datamodule=data, verbose=False)
    ceiling = data.r2_ceiling
    return {
        task: {"r2": tested[f"test/r2/{task}"], "ceiling": ceiling[task], "w": gradnorm.weights[task]} for task in TASKS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--epochs", type=int, default=None, help="instead of the experiment's own number")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs = [0], 1
    be_quiet()
    register()
    lines = ["| draw | " + " | ".join(f"r² {t} | ceiling | ratio | w" for t in TASKS) + " | Σ w |", "|---" * 10 + "|"]
    ratios = []
    for seed in options.seeds:
        found = run(seed, options.epochs)
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
    ]
    page = write_page(options.output / "sinusoids.md", "Two correlated sinusoid tasks", described, parts)
    print(f"Wrote {page}: median ratio {statistics.median(ratios):.4f}")


if __name__ == "__main__":
    main()
