"""Measures the cost of balancing: time of a whole training step relative to equal weights, in the same Lightning loop.

    python scripts/benchmark.py                        # GradNorm, ours and others': writes docs/results/step_time.md
    python scripts/benchmark.py --cases conv mlp dense transformer segnet:3 resnet:3    # T = 2, 3, 5, 10, 20, 40: an hour
    python scripts/benchmark.py --compile --cases conv:3,10 transformer:3    # trunk and heads compiled, equal weights too
    python scripts/benchmark.py --of aggregation       # UPGrad and others: docs/results/step_time_aggregation.md
    python scripts/benchmark.py --cases segnet:3 engine64:2 --ways "with heads" --name step_time_networks
    python scripts/benchmark.py --measure memory --rounds 3 --cases conv:10 dense:5 segnet:3     # peak_memory.md
    python scripts/benchmark.py --of pinn --threads 1  # GradNorm on losses made of derivatives: step_time_pinn.md
    python scripts/benchmark.py --measure first_step   # the step that finds and checks everything: first_step.md
    python scripts/benchmark.py --measure loop         # a bare loop, Lightning's, and ours in it: loop.md
    python scripts/benchmark.py --rounds 1             # a smoke test
    python scripts/benchmark.py --device cuda --steps 100 --batch-size 128   # docs/gpu.md has the commands for a GPU

In each round, every way trains one short run, in shuffled order. Equal weights train one run right before each of them,
because the speed of a machine changes from second to second. The time of a run is the median over its blocks of eight
steps, without the first steps. The ratio to the run before is the median over the rounds. The ways to compare
with equal weights:

    with heads, without heads     our callback on a LightningModule with automatic optimization
    nothing named                 the same, which finds the shared layer and the heads (only with --ways, or for the first step)
    MultiTaskModule               our callback on our module
    every 8th step, activation    with heads, and update_every=8 or norm_of="activation"
    textbook                      the paper's algorithm with double backward (create_graph), only for the task weights
    gradnorm-pytorch, LibMTL GradNorm, UPGrad by hand    from other packages (extra `bench`), used as documented
    UPGrad                        TorchJD's UPGrad through our `Aggregation`, at the representation

With ``--of aggregation``, they are TorchJD's aggregators through our callback, with the share of the aggregator's own
computation in brackets. If another package's way fails, the page reports its error.

With ``--of pinn``, it is GradNorm at the last layer of a physics-informed network, in every step and in every 10th.

Models: `conv` (6 convolutions, linear heads), `mlp` (4 × 512, linear heads), `narrow` (4 × 64, linear heads with one output,
batches of 32), `dense` (the convolutions with a 3-convolution upsampling head for each task), `toy` (the paper's 4 × 100),
`transformer` (6 layers, 64 tokens of width 128, fused attention), `segnet` and `resnet` (the paper's SegNet on VGG16 and thin
ResNet-50, 320 × 320 to 80 × 80, a 1 × 1 convolution for each task), `engine64` and `engine256` (the network for C-MAPSS with
that many hidden units, 256 windows of 30 cycles and 14 features, its heads for remaining life and health); `burgers`
(experiment=pinn_burgers).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarking import first_step, loop, memory, synchronizations, times
from benchmarking.networks import NETWORKS, TASK_COUNTS
from benchmarking.plan import Case, Plan
from benchmarking.running import CLOCKS, PRECISIONS, Setting
from benchmarking.ways import EQUAL, PINN_CASE, WAYS
from pages import be_quiet

from lightning_gradnorm._messages import did_you_mean

SIX = (("conv", 3), ("conv", 10), ("mlp", 3), ("mlp", 10), ("dense", 3), ("dense", 5))


@dataclass(frozen=True)
class Measure:
    """A measure and its defaults.

    Args:
        carry_out: function that measures and writes the page.
        page: name of the page.
        cases: networks with their numbers of tasks.
        ways: ways to compare with equal weights; if empty, all of the group.
        rounds: number of rounds.
        steps: steps of each run; ``None`` for a number that suits the network.
    """

    carry_out: Callable[[Plan], None]
    page: str
    cases: Sequence[Case]
    ways: Sequence[str] = ()
    rounds: int = 5
    steps: int | None = None


MEASURES = {
    "time": Measure(times.measure, "step_time", SIX),
    "memory": Measure(memory.measure, "peak_memory", SIX, rounds=1),
    "first_step": Measure(
        first_step.measure,
        "first_step",
        [("narrow", T) for T in (16, 128, 512)],
        ["with heads", "without heads", "nothing named"],
    ),
    "loop": Measure(loop.measure, "loop", [("toy", 2), ("toy", 10)], ["with heads"], steps=300),
    "synchronizations": Measure(synchronizations.measure, "synchronizations", [("segnet", 3), ("resnet", 3)], rounds=1),
}
NO_MATTER = {"synchronizations": ("rounds", "clock"), "first_step": ("steps",)}
"""Options that a measure ignores."""


def read_plan() -> tuple[Measure, Plan]:
    """Return the measure and plan from the command line. Exit with a message if an option is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", choices=list(WAYS), default="gradnorm")
    parser.add_argument("--measure", choices=list(MEASURES), default="time")
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="MODEL[:T,T,…]",
        help=f"networks and numbers of tasks, such as conv:3,10; without T: {TASK_COUNTS}",
    )
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="ways to compare with equal weights; by default all")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--precision", choices=list(PRECISIONS), default="fp32", help="precision of the Trainer; bf16 is mixed"
    )
    parser.add_argument("--compile", action="store_true", help="compile trunk and heads of all ways with torch.compile")
    parser.add_argument(
        "--steps", type=int, help="steps of each run; by default a number that suits the model, at most 33"
    )
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="processor: CPU time of this process, for busy machines; on a CPU with one thread",
    )
    parser.add_argument("--batch-size", type=int, help="replaces the model's own, to keep a GPU busy")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--name", help="name of the page; by default from the measure and group")
    options = parser.parse_args()
    measure = MEASURES[options.measure]

    for option in ("rounds", "threads", "batch_size"):
        value = getattr(options, option)
        if value is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} should be at least 1; got {value}")
    for option in NO_MATTER.get(options.measure, ()):
        if getattr(options, option) != parser.get_default(option):
            parser.error(f"--{option.replace('_', '-')} has no effect on --measure {options.measure}; leave it out")
    cuda = options.device == "cuda"
    if options.clock == "processor" and (cuda or options.threads > 1):
        parser.error("--clock processor adds up all threads and sees no GPU; give --threads 1 --device cpu with it")
    if options.measure == "synchronizations" and not cuda:
        parser.error("--measure synchronizations counts where the host waits for a GPU; give --device cuda, on one")
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device; torch.cuda.is_available() is False here")

    usual = [PINN_CASE] if options.of == "pinn" else list(measure.cases)
    cases = [case for text in options.cases or () for case in cases_of(text, parser)] or usual
    for case in cases:
        if (case == PINN_CASE) != (options.of == "pinn"):
            parser.error(f"--cases: burgers:3 goes with --of pinn, and nothing else does; got {case[0]}:{case[1]}")
    steps = options.steps or measure.steps
    warm_ups = {kind: NETWORKS[kind].warm_up for kind, _ in cases}
    for kind, warm_up in warm_ups.items():
        if options.steps is not None and options.steps < warm_up + 2:
            parser.error(f"--steps should be at least {warm_up + 2} for {kind}; got {options.steps}")

    names, left_out = ways_to_try(options, measure, parser)
    kind_of_page = [measure.page]
    kind_of_page += [options.of] if options.of != "gradnorm" else []
    kind_of_page += [options.precision] if options.precision != "fp32" else []
    kind_of_page += ["compiled"] if options.compile else []
    kind_of_page += ["cuda"] if cuda else []
    return measure, Plan(
        group=options.of,
        names=names,
        cases=cases,
        rounds=options.rounds or measure.rounds,
        setting=Setting(
            options.device,
            options.threads,
            options.precision,
            options.compile,
            options.batch_size,
            steps,
            options.clock,
        ),
        output=options.output,
        name=options.name or "_".join(kind_of_page),
        left_out=left_out,
    )


def cases_of(text: str, parser: argparse.ArgumentParser) -> list[Case]:
    """Return the cases for text such as ``conv:3,10``."""
    kind, colon, counts = text.partition(":")
    if kind not in NETWORKS:
        parser.error(f"--cases: there is no model '{kind}'; {did_you_mean(kind, NETWORKS)}")
    if not colon:
        return [(kind, tasks) for tasks in TASK_COUNTS]
    for count in counts.split(","):
        if not count.isdecimal() or int(count) < 2:
            parser.error(f"--cases: T should be an integer, at least 2, as in {kind}:3,10; got '{text}'")
    return [(kind, int(count)) for count in counts.split(",")]


def ways_to_try(
    options: argparse.Namespace, measure: Measure, parser: argparse.ArgumentParser
) -> tuple[list[str], dict[str, str]]:
    """Return the names of the ways, and those left out because their package is missing, with the reason."""
    ways = {name: way for name, way in WAYS[options.of].items() if name != EQUAL}
    for name in options.ways or ():
        if name not in ways:
            parser.error(f"--ways: there is no '{name}'; {did_you_mean(name, ways)}")
    usual = [name for name, way in ways.items() if way.is_usual]
    wanted = options.ways or [name for name in measure.ways if name in ways] or usual
    left_out = {}
    for name in wanted:
        reason = ways[name].what_is_missing()
        if options.compile and not ways[name].compiles:
            reason = "not with a compiled model"
        if reason is None:
            continue
        if options.ways:
            parser.error(f"--ways: {name} cannot be tried: {reason}")
        print(f"Left out: {name} ({reason})")
        left_out[name] = reason
    return [name for name in wanted if name not in left_out], left_out


def main() -> None:
    measure, plan = read_plan()
    be_quiet(plan.setting.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measure.carry_out(plan)


if __name__ == "__main__":
    main()
