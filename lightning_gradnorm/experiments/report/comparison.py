"""Compares methods: means over seeds, differences from a baseline, Δm, ranks and times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from lightning_gradnorm._messages import did_you_mean
from lightning_gradnorm.experiments.report.collect import FINISHED, CollectedRun
from lightning_gradnorm.experiments.report.delta_m import delta_m, delta_m_or_none, single_task_results
from lightning_gradnorm.experiments.report.methods import Key, Method, group, is_random, repetition
from lightning_gradnorm.experiments.report.metric_direction import higher_is_better
from lightning_gradnorm.experiments.report.results import ALL_TASKS, Run, by_task
from lightning_gradnorm.experiments.report.significance import PairedTest, deviation, paired_test

STAGE = "test"
BASELINE = "equal"


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Return the spread of the values, or ``None`` without values. A single value has no deviation.

        Example:
            >>> Spread.of([1.0, 2.0, 3.0])
            Spread(mean=2.0, deviation=1.0, count=3)
        """
        if not values:
            return None
        return cls(fmean(values), deviation(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Metric:
    """A test metric of one task or of all tasks."""

    name: str

    @property
    def task(self) -> str:
        """The task, or `ALL_TASKS` if it does not belong to one task."""
        return next(iter(by_task({self.name: 0.0})))

    @property
    def short(self) -> str:
        """The metric without stage and task."""
        return self.name.split("/", 2)[1] if "/" in self.name else self.name

    @property
    def upwards(self) -> bool | None:
        """True if higher is better; ``None`` if unknown."""
        return higher_is_better(self.short)

    @property
    def arrow(self) -> str:
        """↑ if higher is better, ↓ if lower is better."""
        return {True: "↑", False: "↓", None: ""}[self.upwards]


@dataclass(frozen=True)
class Row:
    """The results of one method."""

    method: Method
    values: Mapping[str, Spread]
    """By full metric name."""
    delta_m: Spread | None
    rank: float | None
    seconds_per_step: Spread | None
    time_ratio: Spread | None
    weights: Mapping[str, Spread]
    tests: Mapping[str, PairedTest]
    """Differences from the baseline, by full metric name; empty for the baseline itself."""


@dataclass(frozen=True)
class Comparison:
    """All results of a comparison."""

    runs: Sequence[CollectedRun]
    methods: Sequence[Method]
    rows: Sequence[Row]
    """The methods with finished runs."""
    metrics: Sequence[Metric]
    tasks: Sequence[str]
    single: Sequence[Method]
    baseline: str | None
    """The baseline of the differences; ``None`` if no run has it."""
    baselines: Mapping[str, Method]
    """The baseline of each method, by name: the one with the same other options."""

    def best(self, metric: Metric) -> float | None:
        """Return the best mean, or ``None`` if the better direction is unknown or all means are equal."""
        means = [row.values[metric.name].mean for row in self.rows if metric.name in row.values]
        finite = [mean for mean in means if math.isfinite(mean)]
        if metric.upwards is None or len(set(finite)) < 2:
            return None
        return max(finite) if metric.upwards else min(finite)

    @property
    def shown(self) -> list[Metric]:
        """The metrics without the losses of the tasks, if each loss equals another metric of its task, such as the MSE."""
        losses = [metric for metric in self.metrics if metric.task != ALL_TASKS and metric.short == "loss"]
        others = [metric for metric in self.metrics if metric.short != "loss"]
        twice = all(any(self._are_equal(loss, one) for one in others if one.task == loss.task) for loss in losses)
        return [metric for metric in self.metrics if not (twice and metric in losses)]

    def _are_equal(self, first: Metric, second: Metric) -> bool:
        both = [(row.values.get(first.name), row.values.get(second.name)) for row in self.rows]
        return all(
            one is other or (one is not None and other is not None and math.isclose(one.mean, other.mean, rel_tol=1e-5))
            for one, other in both
        )

    @property
    def counting(self) -> list[Metric]:
        """The metrics for ranks and changes: the task metrics, and the loss of tasks without other metrics.

        If there is a metric for all tasks, such as the error of a solution, only that one counts.
        """
        of_all = [metric for metric in self.metrics if metric.task == ALL_TASKS and metric.upwards is not None]
        if judged := [metric for metric in of_all if metric.short not in ("loss", "delta_m")]:
            return judged
        known = [metric for metric in self.metrics if metric.task != ALL_TASKS and metric.upwards is not None]
        rich = {metric.task for metric in known if metric.short != "loss"}
        return [metric for metric in known if metric.short != "loss" or metric.task not in rich]

    @property
    def unfinished(self) -> list[CollectedRun]:
        """The runs that have no test metrics or cannot be compared."""
        return [run for run in self.runs if run.state != FINISHED]

    def change(self, metrics: Mapping[str, float], reference: Mapping[str, float]) -> float | None:
        """Return the mean relative change of a run from reference metrics, in percent; positive is better.

        Averages over the metrics of a task first, then over the tasks, like `delta_m`. Skips metrics with reference 0.
        """
        chosen: dict[str, list[str]] = {}
        for metric in self.counting:
            new, old = metrics.get(metric.name, math.nan), reference.get(metric.name, math.nan)
            if not (math.isfinite(new) and math.isfinite(old)):
                return None
            if old:
                chosen.setdefault(metric.task, []).append(metric.short)
        return delta_m(metrics, reference, chosen) if chosen else None


def compare(runs: Sequence[CollectedRun], baseline: str | None = None) -> Comparison:
    """Return the comparison of the runs.

    Args:
        runs: the runs from `collect`.
        baseline: name of a method, or of a strategy, which is then matched to each method's other options. By default
            equal weights, if there are such runs.

    Raises:
        ValueError: the runs have different tasks or data, there is nothing to compare, or no run has the baseline.
    """
    if not any(run.began for run in runs):
        states = "; ".join(f"{run.name}: {', '.join([run.progress, *run.remarks])}" for run in runs[:10])
        raise ValueError(f"none of the {len(runs)} runs can be compared ({states}).")
    methods, single = group(runs)
    _refuse_unknown_baseline(baseline, methods)
    baselines = _baselines(baseline or BASELINE, methods)
    names = dict.fromkeys(name for method in methods for run in method.finished for name in run.metrics)
    order = by_task(dict.fromkeys(names, 0.0))
    metrics = sorted(map(Metric, names), key=lambda metric: list(order).index(metric.task))
    tasks = next((run.tasks for method in methods for run in method.runs if run.tasks), ())
    whole = Comparison(
        runs, methods, [], metrics, tasks, single, (baseline or BASELINE) if baselines else None, baselines
    )
    values = {method.name: _values(method) for method in methods if method.finished}
    ranks = _mean_ranks(values, whole.counting)
    rows = [
        _row(method, values[method.name], baselines.get(method.name), single, ranks.get(method.name))
        for method in methods
        if method.finished
    ]
    return Comparison(runs, methods, rows, metrics, tasks, single, whole.baseline, baselines)


def mean_metrics(runs: Sequence[CollectedRun]) -> dict[str, float]:
    """Return the mean of each metric over finished runs."""
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    return {name: fmean(run.metrics[name] for run in runs if name in run.metrics) for name in names}


def by_seed(runs: Sequence[CollectedRun]) -> dict[Key, list[CollectedRun]]:
    """Return the runs grouped by seed. The keys are the same for all methods."""
    found: dict[Key, list[CollectedRun]] = {}
    for run in runs:
        found.setdefault(repetition(run)[:2], []).append(run)
    return found


def _over_repetitions(runs: Sequence[CollectedRun], values: Sequence[float | None]) -> list[float]:
    """Return one value per repetition. Several runs of the same seed are averaged, not counted twice."""
    found: dict[Key, list[float]] = {}
    for run, value in zip(runs, values, strict=True):
        if value is not None:
            found.setdefault(repetition(run), []).append(value)
    return [fmean(of_one) for of_one in found.values()]


def _values(method: Method) -> dict[str, Spread]:
    """Return mean and spread of each test metric."""
    runs = method.finished
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    found = {name: Spread.of(_over_repetitions(runs, [run.metrics.get(name) for run in runs])) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _row(
    method: Method,
    values: Mapping[str, Spread],
    baseline: Method | None,
    single: Sequence[Method],
    rank: float | None,
) -> Row:
    runs = method.finished
    alone = _with_context(method, single)
    results = single_task_results(Run(run.name, run.metrics) for run in alone.finished) if alone else {}
    gains = [delta_m_or_none(run.metrics, results) for run in runs]
    timed = [run for run in method.runs if _seconds_per_step(run) is not None]
    seconds = Spread.of(_over_repetitions(timed, [_seconds_per_step(run) for run in timed]))
    weights = {}
    for task in dict.fromkeys(task for run in runs for task in _mean_weights(run)):
        found = Spread.of(_over_repetitions(runs, [_mean_weights(run).get(task) for run in runs]))
        if found is not None and not any(map(is_random, runs)):
            weights[task] = found
    return Row(
        method,
        values,
        Spread.of(_over_repetitions(runs, gains)),
        rank,
        seconds,
        _time_ratio(method, baseline),
        weights,
        {} if baseline is None or baseline is method else _tests(method, baseline),
    )


def _mean_weights(run: CollectedRun) -> Mapping[str, float]:
    return run.weights.get("mean_weights") or run.weights.get("weights") or {}


def _seconds_per_step(run: CollectedRun) -> float | None:
    seconds, steps = run.training.get("seconds"), run.training.get("steps")
    return seconds / steps if seconds is not None and steps else None


def _time_ratio(method: Method, baseline: Method | None) -> Spread | None:
    """Return the step time relative to the baseline's: for each common seed or, if there are none, of the means."""
    if baseline is None:
        return None
    ours, theirs = (
        {seed: fmean(times) for seed, of_seed in by_seed(one.runs).items() if (times := _times(of_seed))}
        for one in (method, baseline)
    )
    both = [seed for seed in ours if seed in theirs]
    if both:
        return Spread.of([ours[seed] / theirs[seed] for seed in both])
    return Spread(fmean(ours.values()) / fmean(theirs.values()), None, 1) if ours and theirs else None


def _times(runs: Sequence[CollectedRun]) -> list[float]:
    return [time for run in runs if (time := _seconds_per_step(run))]


def _tests(method: Method, baseline: Method) -> dict[str, PairedTest]:
    ours, theirs = by_seed(method.finished), by_seed(baseline.finished)
    both = [seed for seed in ours if seed in theirs]
    differences: dict[str, list[float]] = {}
    for seed in both:
        new, old = mean_metrics(ours[seed]), mean_metrics(theirs[seed])
        for name in new.keys() & old.keys():
            differences.setdefault(name, []).append(new[name] - old[name])
    return {name: paired_test(values) for name, values in differences.items()}


def _mean_ranks(methods: Mapping[str, Mapping[str, Spread]], metrics: Sequence[Metric]) -> dict[str, float]:
    """Return each method's mean rank, averaged over the metrics of a task first and then over the tasks; 1 is best.

    Equal means share a rank, NaN comes last.
    """
    ranks: dict[str, dict[str, list[float]]] = {}
    for metric in metrics:
        scores = {}
        for name, values in methods.items():
            if metric.name in values:
                mean = values[metric.name].mean
                scores[name] = math.inf if math.isnan(mean) else -mean if metric.upwards else mean
        for name, score in scores.items():
            better = sum(other < score for other in scores.values())
            equal = sum(other == score for other in scores.values())
            ranks.setdefault(name, {}).setdefault(metric.task, []).append(better + (equal + 1) / 2)
    return {name: fmean(map(fmean, of_method.values())) for name, of_method in ranks.items()}


def _with_context(method: Method, others: Sequence[Method]) -> Method | None:
    return next((other for other in others if other.context == method.context), None)


def _baselines(wanted: str, methods: Sequence[Method]) -> dict[str, Method]:
    named = next((method for method in methods if method.name == wanted), None)
    candidates = [method for method in methods if method.strategy == wanted and method.finished]
    found = {}
    for method in methods:
        baseline = named or _with_context(method, candidates)
        if baseline is not None and baseline.finished:
            found[method.name] = baseline
    return found


def _refuse_unknown_baseline(baseline: str | None, methods: Sequence[Method]) -> None:
    if baseline is None:
        return
    names = list(dict.fromkeys([*(method.name for method in methods), *(method.strategy for method in methods)]))
    if baseline not in names:
        raise ValueError(f"--baseline should be one of the methods; got '{baseline}'; {did_you_mean(baseline, names)}")
    several = [method.name for method in methods if method.strategy == baseline]
    contexts = [method.context for method in methods if method.strategy == baseline]
    if baseline not in [method.name for method in methods] and any(contexts.count(one) > 1 for one in contexts):
        raise ValueError(f"--baseline '{baseline}' matches several methods: {', '.join(several)}. Choose one of them.")
