"""The paper's toy problem (GradNorm, section 4): equal weights, GradNorm, uncertainty weighting; table and figure.

    python scripts/reproduce_toy.py                 # T = 2 and T = 10, five seeds, writes docs/results/toy.md and .png
    python scripts/reproduce_toy.py --steps 8000 --seeds 0 1 2 --name toy_8000_steps
    python scripts/reproduce_toy.py --quick         # a smoke test with one seed and few steps

The criterion is the paper's: the test losses divided by their initial values, summed over the tasks. All runs of a
seed have the same initial network and see the same batches. Finished runs below --runs are skipped.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import torch
from pages import be_quiet, kept, mean_and_spread, write_page
from typing_extensions import override

from lightning_gradnorm import GradNorm, MultiTaskModule, Scalarization
from lightning_gradnorm.experiments.problems.small import MLP, TEN_SIGMAS, ToyDataModule
from lightning_gradnorm.experiments.problems.small.tasks import regression_tasks
from lightning_gradnorm.strategies import Uncertainty

mpl.use("Agg")
import matplotlib.pyplot as plt

EQUAL, GRADNORM, UNCERTAINTY = METHODS = ("equal weights", "GradNorm", "uncertainty")
COLORS = {EQUAL: ("#444444", "--"), GRADNORM: ("#0072b2", "-"), UNCERTAINTY: ("#d55e00", "-.")}


@dataclass
class Trace:
    """Task weights at every step, and the summed test-loss ratio every N steps."""

    weights: list[list[float]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


Traces = dict[str, list[Trace]]
"""Method → one trace per seed."""


class Tracer(L.Callback):
    """Records a trace."""

    def __init__(self, balancing: GradNorm | Scalarization | None, every: int) -> None:
        self.balancing, self.every, self.trace = balancing, every, Trace()
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
        self.trace.steps.append(trainer.global_step)
        self.trace.ratios.append(sum(loss / self._initial[task] for task, loss in losses.items()))

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.datamodule.setup("test")
        self._look(trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self.balancing is not None:
            self.trace.weights.append(list(self.balancing.weights.values()))
        if trainer.global_step % self.every == 0:
            self._look(trainer, pl_module)


def balancing(method: str, options: argparse.Namespace) -> GradNorm | Scalarization | None:
    """Return the method's callback."""
    optimizer = partial(torch.optim.Adam, lr=options.weights_lr)
    if method == GRADNORM:
        return GradNorm(alpha=options.alpha, optimizer=optimizer)
    return Scalarization(Uncertainty(), optimizer=optimizer) if method == UNCERTAINTY else None


def train(sigmas: list[float], seed: int, method: str, options: argparse.Namespace) -> Trace:
    """Train once."""
    L.seed_everything(seed, verbose=False)
    data = ToyDataModule(
        sigmas=sigmas, seed=seed, train_size=options.train_size, spread=options.spread, inputs=options.inputs
    )
    model = MultiTaskModule(
        encoder=MLP(in_features=250),
        tasks=regression_tasks(len(sigmas), in_features=100, out_features=100),
        optimizer=partial(torch.optim.Adam, lr=options.lr),
    )
    callback = balancing(method, options)
    tracer = Tracer(callback, every=options.look_every)
    trainer = L.Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        accelerator="cpu",
        limit_val_batches=0,
        callbacks=[tracer, *([callback] if callback is not None else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    return tracer.trace


def draw(path: Path, title: str, sigmas: list[float], traces: Traces) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colors = mpl.colormaps["viridis"].resampled(len(sigmas))
    for rank, (sigma, i) in enumerate(sorted((sigma, i) for i, sigma in enumerate(sigmas))):
        left.plot([w[i] for w in traces[GRADNORM][0].weights], color=colors(rank), label=f"σ = {sigma:g}")
    left.set(xlabel="step", ylabel="task weight $w_i$", title=f"{title}: weights of GradNorm (first seed)")
    left.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for method, (color, style) in COLORS.items():
        curves = torch.tensor([trace.ratios for trace in traces[method]])
        steps = traces[method][0].steps
        right.fill_between(steps, curves.amin(0), curves.amax(0), color=color, alpha=0.15, linewidth=0)
        named = f"{method} (mean, range of {len(curves)} seeds)"
        right.plot(steps, curves.mean(0), style, color=color, label=named)
    right.set(xlabel="step", ylabel="Σ test loss / initial test loss", title=f"{title}: task-normalized test loss")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(sigmas: list[float], seeds: list[int], traces: Traces) -> str:
    ends = {method: [trace.ratios[-1] for trace in of_method] for method, of_method in traces.items()}
    lines = [f"| seed | {' | '.join(METHODS)} | final weights of GradNorm |", "|---|" + "---:|" * len(METHODS) + "---|"]
    for place, seed in enumerate(seeds):
        weights = ", ".join(f"{w:.2f}" for w in traces[GRADNORM][place].weights[-1])
        lines.append(f"| {seed} | {' | '.join(f'{ends[method][place]:.4f}' for method in METHODS)} | {weights} |")
    means = " | ".join(mean_and_spread(ends[method]) for method in METHODS)
    lines.append(f"| mean ± std | {means} | σ = {', '.join(f'{s:g}' for s in sigmas)} |")
    against = [
        f"{method} in {sum(ours < theirs for ours, theirs in zip(ends[GRADNORM], ends[method], strict=True))}"
        for method in METHODS
        if method != GRADNORM
    ]
    return "\n".join(lines) + f"\n\nOf {len(seeds)} seeds, GradNorm ends below {' and below '.join(against)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the network's Adam")
    parser.add_argument("--alpha", type=float, default=0.12)
    parser.add_argument("--weights-lr", type=float, default=0.025, help="learning rate of the weights' Adam")
    parser.add_argument("--spread", default="std", choices=["std", "variance"], help="interpretation of N(0, 10)")
    parser.add_argument("--inputs", default="normal", choices=["uniform", "normal", "unit"])
    parser.add_argument("--train-size", type=int, default=10_000)
    parser.add_argument("--look-every", type=int, default=100)
    parser.add_argument("--name", default="toy", help="name of the output files")
    parser.add_argument("--runs", type=Path, default=Path("outputs/reproduce_toy"), help="folder of the finished runs")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.look_every, options.train_size = [0], 20, 10, 500
    be_quiet()
    options.output.mkdir(parents=True, exist_ok=True)
    parts = []
    same = {
        key: value for key, value in vars(options).items() if key not in ("seeds", "name", "runs", "output", "quick")
    }
    for title, sigmas in (("T = 2", [1.0, 100.0]), ("T = 10", list(TEN_SIGMAS))):
        traces: Traces = {method: [] for method in METHODS}
        for seed in options.seeds:
            for method in METHODS:
                settings = {**same, "sigmas": sigmas, "seed": seed, "method": method}
                name = f"{method} T{len(sigmas)} seed{seed}".replace(" ", "_")
                train_it = partial(train, sigmas, seed, method, options)
                found = kept(options.runs, name, settings, lambda train_it=train_it: asdict(train_it()))
                traces[method].append(Trace(**found))
            ends = ", ".join(f"{method} {traces[method][-1].ratios[-1]:.4f}" for method in METHODS)
            print(f"{title}, seed {seed}: {ends}", flush=True)
        picture = f"{options.name}_{len(sigmas)}.png"
        draw(options.output / picture, title, sigmas, traces)
        parts += [f"## {title}", table(sigmas, options.seeds, traces), f"![{title}]({picture})"]
    described = (
        f". Adam, lr {options.lr:g}, batch 100 of {options.train_size} samples, {options.steps} steps; N(0, 10) read as "
        f"{options.spread}, inputs {options.inputs}; GradNorm α = {options.alpha:g}, Adam lr {options.weights_lr:g} on the "
        "weights, and on the variances of uncertainty weighting. Sum over the tasks of test loss ÷ test loss at the "
        "start; lower is better."
    )
    report = write_page(options.output / f"{options.name}.md", "The paper's toy problem", described, parts)
    print(f"Wrote {report}")


if __name__ == "__main__":
    main()
