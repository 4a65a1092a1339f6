"""Measures the cost of one more task, compared with one gradient of the shared layer's weight."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarking.floor import weight_gradient_times
from benchmarking.networks import NETWORKS
from benchmarking.plan import Failures, Plan
from benchmarking.summaries import median_and_quartiles, table
from benchmarking.times import Times, times_of
from benchmarking.ways import EQUAL

DESCRIBED = (
    "Overhead of a way: its step time minus that of equal weights in the run before it. A line is fitted by least squares "
    "to the medians of the overhead against T. One weight-gradient: `torch.autograd.grad` of the representation with respect "
    "to the shared layer's weight alone, in the same process, with the trunk run before each."
)


def overheads(times: dict[str, Times], name: str) -> list[float]:
    return [ours - equal for ours, equal in zip(times[name].step, times[name].equal, strict=True)]


def fitted(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return the slope and the intercept of the line through the points."""
    slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
    return slope, intercept


def measure(plan: Plan) -> None:
    """Write the overheads and, for each network, the line through them."""
    failures = Failures()
    parts = []
    for kind in dict.fromkeys(kind for kind, _ in plan.cases):
        gradients = weight_gradient_times(kind, plan.setting)
        rows = []
        points: dict[str, list[tuple[int, float]]] = {name: [] for name in plan.names}
        for tasks in [tasks for of_kind, tasks in plan.cases if of_kind == kind]:
            times = times_of(plan, (kind, tasks), failures)
            gradients += weight_gradient_times(kind, plan.setting)
            found = {name: overheads(times, name) for name in plan.names if name in times}
            for name, seconds in found.items():
                points[name].append((tasks, statistics.median(seconds)))
            cells = [
                median_and_quartiles([1000 * s for s in found[name]]) if name in found else "fails"
                for name in plan.names
            ]
            rows.append([str(tasks), f"{1000 * statistics.median(times[EQUAL].step):.1f}", *cells])
            print(f"{kind} | " + " | ".join(rows[-1]), flush=True)
        one = statistics.median(gradients)
        lines = []
        for name in plan.names:
            if len(points[name]) > 1:
                slope, intercept = fitted(points[name])
                lines.append([name, f"{1000 * slope:.3f}", f"{1000 * intercept:.2f}", f"{slope / one:.2f}"])
                print(
                    f"{kind}: {name}: {1000 * slope:.3f} ms a task; one weight-gradient {1000 * one:.3f} ms", flush=True
                )
        parts += [
            f"## {kind}",
            f"One weight-gradient of `{NETWORKS[kind].shared_layer}`: "
            f"{median_and_quartiles([1000 * s for s in gradients], 3)} ms.",
            table(["way", "ms a task", "ms at T = 0", "weight-gradients a task"], lines),
            table(["T", f"{EQUAL}, ms", *(f"{name}, ms more" for name in plan.names)], rows, texts=0),
        ]
    plan.write("What one more task costs", DESCRIBED, [*parts, *failures.sentences()])
