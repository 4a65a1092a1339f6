"""The figures of a comparison and their contents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from lightning_gradnorm.experiments.report.charts import Point, Series, line_chart, point_chart
from lightning_gradnorm.experiments.report.collect import PICTURE, CollectedRun, Curve
from lightning_gradnorm.experiments.report.comparison import Comparison, Metric, Row, by_seed, mean_metrics
from lightning_gradnorm.experiments.report.methods import Method, is_random
from lightning_gradnorm.experiments.report.significance import deviation
from lightning_gradnorm.experiments.report.svg import embedded

MOST_LINES = 8
"""Methods in one chart. You could not tell more of them apart."""
MOST_POINTS = 120
"""Points along a line. More would be noise."""


@dataclass(frozen=True)
class Panel:
    """One chart."""

    title: str
    svg: str


@dataclass(frozen=True)
class Figure:
    """Charts that belong together, with a legend."""

    title: str
    caption: str
    panels: Sequence[Panel]
    legend: Sequence[tuple[str, int]] = ()
    """Names and styles."""
    is_line: bool = True
    is_wide: bool = False
    """True if its panels are stacked vertically."""


def figures(comparison: Comparison) -> list[Figure]:
    """Return the figures that have data to draw."""
    shown = _shown_methods(comparison)
    found = [
        _metric_curves(comparison, shown),
        _by_method(
            comparison,
            shown,
            "Task weights during training",
            "The weight of each task's loss or gradient. Mean over the seeds; the band is one standard deviation. "
            "Each method has its own vertical axis.",
            _curves_named("gradnorm/weight/", "balancing/weight/"),
        ),
        _by_method(
            comparison,
            shown,
            "Gradient norms",
            "Gradient norm of each task as the method measures it (GradNorm: weighted, at the last shared layer), on a "
            "logarithmic axis. Geometric mean over the seeds. Methods that do not measure norms are not shown.",
            _curves_named("gradnorm/grad_norm/", "balancing/grad_norm/"),
            log=True,
        ),
        _by_method(
            comparison,
            shown,
            "Loss ratios",
            "Each task's training loss divided by its first logged value. Tasks with close lines train at the same rate. "
            "Geometric mean over the seeds.",
            _loss_ratios,
            log=True,
        ),
        _alpha_sweep(comparison),
        _static_search(comparison),
        _pareto(comparison),
        _solutions(shown),
    ]
    return [figure for figure in found if figure is not None]


def order(comparison: Comparison) -> list[Method]:
    """Return the methods: baselines first, then by mean rank, then methods without results."""
    ranks = {row.method.name: row.rank for row in comparison.rows}
    bases = {method.name for method in comparison.baselines.values()}

    def place(method: Method) -> tuple[bool, float]:
        rank = ranks.get(method.name)
        return method.name not in bases, math.inf if rank is None else rank

    return sorted(comparison.methods, key=place)


def _shown_methods(comparison: Comparison) -> list[Method]:
    """Return the methods to draw as lines."""
    return [method for method in order(comparison) if not any(map(is_random, method.runs))][:MOST_LINES]


# ---- curves ----------------------------------------------------------------------------------------------------------


def mean_curve(curves: Sequence[Curve], *, log: bool = False) -> list[Point]:
    """Return the mean of several runs' curves, plus and minus one standard deviation, at the steps that all have.

    With more than `MOST_POINTS` steps, each point is the mean of several consecutive ones.

    Args:
        curves: one per run.
        log: compute mean and deviation of the logarithms, and skip values that are not positive.

    Example:
        >>> mean_curve([[(0, 1.0), (10, 2.0)], [(0, 3.0), (10, 2.0), (20, 9.0)]])
        [Point(x=0, y=2.0, low=0.585..., high=3.414...), Point(x=10, y=2.0, low=2.0, high=2.0)]
    """
    curves = [curve for curve in curves if curve]
    if not curves:
        return []
    end = min(curve[-1][0] for curve in curves)
    longest = max(len({step for step, _ in curve if step <= end}) for curve in curves)
    width = (end + 1) / MOST_POINTS if longest > MOST_POINTS else 0.0
    bins: list[dict[float, list[tuple[float, float]]]] = []
    for curve in curves:
        found: dict[float, list[tuple[float, float]]] = {}
        for step, value in curve:
            if step <= end and math.isfinite(value) and (value > 0 or not log):
                value = math.log(value) if log else value
                found.setdefault(step // width if width else step, []).append((step, value))
        bins.append(found)
    common = set(bins[0]).intersection(*bins[1:])
    points = []
    for place in sorted(common):
        values = [fmean(value for _, value in found[place]) for found in bins]
        x = fmean(step for found in bins for step, _ in found[place]) if width else place
        middle, wide = fmean(values), deviation(values) if len(values) > 1 else 0.0
        y, low, high = middle, middle - wide, middle + wide
        points.append(Point(x, *(map(math.exp, (y, low, high)) if log else (y, low, high))))
    return points


def drawn_runs(method: Method) -> list[CollectedRun]:
    """Return the runs to draw: those that completed training or, if there are none, the others."""
    return [run for run in method.runs if run.metrics or run.training] or list(method.runs)


def _metric_curves(comparison: Comparison, methods: Sequence[Method]) -> Figure | None:
    panels = []
    for metric in comparison.metrics or _logged_metrics(methods):
        name = metric.name.replace("test/", "val/", 1)
        lines = [
            Series(method.name, number, mean_curve([run.curves.get(name, []) for run in drawn_runs(method)]))
            for number, method in enumerate(methods)
        ]
        if any(line.points for line in lines):
            title = f"{metric.task} · {metric.short} {metric.arrow}"
            panels.append(Panel(title, line_chart(title, lines, x_name="training step")))
    if not panels:
        return None
    left_out = sum(not any(map(is_random, method.runs)) for method in comparison.methods) - len(methods)
    more = f" {left_out} more methods with a worse mean rank are not drawn." if left_out > 0 else ""
    return Figure(
        "Metrics during training",
        f"On the validation data. Mean over the seeds; the band is one standard deviation.{more}",
        panels,
        [(method.name, number) for number, method in enumerate(methods)],
    )


def _logged_metrics(methods: Sequence[Method]) -> list[Metric]:
    names = (name for method in methods for run in method.runs for name in run.curves if name.startswith("val/"))
    return [Metric(name.replace("val/", "test/", 1)) for name in dict.fromkeys(names)]


_CurvesOf = Callable[[CollectedRun, str], Curve]


def _curves_named(*prefixes: str) -> _CurvesOf:
    def find(run: CollectedRun, task: str) -> Curve:
        return next((run.curves[prefix + task] for prefix in prefixes if prefix + task in run.curves), [])

    return find


def _loss_ratios(run: CollectedRun, task: str) -> Curve:
    losses = run.curves.get(f"train/loss/{task}", [])
    first = next((value for _, value in losses if math.isfinite(value)), 0.0)
    return [(step, value / first) for step, value in losses] if first else []


def _by_method(
    comparison: Comparison,
    methods: Sequence[Method],
    title: str,
    caption: str,
    curves_of: _CurvesOf,
    *,
    log: bool = False,
) -> Figure | None:
    """Return one chart per method with one line per task."""
    tasks = comparison.tasks[:MOST_LINES]
    panels = []
    for method in methods:
        lines = [
            Series(task, number + 1, mean_curve([curves_of(run, task) for run in drawn_runs(method)], log=log))
            for number, task in enumerate(tasks)
        ]
        if any(line.points for line in lines):
            chart = line_chart(f"{title}, {method.name}", lines, x_name="training step", log=log)
            panels.append(Panel(method.name, chart))
    if not panels:
        return None
    if len(tasks) < len(comparison.tasks):
        caption += f" The first {len(tasks)} of {len(comparison.tasks)} tasks."
    return Figure(title, caption, panels, [(task, number + 1) for number, task in enumerate(tasks)])


def _solutions(methods: Sequence[Method]) -> Figure | None:
    """Return the pictures of the learned solutions, from one run of each method."""
    panels = []
    for method in methods:
        found = ((run, embedded(run.folder / PICTURE, f"solution of {method.name}")) for run in drawn_runs(method))
        run, image = next((one for one in found if one[1]), (None, ""))
        if run is not None:
            panels.append(Panel(f"{method.name} ({run.name})", image))
    caption = "The network's solution, the exact solution, and the absolute difference. One run of each method."
    return Figure("Solutions", caption, panels, is_wide=True) if panels else None


# ---- points ----------------------------------------------------------------------------------------------------------


def _alpha_sweep(comparison: Comparison) -> Figure | None:
    """Return the mean change relative to equal weights over GradNorm's α, one line per choice of the other options."""
    lines: dict[str, list[Point]] = {}
    for row in comparison.rows:
        alpha = row.method.options.get("balancing.alpha")
        if not isinstance(alpha, (int, float)) or row.method.name not in comparison.baselines:
            continue
        values = changes(comparison, row.method, comparison.baselines[row.method.name])
        if values:
            words = (word for key, word in row.method.words.items() if key != "balancing.alpha")
            name = " ".join([row.method.strategy, *words])
            lines.setdefault(name, []).append(_point(float(alpha), values))
    lines = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    title = f"α sweep: mean change against {comparison.baseline}"
    series = [Series(name, number + 1, points) for number, (name, points) in enumerate(lines.items())]
    chart = point_chart(title, series, x_name="α", y_name="mean change in %, higher is better", zero=0.0, joined=True)
    return Figure(
        title,
        f"{_what_change_is(comparison)} Against {comparison.baseline} with the same seed; mean over the seeds and one standard "
        "deviation.",
        [Panel("", chart)],
        [(one.name, one.style) for one in series],
    )


def changes(comparison: Comparison, method: Method, reference: Method) -> list[float]:
    """Return the mean change of the method's runs relative to the reference's, in percent, for each common seed."""
    ours, theirs = by_seed(method.finished), by_seed(reference.finished)
    found = (comparison.change(mean_metrics(ours[seed]), mean_metrics(theirs[seed])) for seed in ours if seed in theirs)
    return [change for change in found if change is not None]


def _what_change_is(comparison: Comparison) -> str:
    names = ", ".join(f"{metric.task} {metric.short}" for metric in comparison.counting)
    return f"Mean relative change of the test metrics ({names}), first over a task's metrics, then over the tasks."


def _static_search(comparison: Comparison) -> Figure | None:
    """Return the paper's Figure 4: the change from random static weights over their distance to GradNorm's weights."""
    draws = [run for method in comparison.methods for run in method.finished if is_random(run) and run.weights]
    best = _best_gradnorm(comparison)
    if not draws or best is None:
        return None
    center = {task: spread.mean for task, spread in best.weights.items()}
    static = next((row for row in comparison.rows if row.method.strategy == "gradnorm_static"), None)
    reference = (static or best).method
    results = mean_metrics(reference.finished)
    groups: dict[str, Iterable[CollectedRun]] = {"random static weights": draws}
    for row in comparison.rows:
        if row.method.strategy in ("equal", "fixed", "gradnorm_static"):
            groups[row.method.name] = row.method.finished
    series = []
    for number, (name, runs) in enumerate(groups.items()):
        points = []
        for run in runs:
            weights = run.weights.get("weights") or dict.fromkeys(center, 1.0)
            change = comparison.change(run.metrics, results)
            if change is not None and weights.keys() >= center.keys():
                distance = math.dist([weights[task] for task in center], list(center.values()))
                points.append(Point(distance, change, change, change))
        series.append(Series(name, (number + 1) if number else 0, points))
    shown = ", ".join(f"{task} {weight:.3g}" for task, weight in center.items())
    title = "Static weights: distance to GradNorm's against change"
    chart = point_chart(
        title,
        [one for one in series if one.points],
        x_name="distance to GradNorm's mean weights",
        y_name="mean change in %, higher is better",
        zero=0.0,
    )
    return Figure(
        title,
        f"Figure 4 of the GradNorm paper. {_what_change_is(comparison)} Against the mean of {reference.name}. Distance: "
        f"Euclidean, to the mean weights of {best.method.name} ({shown}). Each point is a run.",
        [Panel("", chart)],
        [(one.name, one.style) for one in series if one.points],
        is_line=False,
    )


def _best_gradnorm(comparison: Comparison) -> Row | None:
    rows = [row for row in comparison.rows if row.method.strategy == "gradnorm" and row.weights]
    return min(rows, key=lambda row: math.inf if row.rank is None else row.rank, default=None)


def _pareto(comparison: Comparison) -> Figure | None:
    """Return the main metrics of two tasks against each other, for up to three pairs of tasks."""
    main: dict[str, Metric] = {}
    for metric in comparison.counting:
        main.setdefault(metric.task, metric)
    axes = list(main.values())[:3]
    ordered = {method.name: number for number, method in enumerate(order(comparison))}
    rows = sorted(comparison.rows, key=lambda row: ordered[row.method.name])
    rows = [row for row in rows if not any(map(is_random, row.method.runs))][: 2 * MOST_LINES]
    panels = []
    for a, b in ((a, b) for i, a in enumerate(axes) for b in axes[i + 1 :]):
        have = [row for row in rows if {a.name, b.name} <= row.values.keys()]
        means, seeds = [], []
        for number, row in enumerate(have):
            x, y = row.values[a.name], row.values[b.name]
            means.append(Series(row.method.name, number, [Point(x.mean, y.mean, y.mean, y.mean)]))
            pairs = [(run.metrics.get(a.name), run.metrics.get(b.name)) for run in row.method.finished]
            seeds.append(Series("", number, [Point(p, q, q, q) for p, q in pairs if p is not None and q is not None]))
        if len(means) > 1:
            corner = f"best: {'top' if b.upwards else 'bottom'} {'right' if a.upwards else 'left'}"
            title = f"{a.task} {a.short} {a.arrow} and {b.task} {b.short} {b.arrow}"
            chart = point_chart(
                title,
                means,
                x_name=f"{a.task} {a.short} {a.arrow}",
                y_name=f"{b.task} {b.short} {b.arrow}",
                faint=seeds,
            )
            panels.append(Panel(f"{title} ({corner})", chart))
    if not panels:
        return None
    caption = "Large: a method's mean over the seeds; small: its runs. A method that no other beats in both tasks is"
    front = _not_dominated(axes, rows)
    return Figure(
        "Pairs of tasks",
        f"{caption} on the Pareto front; in the first picture: {', '.join(front)}.",
        panels,
        [(row.method.name, number) for number, row in enumerate(rows)],
        is_line=False,
    )


def _not_dominated(axes: Sequence[Metric], rows: Sequence[Row]) -> list[str]:
    """Return the methods on the Pareto front of the first two metrics."""
    scores: Mapping[str, tuple[float, ...]] = {
        row.method.name: tuple(row.values[m.name].mean * (1 if m.upwards else -1) for m in axes[:2])
        for row in rows
        if {m.name for m in axes[:2]} <= row.values.keys()
    }
    return [
        name
        for name, own in scores.items()
        if not any(other != own and all(o >= s for o, s in zip(other, own, strict=True)) for other in scores.values())
        and all(map(math.isfinite, own))
    ]


def _point(x: float, values: Sequence[float]) -> Point:
    middle, wide = fmean(values), deviation(values) if len(values) > 1 else 0.0
    return Point(x, middle, middle - wide, middle + wide)
