"""What a comparison found, in words and in tables of plain text: the same for the page and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_gradnorm.experiments.report.collect import FAILED, FINISHED, CollectedRun
from lightning_gradnorm.experiments.report.comparison import Comparison, Metric, Row, Spread
from lightning_gradnorm.experiments.report.methods import is_random
from lightning_gradnorm.experiments.report.plots import order
from lightning_gradnorm.experiments.report.results import ALL_TASKS
from lightning_gradnorm.experiments.report.significance import FEWEST, LEVEL, PairedTest, holm


@dataclass(frozen=True)
class Cell:
    """One number or word of a table."""

    text: str
    strong: bool = False
    note: str = ""
    """Smaller, below it."""


@dataclass(frozen=True)
class Sheet:
    """A table."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default_factory=tuple)
    words: bool = False
    """Its cells are words, not numbers."""


def title_of(comparison: Comparison) -> str:
    """Return the report's title."""
    count = len(comparison.methods)
    return f"{count} {_plural('method', count)} on {', '.join(comparison.tasks)}"


def summary(comparison: Comparison) -> list[str]:
    """Return what was compared and what came out, a sentence or two each."""
    finished = [run for run in comparison.runs if run.state == FINISHED]
    trained = f"{len(finished)} finished {_plural('run', len(finished))}"
    if comparison.single:
        alone = sum(len(method.finished) for method in comparison.single)
        trained += f", {alone} of them of one task alone"
    data = {_class_of(run, "data") for run in finished or comparison.runs if run.began}
    lines = [
        f"{trained}, {len(comparison.rows)} {_plural('method', len(comparison.rows))} with results, "
        f"tasks {', '.join(comparison.tasks)}"
        + (f", data {', '.join(sorted(data))}" if any(data) else "")
        + f". {_seeds_in_words(comparison)}"
    ]
    if comparison.unfinished:
        states = [run.state for run in comparison.unfinished]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        lines.append(f"Without results: {counts}; they are listed below.")
    lines += _verdict(comparison)
    return lines


def _class_of(run: CollectedRun, group: str) -> str:
    return str(run.group(group).get("_target_", "")).rpartition(".")[2]


def _seeds_in_words(comparison: Comparison) -> str:
    counts = {
        len({str(run.seed) for run in row.method.finished})
        for row in comparison.rows
        if not any(map(is_random, row.method.runs))
    }
    if not comparison.rows:
        return "No run with several tasks is finished yet: there are no results."
    if len(counts) < 2:
        return f"{count} {_plural('seed', count)} for each method." if (count := max(counts, default=0)) else ""
    return f"Between {min(counts)} and {max(counts)} seeds for a method: compare the means with care."


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
        lines.append("There are no finished runs with equal weights among them: no differences, no ratio of times.")
    elif len(comparison.rows) > 1 and not tested:
        lines.append(
            f"With fewer than {FEWEST} seeds in common nothing is said about which differences from {comparison.baseline} are "
            "more than chance: give more seeds."
        )
    elif len(comparison.rows) > 1 and not clear:
        lines.append(f"No difference from {comparison.baseline} is significant ({how}).")
    return lines


def _is_better(metric: Metric, test: PairedTest) -> bool:
    return (test.mean > 0) == bool(metric.upwards)


def ordered_rows(comparison: Comparison) -> list[Row]:
    """Return the rows as tables have them: the baseline first, then by mean rank."""
    names = [method.name for method in order(comparison)]
    return sorted(comparison.rows, key=lambda row: names.index(row.method.name))


def sheets(comparison: Comparison) -> list[Sheet]:
    """Return the tables that there is something to write in."""
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
    header += [_heading(metric) for metric in comparison.metrics]
    best_gain = max((row.delta_m.mean for row in rows if row.delta_m), default=None)
    best_rank = min((row.rank for row in rows if row.rank is not None), default=None)
    lines = []
    for row in rows:
        line = [Cell(row.method.name), Cell(_runs_in_words(row))]
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
        for metric in comparison.metrics:
            value = row.values.get(metric.name)
            line.append(_spread_cell(value, value is not None and value.mean == comparison.best(metric)))
        lines.append(line)
    counted = ", ".join(map(_name, comparison.counting)) or "none"
    notes = [
        "Mean ± standard deviation over the runs of a method, on the test data; bold is the best mean, and says nothing of "
        "chance.",
        f"Mean rank: over {counted}; first over the metrics of a task, then over the tasks. Equal means share their rank.",
        *_checkpoints(comparison),
    ]
    if has_gain:
        notes.append(
            "Δm: mean relative gain over networks for one task each, in percent, first over a task's metrics (all but the "
            "loss), then over the tasks."
        )
    if has_ratio:
        notes.append(
            "Time: seconds of training without validation, divided by the steps; relative to the baseline's run with the same "
            "seed. It is only as good as the machine was idle."
        )
        busy = [row.method.name for row in rows if row.seconds_per_step and _scatters(row.seconds_per_step)]
        if busy:
            notes.append(f"The times of {', '.join(busy)} scatter by more than a tenth: do not rely on the ratios.")
    repeated = [row.method.name for row in rows if len(row.method.finished) > _count(row)]
    if repeated:
        notes.append(f"Several runs of the same seed are averaged first: {', '.join(repeated)}.")
    return Sheet("Results", header, lines, notes)


def _checkpoints(comparison: Comparison) -> list[str]:
    """Return which checkpoint of each run was tested."""
    rules = {_rule(run) for row in comparison.rows for run in row.method.finished}
    shown = ", ".join(sorted(rules))
    if len(rules) > 1:
        return [f"Tested checkpoints differ in how they were chosen: {shown}. Compare runs of one kind."]
    return [f"Tested is the checkpoint of each run that was chosen so: {shown}."]


def _rule(run: CollectedRun) -> str:
    checkpoint = run.group("callbacks").get("checkpoint")
    monitor = checkpoint.get("monitor") if isinstance(checkpoint, dict) else None
    return f"the best by {monitor}" if monitor else "the last"


def _scatters(times: Spread) -> bool:
    return times.deviation is not None and times.deviation > 0.1 * times.mean


def _count(row: Row) -> int:
    return max((value.count for value in row.values.values()), default=0)


def _runs_in_words(row: Row) -> str:
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
        line += [_difference(metric, row.tests.get(metric.name)) for metric in comparison.metrics]
        lines.append(line)
    most = max((test.count for row in rows for test in row.tests.values()), default=0)
    tests = sum(test.p is not None and test.has_enough for row in rows for test in row.tests.values())
    notes = ["Mean difference between runs with the same seed; below it the 95 % interval."]
    if most == 0:
        notes.append("No method has a seed in common with the baseline: nothing can be paired.")
    elif most < FEWEST:
        notes.append(
            f"With fewer than {FEWEST} seeds in common nothing is called significant, and no p value is shown: a "
            "difference may be chance, and what differs little is not therefore equal."
        )
    else:
        notes.append(
            f"From {FEWEST} seeds on, p of the paired t-test (two-sided), and ▲ better or ▼ worse with p < {LEVEL:g}. The p "
            f"values of this table are not corrected for there being {tests} of them; if nothing differed, about "
            f"{tests * LEVEL:.1f} would be below {LEVEL:g}. The sentences at the top are: by Holm's method, over the "
            "metrics that ranks are of."
        )
    header = ["method", "pairs", *(_heading(metric) for metric in comparison.metrics)]
    return Sheet(f"Differences from {comparison.baseline}", header, lines, notes)


def _difference(metric: Metric, test: PairedTest | None) -> Cell:
    if test is None:
        return Cell("")
    if math.isnan(test.mean):
        return Cell("not finite")
    if test.p is None or test.low is None or test.high is None:
        return Cell(_signed(test.mean), note="equal" if test.count > 1 else "one pair")
    mark = ""
    if test.is_significant and metric.upwards is not None:
        mark = "▲ " if _is_better(metric, test) else "▼ "
    digits = _digits((test.high - test.low) / 4)
    interval = f"[{_fixed(test.low, digits, '+')}, {_fixed(test.high, digits, '+')}]"
    if not test.has_enough:
        return Cell(_fixed(test.mean, digits, "+"), note=interval)
    p = "p < 0.001" if test.p < 0.001 else f"p = {test.p:.3f}" if test.p < 0.1 else f"p = {test.p:.2f}"
    return Cell(mark + _fixed(test.mean, digits, "+"), bool(mark), f"{interval}\n{p}")


def _weights(comparison: Comparison) -> Sheet | None:
    rows = [row for row in ordered_rows(comparison) if row.weights]
    if not rows:
        return None
    tasks = dict.fromkeys(task for row in rows for task in row.weights)
    lines = [[Cell(row.method.name), *(_spread_cell(row.weights.get(task)) for task in tasks)] for row in rows]
    notes = [
        "Mean over the training where the method keeps one, else at its end; mean ± standard deviation over the runs."
    ]
    return Sheet("Task weights", ["method", *tasks], lines, notes)


def _single_task(comparison: Comparison) -> Sheet | None:
    if not any(method.finished for method in comparison.single):
        return None
    metrics = [metric for metric in comparison.metrics if metric.task != ALL_TASKS]
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
    note = "What Δm is relative to."
    if not any(row.delta_m for row in comparison.rows):
        note = "There is no Δm: it needs a finished run of each task alone, with the other options of the method."
    return Sheet("One network for each task", header, lines, [note])


def run_sheets(comparison: Comparison) -> tuple[Sheet | None, Sheet]:
    """Return the table of the runs without results, or with something amiss, and that of all runs."""
    amiss = [run for run in comparison.runs if run.state != FINISHED or run.remarks]
    amiss.sort(key=lambda run: (run.state == FINISHED, run.state != FAILED))
    header = ["run", "method", "seed", "state", "how far", "what is known"]
    first = None
    if amiss:
        first = Sheet("Runs without results, or with something amiss", header, _run_rows(comparison, amiss), words=True)
    return first, Sheet("All runs", header, _run_rows(comparison, comparison.runs), words=True)


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


def spread_text(spread: Spread | None, *, signed: bool = False) -> str:
    """Return mean ± deviation with as many digits as the deviation lets be known.

    Example:
        >>> spread_text(Spread(0.853217, 0.00421, 3)), spread_text(Spread(1234.5678, None, 1)), spread_text(None)
        ('0.8532 ± 0.0042', '1235', '')
        >>> spread_text(Spread(3.2e9, 4.1e8, 3)), spread_text(Spread(2.5e-9, None, 1))
        ('3.2e+09 ± 4.1e+08', '2.5e-09')
    """
    if spread is None:
        return ""
    sign = "+" if signed else ""
    if not math.isfinite(spread.mean):
        return "not finite"
    if not spread.deviation:
        digits = 2 if signed else max(0, 3 - _power(spread.mean))
        return _fixed(spread.mean, digits, sign) + ("" if spread.deviation is None else " ± 0")
    digits = _digits(spread.deviation)
    return f"{_fixed(spread.mean, digits, sign)} ± {_fixed(spread.deviation, digits, digits_of_power=2)}"


def _fixed(value: float, digits: int, sign: str = "", *, digits_of_power: int = 4) -> str:
    """Return the number with so many decimals; as a power of ten where these would be many, or the number long."""
    if digits > 7 or abs(value) >= 1e6:
        return f"{value:{sign}.{digits_of_power}g}"
    return f"{value:{sign}.{digits}f}"


def _digits(deviation: float) -> int:
    """Return the decimals that show two digits of it."""
    return max(0, 1 - _power(deviation)) if deviation else 4


def _power(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0


def _signed(value: float) -> str:
    return f"{value:+.4g}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
