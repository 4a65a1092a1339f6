"""The results of a comparison as sentences and tables of plain text, shared by the page and Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_gradnorm.experiments.report.collect import FAILED, FINISHED, CollectedRun
from lightning_gradnorm.experiments.report.comparison import Comparison, Metric, Row, Spread
from lightning_gradnorm.experiments.report.methods import is_random
from lightning_gradnorm.experiments.report.number_text import digits_of, fixed, signed, spread_text
from lightning_gradnorm.experiments.report.plots import order
from lightning_gradnorm.experiments.report.results import ALL_TASKS
from lightning_gradnorm.experiments.report.significance import FEWEST, LEVEL, PairedTest, holm


@dataclass(frozen=True)
class Cell:
    """One number or word of a table."""

    text: str
    strong: bool = False
    note: str = ""
    """Smaller text below it."""


@dataclass(frozen=True)
class Sheet:
    """A table."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default_factory=tuple)
    words: bool = False
    """True if its cells are text, not numbers."""


def title_of(comparison: Comparison) -> str:
    """Return the report's title."""
    count = len(comparison.methods)
    return f"{count} {_plural('method', count)} on {', '.join(comparison.tasks)}"


def summary(comparison: Comparison) -> list[str]:
    """Return what was compared and the outcome, as short paragraphs."""
    finished = [run for run in comparison.runs if run.state == FINISHED]
    trained = f"{len(finished)} finished {_plural('run', len(finished))}"
    if comparison.single:
        alone = sum(len(method.finished) for method in comparison.single)
        trained += f", {alone} of them single-task"
    data = {_class_of(run, "data") for run in finished or comparison.runs if run.began}
    lines = [
        f"{trained}, {len(comparison.rows)} {_plural('method', len(comparison.rows))} with results, "
        f"tasks {', '.join(comparison.tasks)}"
        + (f", data {', '.join(sorted(data))}" if any(data) else "")
        + f". {_seeds_as_text(comparison)}"
    ]
    if comparison.unfinished:
        states = [run.state for run in comparison.unfinished]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        lines.append(f"Without results: {counts} (listed below).")
    lines += _verdict(comparison)
    return lines


def _class_of(run: CollectedRun, group: str) -> str:
    return str(run.group(group).get("_target_", "")).rpartition(".")[2]


def _seeds_as_text(comparison: Comparison) -> str:
    counts = {
        len({str(run.seed) for run in row.method.finished})
        for row in comparison.rows
        if not any(map(is_random, row.method.runs))
    }
    if not comparison.rows:
        return "No run with several tasks is finished yet, so there are no results."
    if len(counts) < 2:
        return f"{count} {_plural('seed', count)} per method." if (count := max(counts, default=0)) else ""
    return f"Between {min(counts)} and {max(counts)} seeds per method: compare the means with care."


def _verdict(comparison: Comparison) -> list[str]:
    ranked = sorted((row for row in comparison.rows if row.rank is not None), key=lambda row: row.rank or 0.0)
    lines = []
    if len(ranked) > 1:
        best = [row.method.name for row in ranked if row.rank == ranked[0].rank]
        lines.append(f"Lowest mean rank: {', '.join(best)} ({ranked[0].rank:.2f} of {len(ranked)}).")
    tested = [
        (row, metric, test, test.p)
        for row in comparison.rows
        for metric in comparison.counting
        if (test := row.tests.get(metric.name)) is not None and test.p is not None and test.has_enough
    ]
    corrected = holm([p for *_, p in tested])
    how = f"p < {LEVEL:g} after Holm's correction for {len(tested)} {_plural('test', len(tested))}"
    clear = [one[:3] for one, p in zip(tested, corrected, strict=True) if p < LEVEL]
    for row in comparison.rows:
        own = [(metric, test) for of, metric, test in clear if of is row]
        better = [_name(metric) for metric, test in own if _is_better(metric, test)]
        worse = [_name(metric) for metric, test in own if not _is_better(metric, test)]
        if own:
            parts = [f"better in {', '.join(better)}"] if better else []
            parts += [f"worse in {', '.join(worse)}"] if worse else []
            base = comparison.baselines[row.method.name].name
            pairs = max(test.count for _, test in own)
            lines.append(
                f"{row.method.name} is significantly {' and '.join(parts)} than {base} ({how}, {pairs} seeds)."
            )
    if comparison.baseline is None:
        lines.append("There are no finished runs with equal weights, so there are no differences and no time ratios.")
    elif len(comparison.rows) > 1 and not tested:
        lines.append(
            f"With fewer than {FEWEST} seeds in common, the report cannot tell which differences from {comparison.baseline} "
            "are more than chance: run more seeds."
        )
    elif len(comparison.rows) > 1 and not clear:
        lines.append(f"No difference from {comparison.baseline} is significant ({how}).")
    return lines


def _is_better(metric: Metric, test: PairedTest) -> bool:
    return (test.mean > 0) == bool(metric.upwards)


def ordered_rows(comparison: Comparison) -> list[Row]:
    """Return the rows in table order: the baseline first, then by mean rank."""
    names = [method.name for method in order(comparison)]
    return sorted(comparison.rows, key=lambda row: names.index(row.method.name))


def sheets(comparison: Comparison) -> list[Sheet]:
    """Return the tables that have content."""
    found = [_results(comparison), _differences(comparison), _weights(comparison), _single_task(comparison)]
    return [sheet for sheet in found if sheet is not None]


def _results(comparison: Comparison) -> Sheet | None:
    rows = ordered_rows(comparison)
    if not rows:
        return None
    has_gain, has_time = any(row.delta_m for row in rows), any(row.seconds_per_step for row in rows)
    has_ratio, has_rank = any(row.time_ratio for row in rows), len(rows) > 1
    header = ["method", "runs", *["Δm in % ↑"] * has_gain, *["mean rank ↓"] * has_rank]
    header += ["step time ÷ baseline"] * has_ratio + ["ms per step"] * has_time
    header += [_heading(metric) for metric in comparison.shown]
    best_gain = max((row.delta_m.mean for row in rows if row.delta_m), default=None)
    best_rank = min((row.rank for row in rows if row.rank is not None), default=None)
    lines = []
    for row in rows:
        line = [Cell(row.method.name), Cell(_runs_as_text(row))]
        if has_gain:
            gain = row.delta_m
            line.append(_spread_cell(gain, gain is not None and gain.mean == best_gain, signed=True))
        if has_rank:
            line.append(Cell("" if row.rank is None else f"{row.rank:.2f}", row.rank == best_rank))
        if has_ratio:
            is_baseline = comparison.baselines.get(row.method.name) is row.method
            line.append(Cell("1") if is_baseline and row.time_ratio else _spread_cell(row.time_ratio))
        if has_time:
            line.append(Cell("" if row.seconds_per_step is None else f"{1000 * row.seconds_per_step.mean:.3g}"))
        for metric in comparison.shown:
            value = row.values.get(metric.name)
            line.append(_spread_cell(value, value is not None and value.mean == comparison.best(metric)))
        lines.append(line)
    counted = ", ".join(map(_name, comparison.counting)) or "none"
    notes = [
        "Mean ± standard deviation over the seeds of a method, on the test data. Bold marks the best mean, which may be due to "
        "chance.",
        f"Mean rank: over {counted}; first over the metrics of a task, then over the tasks. Equal means share a rank.",
        *_checkpoints(comparison),
    ]
    if has_gain:
        notes.append(
            "Δm: relative gain over single-task networks in percent, averaged first over the metrics of a task (all but the "
            "loss), then over the tasks."
        )
    if has_ratio:
        notes.append(
            "Time: seconds of training without validation, divided by the steps, relative to the baseline's run with the same "
            "seed. It is only reliable if the machine was idle."
        )
        busy = [row.method.name for row in rows if row.seconds_per_step and _scatters(row.seconds_per_step)]
        if busy:
            notes.append(f"The times of {', '.join(busy)} vary by more than a tenth: do not rely on the ratios.")
    repeated = [row.method.name for row in rows if len(row.method.finished) > _count(row)]
    if repeated:
        notes.append(f"Several runs of the same seed are averaged first: {', '.join(repeated)}.")
    if len(comparison.shown) < len(comparison.metrics):
        notes.append("The loss of each task equals another of its metrics, so it has no column.")
    return Sheet("Results", header, lines, notes)


def _checkpoints(comparison: Comparison) -> list[str]:
    """Return a note on how the tested checkpoints were chosen."""
    rules = {_rule(run) for row in comparison.rows for run in row.method.finished}
    shown = ", ".join(sorted(rules))
    if len(rules) > 1:
        return [f"The tested checkpoints were chosen differently: {shown}. Compare runs that chose it in the same way."]
    return [f"Tested checkpoint of each run: {shown}."]


def _rule(run: CollectedRun) -> str:
    checkpoint = run.group("callbacks").get("checkpoint")
    monitor = checkpoint.get("monitor") if isinstance(checkpoint, dict) else None
    return f"the best by {monitor}" if monitor else "the last"


def _scatters(times: Spread) -> bool:
    return times.deviation is not None and times.deviation > 0.1 * times.mean


def _count(row: Row) -> int:
    return max((value.count for value in row.values.values()), default=0)


def _runs_as_text(row: Row) -> str:
    done, all_of_them = len(row.method.finished), len(row.method.runs)
    unit = f" {_plural('draw', all_of_them)}" if any(map(is_random, row.method.runs)) else ""
    return f"{done}{unit}" if done == all_of_them else f"{done} of {all_of_them}{unit}"


def _differences(comparison: Comparison) -> Sheet | None:
    rows = [row for row in ordered_rows(comparison) if row.method.name in comparison.baselines]
    rows = [row for row in rows if comparison.baselines[row.method.name] is not row.method]
    if not rows:
        return None
    several = len({method.name for method in comparison.baselines.values()}) > 1
    lines = []
    for row in rows:
        name = row.method.name
        pairs = max((test.count for test in row.tests.values()), default=0)
        line = [Cell(name, note=f"against {comparison.baselines[name].name}" if several else ""), Cell(str(pairs))]
        line += [_difference(metric, row.tests.get(metric.name)) for metric in comparison.shown]
        lines.append(line)
    most = max((test.count for row in rows for test in row.tests.values()), default=0)
    tests = sum(test.p is not None and test.has_enough for row in rows for test in row.tests.values())
    notes = ["Mean difference between runs with the same seed, with the 95 % interval below it."]
    if most == 0:
        notes.append("No method has a seed in common with the baseline, so there are no pairs.")
    elif most < FEWEST:
        notes.append(
            f"With fewer than {FEWEST} seeds in common, nothing is called significant and no p value is shown. A "
            "difference may be chance, and a small difference does not mean equality."
        )
    else:
        notes.append(
            f"From {FEWEST} seeds on: p of the paired t-test (two-sided), and ▲ better or ▼ worse if p < {LEVEL:g}. The p "
            f"values in this table are not corrected for multiple tests ({tests}); if nothing differed, about "
            f"{tests * LEVEL:.1f} would be below {LEVEL:g}. The sentences at the top are corrected with Holm's method, over "
            "the ranked metrics."
        )
    header = ["method", "pairs", *(_heading(metric) for metric in comparison.shown)]
    return Sheet(f"Differences from {comparison.baseline}", header, lines, notes)


def _difference(metric: Metric, test: PairedTest | None) -> Cell:
    if test is None:
        return Cell("")
    if math.isnan(test.mean):
        return Cell("not finite")
    if test.p is None or test.low is None or test.high is None:
        return Cell(signed(test.mean), note="equal" if test.count > 1 else "one pair")
    mark = ""
    if test.is_significant and metric.upwards is not None:
        mark = "▲ " if _is_better(metric, test) else "▼ "
    digits = digits_of((test.high - test.low) / 4)
    interval = f"[{fixed(test.low, digits, '+')}, {fixed(test.high, digits, '+')}]"
    if not test.has_enough:
        return Cell(fixed(test.mean, digits, "+"), note=interval)
    p = "p < 0.001" if test.p < 0.001 else f"p = {test.p:.3f}" if test.p < 0.1 else f"p = {test.p:.2f}"
    return Cell(mark + fixed(test.mean, digits, "+"), bool(mark), f"{interval}\n{p}")


def _weights(comparison: Comparison) -> Sheet | None:
    rows = [row for row in ordered_rows(comparison) if row.weights]
    if not rows:
        return None
    tasks = dict.fromkeys(task for row in rows for task in row.weights)
    lines = [[Cell(row.method.name), *(_spread_cell(row.weights.get(task)) for task in tasks)] for row in rows]
    notes = [
        "Mean over training if the method records it, otherwise the final weights; mean ± standard deviation over the seeds."
    ]
    return Sheet("Task weights", ["method", *tasks], lines, notes)


def _single_task(comparison: Comparison) -> Sheet | None:
    if not any(method.finished for method in comparison.single):
        return None
    metrics = [metric for metric in comparison.shown if metric.task != ALL_TASKS]
    lines = []
    for method in comparison.single:
        line = [Cell(method.name), Cell(str(len(method.finished)))]
        for metric in metrics:
            runs = [run for run in method.finished if run.tasks == (metric.task,)]
            line.append(
                _spread_cell(Spread.of([run.metrics[metric.name] for run in runs if metric.name in run.metrics]))
            )
        lines.append(line)
    header = ["networks", "runs", *(_heading(metric) for metric in metrics)]
    note = "The reference for Δm."
    if not any(row.delta_m for row in comparison.rows):
        note = "There is no Δm: it needs a finished single-task run of each task with the method's other options."
    return Sheet("One network per task", header, lines, [note])


def run_sheets(comparison: Comparison) -> tuple[Sheet | None, Sheet]:
    """Return a table of the runs without results or with problems, and a table of all runs.

    Runs that never began to train and left no reason share a line of the first table.
    """
    amiss = [run for run in comparison.runs if run.state != FINISHED or run.remarks]
    amiss.sort(key=lambda run: (run.state == FINISHED, run.state != FAILED))
    header = ["run", "method", "seed", "state", "progress", "remarks"]
    first = None
    if amiss:
        never, others = never_began(amiss)
        lines = _run_rows(comparison, others)
        if never:
            shown = Cell(f"{len(never)} runs"), Cell(never[0].state), Cell(never[0].progress), Cell(names_of(never))
            lines.append([shown[0], Cell(""), Cell(""), *shown[1:]])
        first = Sheet("Runs without results or with problems", header, lines, words=True)
    return first, Sheet("All runs", header, _run_rows(comparison, comparison.runs), words=True)


def never_began(runs: Sequence[CollectedRun]) -> tuple[list[CollectedRun], list[CollectedRun]]:
    """Return the runs that never began to train and left no reason, if they are several, and the others."""
    never = [run for run in runs if not run.began and not run.remarks]
    never = never if len(never) > 1 else []
    return never, [run for run in runs if not any(run is one for one in never)]


def names_of(runs: Sequence[CollectedRun]) -> str:
    """Return the names of the first few runs."""
    return ", ".join([*(run.name for run in runs[:3]), *["…"] * (len(runs) > 3)])


def _run_rows(comparison: Comparison, runs: Sequence[CollectedRun]) -> list[list[Cell]]:
    names = {id(run): method.name for method in (*comparison.methods, *comparison.single) for run in method.runs}
    return [
        [
            Cell(run.name),
            Cell(names.get(id(run), run.strategy) + (f" ({run.tasks[0]})" if len(run.tasks) == 1 else "")),
            Cell(str(run.seed) if run.began else ""),
            Cell(run.state),
            Cell(run.progress),
            Cell("; ".join(run.remarks)),
        ]
        for run in runs
    ]


def _heading(metric: Metric) -> str:
    return f"{_name(metric)}\N{NO-BREAK SPACE}{metric.arrow}" if metric.arrow else _name(metric)


def _name(metric: Metric) -> str:
    return f"{metric.task} {metric.short}"


def _spread_cell(spread: Spread | None, strong: bool = False, *, signed: bool = False) -> Cell:
    mean, plus_minus, wide = spread_text(spread, signed=signed).partition(" ± ")
    return Cell(mean, strong, f"± {wide}" if plus_minus else "")


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
