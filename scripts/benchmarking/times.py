"""Measures the time of a whole training step, with all ways interleaved in one process."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from benchmarking.floor import weight_gradient_times
from benchmarking.pictures import Line, draw_ratios
from benchmarking.plan import Case, Failures, Plan
from benchmarking.running import step_time
from benchmarking.summaries import (
    floors,
    is_noisy,
    median_and_quartiles,
    noise_cell,
    ratio,
    ratio_and_quartiles,
    table,
    table_line,
)
from benchmarking.ways import EQUAL

DESCRIBED = (
    "The time of a whole training step inside the same Lightning loop, all ways interleaved in shuffled order, and equal "
    "weights once more before each. Ratios divide each run by the run with equal weights just before it: median and "
    "quartiles over the rounds"
)


@dataclass
class Times:
    """Seconds of a step, of the solver in it, and of the preceding step with equal weights, in each round."""

    step: list[float] = field(default_factory=list)
    solver: list[float] = field(default_factory=list)
    equal: list[float] = field(default_factory=list)


FLOORS = (
    "What a way adds to the step with equal weights before it, divided by the time of T gradients of the shared layer's weight "
    "(`torch.autograd.grad` of the representation, in the same rounds, with the trunk run before each). A method "
    "that forms these gradients in every step cannot be below 1. The column of equal weights divides its run by the one before."
)


def times_of(
    plan: Plan, case: Case, failures: Failures, weight_gradients: list[float] | None = None
) -> dict[str, Times]:
    """Return the times of all ways that can be trained like this.

    Args:
        plan: names the ways.
        case: the network and the number of tasks.
        failures: records the ways that fail.
        weight_gradients: gets the times of gradients of the shared layer's weight, measured between the runs.
    """
    kind, tasks = case
    times = {name: Times() for name in plan.all_names}

    def train(name: str) -> tuple[float, float]:
        run = plan.way(name).start(kind, tasks, plan.setting.compiled)
        return step_time(run, kind, plan.setting)

    for name in plan.interleaved(plan.names):
        # The speed of a machine changes from second to second, so runs to compare must be close in time.
        if weight_gradients is not None:
            weight_gradients += weight_gradient_times(kind, plan.setting)
        equal, _ = train(EQUAL)
        times[EQUAL].step.append(equal)
        found = failures.attempt(plan, name, case, lambda name=name: train(name))  # type: ignore[misc]
        if found is not None:
            step, solver = found
            times[name].step.append(step)
            times[name].solver.append(solver)
            times[name].equal.append(equal)
    return {name: of_way for name, of_way in times.items() if of_way.step}


def ratio_cell(times: dict[str, Times], name: str, *, with_solver: bool) -> str:
    if name not in times:
        return "fails"
    solver = ratio(times[name].solver, times[name].equal)
    share = f"; {solver:.2f}" if solver and with_solver else ""
    return ratio_and_quartiles(times[name].step, times[name].equal, share)


def milliseconds_cell(times: dict[str, Times], name: str) -> str:
    return median_and_quartiles([1000 * step for step in times[name].step]) if name in times else "fails"


def floors_row(times: dict[str, Times], plan: Plan, case: Case, weight_gradients: list[float]) -> list[str]:
    """Return the row of a case in the table of floors."""
    kind, tasks = case
    cells = [
        median_and_quartiles(floors(times[name].step, times[name].equal, tasks, weight_gradients))
        if name in times
        else "fails"
        for name in plan.names
    ]
    one = median_and_quartiles([1000 * seconds for seconds in weight_gradients], 3)
    return [kind, str(tasks), one, noise_cell(times[EQUAL].step), *cells]


def measure(plan: Plan) -> None:
    """Write the tables of ratios, of floors and of milliseconds, and the picture of the ratios against T."""
    failures = Failures()
    of_aggregation, has_trunk = plan.group == "aggregation", plan.group != "pinn"
    ratios, of_floors, milliseconds, noisy = [], [], [], []
    lines = [Line(name, plan.way(name).is_ours) for name in plan.names]
    for kind, tasks in plan.cases:
        weight_gradients: list[float] = []
        times = times_of(plan, (kind, tasks), failures, weight_gradients if has_trunk else None)
        baseline = statistics.median(times[EQUAL].step)
        cells = [ratio_cell(times, name, with_solver=of_aggregation) for name in plan.names]
        ratios.append([kind, str(tasks), f"{1000 * baseline:.1f}", *cells])
        milliseconds.append([kind, str(tasks), *(milliseconds_cell(times, name) for name in plan.all_names)])
        for line in lines:
            if line.name in times:
                line.add(kind, tasks, ratio(times[line.name].step, times[line.name].equal))
        print(table_line(ratios[-1]), flush=True)
        noisy += [f"{kind}:{tasks}"] if is_noisy(times[EQUAL].step) else []
        if has_trunk:
            of_floors.append(floors_row(times, plan, (kind, tasks), weight_gradients))
            print(table_line(of_floors[-1]), flush=True)
    parts = [table(["model", "T", f"{EQUAL}, ms", *plan.names], ratios)]
    picture = plan.output / f"{plan.name}.png"
    if draw_ratios(picture, lines):
        parts += [
            f"![Ratio to equal weights against the number of tasks]({picture.name})",
            "Solid: ours; dashed: others'.",
        ]
    if of_floors:
        columns = ["model", "T", "weight-gradient, ms", EQUAL, *plan.names]
        parts += ["## Overhead in floors", FLOORS, table(columns, of_floors)]
    if noisy:
        parts.append(
            f"The machine was too noisy for {', '.join(noisy)}: equal weights differ by over 5 % from run to run."
        )
    parts += ["## Milliseconds", "Median, and quartiles.", table(["model", "T", *plan.all_names], milliseconds)]
    solver = (
        "; behind them the part of the ratio that the aggregator's own computation makes up" if of_aggregation else ""
    )
    plan.write("Step time", f"{DESCRIBED}{solver}.", [*parts, *failures.sentences()])
