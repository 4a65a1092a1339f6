"""The parts of SVG and HTML that charts need: escaped elements, axes and ticks. No scripts, no external resources."""

from __future__ import annotations

import base64
import html
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT = 360, 230
"""Size of every chart, in units of about one pixel on a phone."""
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 20, 34
"""Margins around the plot for the tick labels and the names of the axes."""

STYLES = 7
"""Number of styles. Each has a color, a dash pattern and a marker, and stays distinct without the color."""
_DASHES = ("", "7 3", "2 3", "8 3 2 3", "12 4", "4 2", "8 3 2 3 2 3")
_MARKERS = (
    "M-1 0A1 1 0 1 1 1 0A1 1 0 1 1 -1 0Z",
    "M-1 -1H1V1H-1Z",
    "M0 -1.2L1.15 .9H-1.15Z",
    "M0 -1.35L1.35 0L0 1.35L-1.35 0Z",
    "M0 1.2L1.15 -.9H-1.15Z",
    "M-1.1 -.4H-.4V-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1Z",
    "M-.5 -1.3H.5V1.3H-.5Z",
)
"""Disc, square, triangle, diamond, inverted triangle, cross, bar: paths of radius 1."""


def element(tag: str, *children: str, **attributes: object) -> str:
    """Return an element. Escapes attributes but not children, which are elements or escaped text.

    A trailing underscore in an attribute's name is dropped, others become hyphens. ``None`` omits the attribute.

    Example:
        >>> element("text", text("<b>"), class_="tick", text_anchor="end", x=1.2345)
        '<text class="tick" text-anchor="end" x="1.23">&lt;b&gt;</text>'
    """
    shown = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(_attribute(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{shown}>{''.join(children)}</{tag}>"


def embedded(file: Path, title: str) -> str:
    """Return a PNG embedded in the page, or an empty string if the file is missing or damaged.

    Args:
        file: the picture.
        title: alternative text for screen readers.
    """
    content = file.read_bytes() if file.is_file() else b""
    if not (content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 24):
        return ""
    width, height = struct.unpack(">II", content[16:24])
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    image = element("image", href=source, width=width, height=height)
    return element("svg", image, viewBox=f"0 0 {width} {height}", class_="chart", role="img", aria_label=title)


def _attribute(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text(value: object) -> str:
    """Return any value as text that is safe in HTML.

    Example:
        >>> text('<script>"')
        '&lt;script&gt;&quot;'
    """
    return html.escape(str(value))


@dataclass(frozen=True)
class Axis:
    """Maps values to positions between two ends, on a linear or logarithmic scale."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(
        cls, values: Iterable[float], start: float, end: float, *, log: bool = False, tight: bool = False
    ) -> Axis:
        """Return an axis that covers all finite values, with some padding unless ``tight``.

        Example:
            >>> Axis.around([0.0, 10.0], 0, 100, tight=True)(5.0)
            50.0
        """
        known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        low, high = (min(known), max(known)) if known else (0.1, 1.0)
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
            room = 0.5 if log else abs(low) * 0.1 or 1.0
            low, high = low - room, high + room
        elif not tight:
            room = 0.05 * (high - low)
            # Start at 0 if it is near, so you can compare sizes.
            low = 0.0 if not log and 0 <= low < 0.3 * high else low - room
            high += room
        return cls(low, high, start, end, log)

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        if self.log:
            value = math.log10(value) if value > 0 else self.low
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, about: int = 4) -> list[float]:
        """Return round values on the axis.

        Example:
            >>> Axis(0.0, 1.0, 0, 100).ticks(), Axis(-1.0, 2.0, 0, 100, log=True).ticks()
            ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.1, 1.0, 10.0, 100.0])
        """
        if self.log and self.high - self.low >= 0.7:
            return self._log_ticks(about)
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        rough = (high - low) / about
        power = 10 ** math.floor(math.log10(rough))
        step = power * min((1, 2, 5, 10), key=lambda nice: abs(nice * power - rough))
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        digits = max(0, 2 - math.floor(math.log10(step)))
        return [round(number * step, digits) + 0.0 for number in range(first, last + 1)]

    def _log_ticks(self, about: int) -> list[float]:
        """Return powers of ten, or values between them if there are too few."""
        span = self.high - self.low
        between = (1, 2, 5) if span < 2 else (1,)
        step = 1 if span < 2 * about - 1 else math.ceil(span / about)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1, step)
        ticks = [digit * 10.0**power for power in powers for digit in between]
        return [tick for tick in ticks if self.low - 1e-9 <= math.log10(tick) <= self.high + 1e-9]


def tick_label(value: float) -> str:
    """Return a short number.

    Example:
        >>> [tick_label(value) for value in (0.25, 1500.0, 20000.0, 0.00001, -3.0, 1e9)]
        ['0.25', '1500', '20k', '1e-5', '-3', '1e9']
    """
    if value and not 1e-3 <= abs(value) < 1e7:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    if abs(value) >= 1e4:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:.4g}"


def frame(title: str, x: Axis, y: Axis, x_name: str, y_name: str, content: Sequence[str]) -> str:
    """Return a whole chart: grid, tick labels, axis names and content.

    Args:
        title: alternative text for screen readers.
        x: the horizontal axis.
        y: the vertical axis.
        x_name: label below the chart.
        y_name: label above it.
        content: elements, the last one on top.
    """
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    lines, numbers = [], []
    for value in y.ticks():
        lines.append(element("line", class_="grid", x1=LEFT, x2=right, y1=y(value), y2=y(value)))
        numbers.append(element("text", tick_label(value), class_="tick end", x=LEFT - 5, y=y(value) + 4))
    for value in x.ticks(5):
        lines.append(element("line", class_="grid", x1=x(value), x2=x(value), y1=bottom, y2=bottom + 4))
        anchor = "tick end" if x(value) > right - 12 else "tick middle"
        place = right + 4 if anchor == "tick end" else x(value)
        numbers.append(element("text", tick_label(value), class_=anchor, x=place, y=bottom + 15))
    axis = element("line", class_="axis", x1=LEFT, x2=right, y1=bottom, y2=bottom)
    names = [
        element("text", text(x_name), class_="name end", x=right + 4, y=HEIGHT - 4),
        element("text", text(y_name), class_="name", x=4, y=12),
    ]
    return element(
        "svg",
        element("title", text(title)),
        *lines,
        axis,
        *content,
        *numbers,
        *names,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        class_="chart",
    )


def style(number: int) -> str:
    """Return the CSS class with a series' color."""
    return f"s{number % STYLES}"


def dash(number: int) -> str | None:
    """Return the dash pattern of a series' line. After `STYLES` series, the colors repeat with other patterns."""
    return _DASHES[(number + number // STYLES) % STYLES] or None


def marker(number: int, x: float, y: float, size: float = 3.5, *, class_: str = "mark") -> str:
    """Return a series' marker at a position."""
    path = _MARKERS[(number + number // STYLES) % STYLES]
    return element(
        "path",
        class_=f"{class_} {style(number)}",
        d=path,
        transform=f"translate({_attribute(x)} {_attribute(y)}) scale({size})",
    )
