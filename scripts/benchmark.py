"""What balancing costs: time of a whole training step relative to equal weights, inside the same Lightning loop.

    python scripts/benchmark.py                        # GradNorm: writes docs/results/step_time.md
    python scripts/benchmark.py --of aggregation       # UPGrad and others: docs/results/step_time_aggregation.md
    python scripts/benchmark.py --cases segnet:3 engine64:2 --ways "with heads" --name step_time_real
    python scripts/benchmark.py --measure memory --rounds 3 --cases conv:10 dense:5 segnet:3     # peak_memory.md
    python scripts/benchmark.py --rounds 1             # shows that it runs
    python scripts/benchmark.py --device cuda --steps 100 --batch-factor 8   # writes docs/results/step_time_cuda.md

In each round every configuration trains one short run, in shuffled order; the figure is the median over the rounds of a
run's mean step time, first steps left out. With ``--of aggregation`` the last column is the same as TorchJD has it done by
hand, ``mtl_backward`` and ``jac_to_grad``, and in brackets stands the share of the step that the aggregator's own
computation takes. Models: `conv` (6 convolutions, linear heads), `mlp` (4 × 512, linear heads) and
`dense` (the convolutions with a 3-convolution upsampling head for each task); asked for by name, `segnet` (the paper's
SegNet on VGG16, 320 × 320 to 80 × 80, a 1 × 1 convolution for each task), `engine64` and `engine256` (the network of C-MAPSS
with so many hidden units, 256 windows of 30 cycles and 17 features, its heads for remaining life and health).
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from pages import be_quiet, write_page
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchjd.aggregation import IMTLG, MGDA, Aggregator, AlignedMTL, CAGrad, NashMTL, PCGrad, UPGrad
from torchjd.autojac import jac_to_grad, mtl_backward
from typing_extensions import override

from lightning_gradnorm import Aggregation, GradNorm
from lightning_gradnorm.dense_tasks import OUT_CHANNELS
from lightning_gradnorm.networks import ConvHead, EngineEncoder, SegNet, health_head, rul_head
from lightning_gradnorm.suggestions import did_you_mean

CASES = (("conv", 3), ("conv", 10), ("mlp", 3), ("mlp", 10), ("dense", 3), ("dense", 5))


@dataclass(frozen=True)
class Network:
    """A trunk, a head for each task, and a batch of such a size that a step takes a while."""

    encoder: Callable[[], nn.Module]
    head: Callable[[int], nn.Module]
    batch: tuple[int, ...]
    shared_layer: str
    steps: int = 24
    warm_up: int = 8


def convolutions() -> nn.Sequential:
    channels, strides = [3, 16, 32, 32, 64, 64, 64], [1, 2, 1, 2, 1, 1]
    layers: list[nn.Module] = []
    for here, there, stride in zip(channels, channels[1:], strides, strict=False):
        layers += [nn.Conv2d(here, there, 3, padding=1, stride=stride), nn.ReLU()]
    return nn.Sequential(*layers)


def perceptron() -> nn.Sequential:
    sizes = [128, 512, 512, 512, 512]
    pairs = itertools.pairwise(sizes)
    return nn.Sequential(*[layer for here, there in pairs for layer in (nn.Linear(here, there), nn.ReLU())])


def classifier(task: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def upsampling(task: int) -> nn.Module:
    up = nn.Upsample(scale_factor=2)
    first, second, third = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((64, 32), (32, 16), (16, 1)))
    return nn.Sequential(first, nn.ReLU(), up, second, nn.ReLU(), up, third)


def pixelwise(task: int) -> nn.Module:
    channels = list(OUT_CHANNELS.values())
    return ConvHead(128, channels[task % len(channels)])


def engine(hidden: int) -> Network:
    heads = (rul_head, health_head)
    trunk = partial(EngineEncoder, hidden=hidden)
    return Network(trunk, lambda task: heads[task % len(heads)](), (256, 30, 17), "encoder.funnel.6")


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
NETWORKS = {
    "conv": Network(convolutions, classifier, (16, 3, 48, 48), "encoder.10"),
    "mlp": Network(perceptron, lambda task: nn.Linear(512, 10), (256, 128), "encoder.6"),
    "dense": Network(convolutions, upsampling, (16, 3, 48, 48), "encoder.10"),
    # The paper's: 320 x 320 to 80 x 80. Seconds a step on a CPU, so a few of them will do.
    "segnet": Network(SegNet, pixelwise, (2, 3, 320, 320), "encoder.decoder.2.6", steps=6, warm_up=2),
    "engine64": engine(64),
    "engine256": engine(256),
}


class Model(L.LightningModule):
    """A trunk, T heads, T losses in the returned mapping."""

    def __init__(self, kind: str, tasks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        network = NETWORKS[kind]
        self.encoder = network.encoder()
        self.heads = nn.ModuleDict({f"task_{i}": network.head(i) for i in range(tasks)})
        self.shared_layer = network.shared_layer

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        z = self.encoder(batch)
        losses = {task: one(z).square().mean() for task, one in self.heads.items()}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


class ByHand(Model):
    """The same network, trained with TorchJD as its documentation says."""

    def __init__(self, kind: str, tasks: int, aggregator: Aggregator) -> None:
        super().__init__(kind, tasks)
        self.automatic_optimization = False
        self.aggregator = aggregator

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        z = self.encoder(batch)
        mtl_backward([one(z).square().mean() for one in self.heads.values()], features=z)
        jac_to_grad(list(self.encoder.parameters()), self.aggregator)
        optimizer.step()  # type: ignore[union-attr]


class Clock(L.Callback):
    """Notes when the first and the last of the measured steps begin, with all work before them done."""

    def __init__(self, steps: int, warm_up: int, now: Callable[[], float]) -> None:
        self.steps, self.warm_up, self.now = steps, warm_up, now
        self.times: list[float] = []

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx in (self.warm_up, self.steps - 1):
            if pl_module.device.type == "cuda":  # at these two places only: between them the host may run ahead
                torch.cuda.synchronize(pl_module.device)
            self.times.append(self.now())

    def step_time(self) -> float:
        first, last = self.times
        return (last - first) / (self.steps - 1 - self.warm_up)


class SolverClock:
    """Adds up the time that an aggregator's own computation takes."""

    def __init__(self, aggregator: Aggregator) -> None:
        self.total, self.calls, self._began = 0.0, 0, 0.0
        weighting = getattr(aggregator, "gramian_weighting", None) or getattr(aggregator, "weighting", aggregator)
        weighting.register_forward_pre_hook(self._begin)
        weighting.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.total += time.perf_counter() - self._began
        self.calls += 1


@dataclass
class Run:
    """One way to train."""

    callbacks: list[L.Callback]
    model: Callable[[str, int], Model] = Model
    solver: SolverClock | None = None


Configurations = dict[str, Callable[[], Run]]


def of_gradnorm(model: Model) -> Configurations:
    tasks, layer = list(model.heads), model.shared_layer
    heads = {task: f"heads.{task}" for task in tasks}
    return {
        "equal weights": lambda: Run([]),
        "with heads": lambda: Run([GradNorm(tasks, shared_layer=layer, heads=heads)]),
        "without heads": lambda: Run([GradNorm(tasks, shared_layer=layer)]),
        "every 8th step": lambda: Run([GradNorm(tasks, shared_layer=layer, heads=heads, update_every=8)]),
        "activation": lambda: Run([GradNorm(tasks, heads=heads, norm_of="activation")]),
    }


def of_aggregation(model: Model) -> Configurations:
    tasks = list(model.heads)
    heads = {task: f"heads.{task}" for task in tasks}

    def aggregated(aggregator: Aggregator, **options: Any) -> Run:
        return Run([Aggregation(aggregator, tasks, heads=heads, **options)], solver=SolverClock(aggregator))

    return {
        "equal weights": lambda: Run([]),
        "UPGrad": lambda: aggregated(UPGrad()),
        "PCGrad": lambda: aggregated(PCGrad()),
        "MGDA": lambda: aggregated(MGDA()),
        "IMTL-G": lambda: aggregated(IMTLG()),
        "Aligned-MTL": lambda: aggregated(AlignedMTL()),
        "CAGrad": lambda: aggregated(CAGrad(c=0.5)),
        "Nash-MTL": lambda: aggregated(NashMTL(n_tasks=len(tasks))),
        "UPGrad at parameters": lambda: aggregated(UPGrad(), at="parameters"),
        "UPGrad by hand": lambda: Run([], model=partial(ByHand, aggregator=UPGrad())),
    }


CONFIGURATIONS = {"gradnorm": of_gradnorm, "aggregation": of_aggregation}


def step_time(kind: str, tasks: int, run: Run, options: argparse.Namespace) -> tuple[float, float]:
    """Return the time of a step, and of the solver in it."""
    network = NETWORKS[kind]
    steps = options.steps or network.steps
    size, *shape = network.batch
    batch = torch.randn(
        size * options.batch_factor, *shape, device=options.device
    )  # no copy to the device in the steps
    clock = Clock(steps, network.warm_up, CLOCKS[options.clock])
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        callbacks=[*run.callbacks, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(run.model(kind, tasks), DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]
    solver = run.solver
    return clock.step_time(), solver.total / solver.calls if solver is not None and solver.calls else 0.0


def peak_memory(kind: str, tasks: int, name: str, options: argparse.Namespace) -> float:
    """Return, in MiB, by how much a run's memory grows beyond what the process has before it; for a process of its own."""
    be_quiet(options.threads)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    run = CONFIGURATIONS[options.of](Model(kind, tasks))[name]()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()  # Linux
    step_time(kind, tasks, run, options)
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def memory_of(kind: str, tasks: int, names: Sequence[str], options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the peaks of each configuration, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    peaks: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                peaks[name].append(pool.submit(peak_memory, kind, tasks, name, options).result())
    return peaks


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", choices=list(CONFIGURATIONS), default="gradnorm")
    parser.add_argument("--measure", choices=["time", "memory"], default="time")
    parser.add_argument("--cases", nargs="+", metavar="MODEL:T", help="such as conv:3 conv:10; by default all")
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="columns, besides equal weights; by default all")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, help="of each run; by default as many as suit the model, 24 or fewer")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="processor: what the processor worked for this process, on a machine that is busy with others; CPU, one thread",
    )
    parser.add_argument("--batch-factor", type=int, default=1, help="batches so many times larger, to keep a GPU busy")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--name", help="of the page; by default step_time and what of")
    options = parser.parse_args()
    options.cases = [
        (kind, int(tasks)) for kind, _, tasks in (case.partition(":") for case in options.cases or ())
    ] or CASES
    for kind, _ in options.cases:
        if kind not in NETWORKS:
            parser.error(f"--cases: there is no model '{kind}'; {did_you_mean(kind, NETWORKS)}")
        fewest = NETWORKS[kind].warm_up + 2
        if options.steps is not None and options.steps < fewest:
            parser.error(f"--steps should be at least {fewest} for {kind}; got {options.steps}")
    if options.clock == "processor" and (options.device == "cuda" or options.threads > 1):
        parser.error("--clock processor adds up all threads and sees no GPU; give --threads 1 --device cpu with it")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device; torch.cuda.is_available() is False here")
    return options


def write_memory(names: Sequence[str], options: argparse.Namespace) -> None:
    lines = [
        f"| model | T | {names[0]}, MiB | " + " | ".join(names[1:]) + " |",
        "|---|---:" + "|---:" * len(names) + "|",
    ]
    for kind, tasks in options.cases:
        peaks = {name: statistics.median(values) for name, values in memory_of(kind, tasks, names, options).items()}
        ratios = [f"{peaks[name] / peaks[names[0]]:.3f}" for name in names[1:]]
        lines.append(f"| {kind} | {tasks} | {peaks[names[0]]:.0f} | " + " | ".join(ratios) + " |")
        print(lines[-1], flush=True)
    described = (
        f", {options.rounds} rounds. Peak of the resident memory (on a GPU: of what is allocated) beyond what the process has "
        "before the training, each run in a fresh process; median, and ratio to equal weights."
    )
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    page = options.output / f"{options.name or 'peak_memory'}.md"
    write_page(page, "Peak memory of training", described, ["\n".join(lines)], where=where)


def main() -> None:
    options = read_options()
    be_quiet(options.threads)
    warnings.simplefilter("ignore")
    configurations = CONFIGURATIONS[options.of]
    plain, *others = configurations(Model("mlp", 2))
    for way in options.ways or ():
        if way not in others:
            sys.exit(f"--ways: there is no '{way}'; {did_you_mean(way, others)}")
    names = [plain, *(options.ways or others)]
    if options.measure == "memory":
        write_memory(names, options)
        return
    lines = [
        f"| model | T | {names[0]}, ms | " + " | ".join(names[1:]) + " |",
        "|---|---:" + "|---:" * len(names) + "|",
    ]
    for kind, tasks in options.cases:
        made = {name: way for name, way in configurations(Model(kind, tasks)).items() if name in names}
        times: dict[str, list[float]] = {name: [] for name in made}
        solvers: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(options.rounds):
            for name in random.sample(list(made), len(made)):
                whole, solver = step_time(kind, tasks, made[name](), options)
                times[name].append(whole)
                solvers[name].append(solver)
        baseline = statistics.median(times[names[0]])
        cells = [f"{1000 * baseline:.1f}"]
        for name in names[1:]:
            ratios = sorted(ours / equal for ours, equal in zip(times[name], times[names[0]], strict=True))
            low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
            solver = statistics.median(solvers[name]) / baseline
            share = f"; {solver:.2f}" if solver else ""
            cells.append(f"{statistics.median(times[name]) / baseline:.2f} ({low:.2f} to {high:.2f}{share})")
        lines.append(f"| {kind} | {tasks} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    on_gpu = options.device == "cuda"
    threads = f"CPU, {options.threads} thread{'s' if options.threads > 1 else ''}"
    described = (
        f", {options.rounds} rounds. Ratio to equal weights in the same Lightning loop: ratio of "
        "the medians, and in brackets the quartiles of the ratios round by round"
        + (
            "; behind them the part of the ratio that the aggregator's own computation makes up"
            if options.of != "gradnorm"
            else ""
        )
        + (". Processor time of the process." if options.clock == "processor" else ".")
    )
    name = "step_time" + ("_aggregation" if options.of == "aggregation" else "") + ("_cuda" if on_gpu else "")
    page = options.output / f"{options.name or name}.md"
    where = torch.cuda.get_device_name() if on_gpu else threads
    write_page(page, "Time of a training step", described, ["\n".join(lines)], where=where)


if __name__ == "__main__":
    main()
