"""Charts: lines with bands, and points with error bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_gradnorm.experiments.report.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    dash,
    element,
    frame,
    marker,
    style,
    text,
)


class Point(NamedTuple):
    """A value with its spread at a position."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """Points with a common name and style."""

    name: str
    style: int
    points: Sequence[Point]


def line_chart(
    title: str, series: Sequence[Series], *, x_name: str, y_name: str = "", log: bool = False, zero: float | None = None
) -> str:
    """Return lines, each with a band from low to high behind it.

    Args:
        title: alternative text for screen readers.
        series: one line each.
        x_name: label below the chart.
        y_name: label above it.
        log: use a logarithmic vertical axis, and skip values that are not positive.
        zero: reference value, drawn as a line.

    Example:
        >>> chart = line_chart("w", [Series("left", 0, [Point(0, 1, 1, 1), Point(1, 2, 1.5, 2.5)])], x_name="step")
        >>> chart.startswith("<svg"), chart.count("<polyline"), chart.count('class="band')
        (True, 1, 1)
    """
    series = [Series(one.name, one.style, _drawable(one.points, log)) for one in series]
    points = [point for one in series for point in one.points]
    x, y = _axes(points, log=log, tight=True, zero=zero)
    bands, lines = [], []
    for one in series:
        if not one.points:
            continue
        if any(point.low < point.high for point in one.points):
            edge = [(point.x, point.high) for point in one.points] + [(p.x, p.low) for p in reversed(one.points)]
            bands.append(element("polygon", class_=f"band {style(one.style)}", points=_places(edge, x, y)))
        middle = [(point.x, point.y) for point in one.points]
        lines.append(
            element(
                "polyline",
                element("title", text(one.name)),
                class_=f"line {style(one.style)}",
                points=_places(middle, x, y),
                stroke_dasharray=dash(one.style),
            )
        )
        lines += [marker(one.style, x(px), y(py), 3.0) for px, py in _some(middle, one.style)]
    return frame(title, x, y, x_name, y_name, [*_zero_line(zero, y), *bands, *lines])


def point_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_name: str,
    y_name: str,
    zero: float | None = None,
    faint: Sequence[Series] = (),
    joined: bool = False,
) -> str:
    """Return points with error bars from low to high.

    Args:
        title: alternative text for screen readers.
        series: points, each with a marker and a tooltip.
        x_name: label below the chart.
        y_name: label above it.
        zero: reference value, drawn as a line.
        faint: smaller points behind them.
        joined: draw a line through each series' points.

    Example:
        >>> point_chart("α", [Series("a", 1, [Point(0, 1, 0.5, 1.5)])], x_name="α", y_name="%").count('class="bar')
        1
    """
    shown = [Series(one.name, one.style, _drawable(one.points, False)) for one in series]
    behind = [Series(one.name, one.style, _drawable(one.points, False)) for one in faint]
    x, y = _axes([p for one in (*shown, *behind) for p in one.points], zero=zero)
    content = _zero_line(zero, y)
    content += [marker(one.style, x(p.x), y(p.y), 4.0, class_="mark faint") for one in behind for p in one.points]
    for one in shown:
        if joined:
            middle = [(point.x, point.y) for point in one.points]
            content.append(
                element(
                    "polyline",
                    class_=f"line {style(one.style)}",
                    points=_places(middle, x, y),
                    stroke_dasharray=dash(one.style),
                )
            )
        for point in one.points:
            if point.low < point.high:
                ends = {"x1": x(point.x), "x2": x(point.x), "y1": y(point.low), "y2": y(point.high)}
                content.append(element("line", class_=f"bar {style(one.style)}", **ends))
            words = element("title", text(f"{one.name}: {point.x:.4g}, {point.y:.4g}"))
            content.append(element("g", words, marker(one.style, x(point.x), y(point.y), 6.0)))
    return frame(title, x, y, x_name, y_name, content)


def _axes(
    points: Sequence[Point], *, log: bool = False, tight: bool = False, zero: float | None = None
) -> tuple[Axis, Axis]:
    values = [value for point in points for value in (point.low, point.y, point.high)]
    values += [] if zero is None else [zero]
    return (
        Axis.around([point.x for point in points], LEFT + 2, WIDTH - RIGHT - 2, tight=tight),
        Axis.around(values, HEIGHT - BOTTOM, TOP, log=log),
    )


def _drawable(points: Sequence[Point], log: bool) -> list[Point]:
    """Drop points that cannot be drawn. On a logarithmic axis, a band that would reach 0 or less ends at the line."""
    found = []
    for point in points:
        if not (math.isfinite(point.x) and math.isfinite(point.y)) or (log and point.y <= 0):
            continue
        low, high = (end if math.isfinite(end) else point.y for end in (point.low, point.high))
        found.append(Point(point.x, point.y, point.y if log and low <= 0 else low, high))
    return found


def _zero_line(zero: float | None, y: Axis) -> list[str]:
    if zero is None:
        return []
    return [element("line", class_="zero", x1=LEFT, x2=WIDTH - RIGHT, y1=y(zero), y2=y(zero))]


def _places(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    return " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in points)


def _some(points: Sequence[tuple[float, float]], offset: int) -> list[tuple[float, float]]:
    """Return the points with a marker: all if there are few, otherwise some, offset from those of the next series."""
    if len(points) <= 8:
        return list(points)
    apart = max(2, len(points) // 4)
    return list(points[(offset * 2) % apart :: apart])
