"""The paper's toy problem (GradNorm, section 4): equal weights against GradNorm, several seeds, table and figure.

    python scripts/reproduce_toy.py                 # T = 2 and T = 10, five seeds, writes docs/results/toy.md and .png
    python scripts/reproduce_toy.py --steps 8000 --seeds 0 1 2 --name toy_8000_steps
    python scripts/reproduce_toy.py --quick         # one seed, few steps: shows that it runs

The criterion is the paper's: the test losses divided by their values at the start, summed over the tasks. Both runs of a
seed have the same initial network and see the same batches.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import torch
from pages import be_quiet, write_page
from typing_extensions import override

from lightning_gradnorm import GradNorm, MultiTaskModule
from lightning_gradnorm.data import TEN_SIGMAS, ToyDataModule
from lightning_gradnorm.networks import MLP
from lightning_gradnorm.tasks import regression_tasks

mpl.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = ("seed", "equal weights", "GradNorm", "difference", "final weights")


class Trace(L.Callback):
    """Notes the weights at every step, and the summed test-loss ratio every so many steps."""

    def __init__(self, gradnorm: GradNorm | None, every: int) -> None:
        self.gradnorm, self.every = gradnorm, every
        self.steps: list[int] = []
        self.ratios: list[float] = []
        self.weights: list[list[float]] = []
        self._initial: dict[str, float] = {}

    def _test_losses(self, module: MultiTaskModule, data: ToyDataModule) -> dict[str, float]:
        sums: dict[str, float] = {}
        with torch.no_grad():
            batches = list(data.test_dataloader())
            for inputs, targets in batches:
                for task, prediction in module(inputs).items():
                    loss = torch.nn.functional.mse_loss(prediction, targets[task]).item()
                    sums[task] = sums.get(task, 0.0) + loss / len(batches)
        return sums

    def _look(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        losses = self._test_losses(module, trainer.datamodule)
        self._initial = self._initial or losses
        self.steps.append(trainer.global_step)
        self.ratios.append(sum(loss / self._initial[task] for task, loss in losses.items()))

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.datamodule.setup("test")
        self._look(trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self.gradnorm is not None:
            self.weights.append(list(self.gradnorm.weights.values()))
        if trainer.global_step % self.every == 0:
            self._look(trainer, pl_module)


def train(sigmas: list[float], seed: int, gradnorm: GradNorm | None, options: argparse.Namespace) -> Trace:
    L.seed_everything(seed, verbose=False)
    data = ToyDataModule(
        sigmas=sigmas, seed=seed, train_size=options.train_size, spread=options.spread, inputs=options.inputs
    )
    model = MultiTaskModule(
        encoder=MLP(in_features=250),
        tasks=regression_tasks(len(sigmas), in_features=100, out_features=100),
        optimizer=partial(torch.optim.Adam, lr=options.lr),
    )
    trace = Trace(gradnorm, every=options.look_every)
    trainer = L.Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        accelerator="cpu",
        limit_val_batches=0,
        callbacks=[trace, *([gradnorm] if gradnorm is not None else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    return trace


def draw(path: Path, title: str, sigmas: list[float], equal: list[Trace], balanced: list[Trace]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colours = mpl.colormaps["viridis"].resampled(len(sigmas))
    for rank, (sigma, i) in enumerate(sorted((sigma, i) for i, sigma in enumerate(sigmas))):
        left.plot([w[i] for w in balanced[0].weights], color=colours(rank), label=f"σ = {sigma:g}")
    left.set(xlabel="step", ylabel="task weight $w_i$", title=f"{title}: weights of GradNorm (first seed)")
    left.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for traces, name, colour, style in (
        (equal, "equal weights", "#444444", "--"),
        (balanced, "GradNorm", "#0072b2", "-"),
    ):
        curves = torch.tensor([trace.ratios for trace in traces])
        right.fill_between(traces[0].steps, curves.amin(0), curves.amax(0), color=colour, alpha=0.15, linewidth=0)
        right.plot(
            traces[0].steps, curves.mean(0), style, color=colour, label=f"{name} (mean, range of {len(traces)} seeds)"
        )
    right.set(xlabel="step", ylabel="Σ test loss / initial test loss", title=f"{title}: task-normalised test loss")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(sigmas: list[float], seeds: list[int], equal: list[Trace], balanced: list[Trace]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---:|---:|---:|---|"]
    for seed, plain, ours in zip(seeds, equal, balanced, strict=True):
        weights = ", ".join(f"{w:.2f}" for w in ours.weights[-1])
        difference = ours.ratios[-1] - plain.ratios[-1]
        lines.append(f"| {seed} | {plain.ratios[-1]:.4f} | {ours.ratios[-1]:.4f} | {difference:+.4f} | {weights} |")
    ends = [[trace.ratios[-1] for trace in traces] for traces in (equal, balanced)]
    shown = [f"{statistics.mean(e):.4f} ± {statistics.stdev(e) if len(e) > 1 else 0:.4f}" for e in ends]
    wins = sum(ours < plain for plain, ours in zip(*ends, strict=True))
    described = f"σ = {', '.join(f'{s:g}' for s in sigmas)}"
    lines.append(f"| mean ± std | {shown[0]} | {shown[1]} | lower in {wins} of {len(seeds)} | {described} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the network's Adam")
    parser.add_argument("--alpha", type=float, default=0.12)
    parser.add_argument("--weights-lr", type=float, default=0.025, help="of the weights' Adam")
    parser.add_argument("--spread", default="std", choices=["std", "variance"], help="how N(0, 10) is read")
    parser.add_argument("--inputs", default="normal", choices=["uniform", "normal", "unit"])
    parser.add_argument("--train-size", type=int, default=10_000)
    parser.add_argument("--look-every", type=int, default=100)
    parser.add_argument("--name", default="toy", help="of the files written")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.look_every, options.train_size = [0], 20, 10, 500
    be_quiet()
    options.output.mkdir(parents=True, exist_ok=True)
    parts = []
    for title, sigmas in (("T = 2", [1.0, 100.0]), ("T = 10", list(TEN_SIGMAS))):
        equal, balanced = [], []
        for seed in options.seeds:
            optimizer = partial(torch.optim.Adam, lr=options.weights_lr)
            equal.append(train(sigmas, seed, None, options))
            balanced.append(train(sigmas, seed, GradNorm(alpha=options.alpha, optimizer=optimizer), options))
            print(
                f"{title}, seed {seed}: equal {equal[-1].ratios[-1]:.4f}, GradNorm {balanced[-1].ratios[-1]:.4f}",
                flush=True,
            )
        picture = f"{options.name}_{len(sigmas)}.png"
        draw(options.output / picture, title, sigmas, equal, balanced)
        parts += [f"## {title}", table(sigmas, options.seeds, equal, balanced), f"![{title}]({picture})"]
    described = (
        f". Adam, lr {options.lr:g}, batch 100 of {options.train_size} samples, {options.steps} steps; N(0, 10) read as "
        f"{options.spread}, inputs {options.inputs}; GradNorm α = {options.alpha:g}, Adam lr {options.weights_lr:g} on the "
        "weights. Sum over the tasks of test loss ÷ test loss at the start; lower is better."
    )
    report = write_page(options.output / f"{options.name}.md", "The paper's toy problem", described, parts)
    print(f"Wrote {report}")


if __name__ == "__main__":
    main()
