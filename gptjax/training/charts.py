"""Line charts as geometry for `templates/report.html`: points, ticks and reference lines in pixels.

A chart is drawn twice where logarithmic axes help, and the page switches between the two.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

MAX_POINTS = 1000  # of a line; more are thinned, but not their extremes
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 28, 14, 40  # margins in pixels
_LINE_HEIGHT = 14


class Point(NamedTuple):
    """step: optimizer steps done."""

    step: float
    value: float


@dataclasses.dataclass(frozen=True)
class Chart:
    """What a chart shows.

    series: {name: points}. levels: {name: value}, drawn as horizontal lines. log: whether to offer
    logarithmic axes (`x`, `y`, or `xy`). wide: over the full width of the page.
    """

    title: str
    unit: str
    series: dict[str, list[Point]]
    levels: dict[str, float] = dataclasses.field(default_factory=dict)
    log: str = ""
    wide: bool = False

    @property
    def description(self) -> str:
        """In words, for those who cannot see it."""
        sentences = []
        for name, points in self.series.items():
            first, last = points[0], points[-1]
            low = min(point.value for point in points)
            high = max(point.value for point in points)
            sentences.append(
                f"{name}: {number(first.value)} at step {first.step:.0f}, {number(last.value)} at "
                f"step {last.step:.0f}, between {number(low)} and {number(high)}."
            )
        sentences += [f"{name}: {number(value)}." for name, value in self.levels.items()]
        return " ".join(sentences)

    @property
    def rows(self) -> list[list[str]]:
        """A table of the drawn values: step, then a value of each series, empty where none is."""
        columns = [dict(points) for points in self.series.values()]
        steps = sorted({step for column in columns for step in column})
        return [
            [f"{step:.0f}", *(number(c[step]) if step in c else "" for c in columns)]
            for step in steps
        ]


@dataclasses.dataclass(frozen=True)
class Tick:
    at: float  # pixels
    text: str


@dataclasses.dataclass(frozen=True)
class Line:
    """A series or a level in pixels.

    path: `x,y x,y ...`. markers: x, y and text of each point, or of a level's label.
    """

    name: str
    path: str
    markers: list[tuple[float, float, str]]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """All that the template needs, in pixels. hover: JSON of [name, [[x, y, text], ...]] a line."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    levels: list[Line]
    hover: str


def number(value: float) -> str:
    """For people: `3.142`, `0.00012`, `12,345`."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def tick_text(value: float) -> str:
    """Short, for an axis: `0.5`, `2,000`, `50k`, `1.25M`."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    return number(value)


def make_chart(
    title: str,
    unit: str,
    series: dict[str, list[Point]],
    *,
    levels: dict[str, float] | None = None,
    log: str = "",
    wide: bool = False,
) -> Chart | None:
    """A chart of the series that have points, thinned; None where fewer than two points are left.

    Values that are not finite are left out.
    """
    drawn = {}
    for name, points in series.items():
        finite = [point for point in points if math.isfinite(point.value)]
        if finite:
            drawn[name] = thin(finite, MAX_POINTS)
    if sum(len(points) for points in drawn.values()) < 2:
        return None
    return Chart(title, unit, drawn, levels or {}, log, wide)


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` points, in order: the lowest and the highest of each of limit / 2 pieces."""
    if len(points) <= limit:
        return list(points)
    pieces = limit // 2
    result = []
    for k in range(pieces):
        piece = points[k * len(points) // pieces : (k + 1) * len(points) // pieces]
        extremes = {
            min(piece, key=lambda point: point.value),
            max(piece, key=lambda point: point.value),
        }
        result += sorted(extremes)
    return result


def ticks(low: float, high: float, *, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) in [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= 0.7 * raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in [low, high]; round numbers where these are fewer than 3."""
    result = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        result += [m * 10.0**power for m in (1, 2, 5)]
    inside = [tick for tick in result if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
    return inside if len(inside) >= 3 else ticks(low, high, count=4)


class _Axis:
    """Values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool) -> None:
        self.log = log
        self.low, self.high = low, high
        self.start, self.end = start, end

    def pixel(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, count: int) -> list[Tick]:
        values = (
            log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, count=count)
        )
        return [Tick(self.pixel(value), tick_text(value)) for value in values]


def draw(chart: Chart, *, log: bool = False) -> Drawing | None:
    """The chart in pixels.

    With `log`, the axes of `chart.log` are logarithmic: points that are not above 0 there are left
    out, and the result is None if no series has points then.
    """
    log_x, log_y = log and "x" in chart.log, log and "y" in chart.log
    series = {}
    for name, points in chart.series.items():
        visible = [p for p in points if (p.step > 0 or not log_x) and (p.value > 0 or not log_y)]
        if visible:
            series[name] = visible
    if not series or (log and not chart.log):
        return None
    width, height = (1200, 400) if chart.wide else (590, 320)
    steps = [point.step for points in series.values() for point in points]
    values = [point.value for points in series.values() for point in points]
    values += chart.levels.values()
    right, bottom = width - _RIGHT, height - _BOTTOM
    x = _Axis(*_range(steps, log=log_x, margin=0), _LEFT, right, log=log_x)
    y = _Axis(*_range(values, log=log_y, margin=0.05), bottom, _TOP, log=log_y)
    lines, hover = [], []
    for name, points in series.items():
        pixels = [(x.pixel(p.step), y.pixel(p.value)) for p in points]
        texts = [f"step {p.step:,.0f}: {number(p.value)}" for p in points]
        markers = [(px, py, text) for (px, py), text in zip(pixels, texts, strict=True)]
        path = " ".join(f"{px},{py}" for px, py in pixels)
        lines.append(Line(name, path, markers if len(points) <= 60 else []))
        hover.append([name, markers])
    return Drawing(
        width=width,
        height=height,
        left=_LEFT,
        right=right,
        top=_TOP,
        bottom=bottom,
        x_ticks=x.ticks(10 if chart.wide else 5),
        y_ticks=y.ticks(5),
        lines=lines,
        levels=_levels(chart.levels, y, right),
        hover=json.dumps(hover),
    )


def _levels(levels: dict[str, float], y: _Axis, right: float) -> list[Line]:
    """Horizontal lines, each with its label above it, or below where that would overlap."""
    lines: list[Line] = []
    last_label = -math.inf
    for name, value in sorted(levels.items(), key=lambda level: -level[1]):
        at = y.pixel(value)
        label = at - 5 if at - 5 > last_label + _LINE_HEIGHT else at + _LINE_HEIGHT
        text = (_LEFT + 6.0, label, f"{name}: {number(value)}")
        lines.append(Line(name, f"{_LEFT},{at} {right},{at}", [text]))
        last_label = label
    return lines


def _range(values: list[float], *, log: bool, margin: float) -> tuple[float, float]:
    """Bounds of an axis, never equal, with a margin as a share of the span."""
    low, high = min(values), max(values)
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return (low / 1.1, high * 1.1) if log else (low - pad, high + pad)
    if log:
        factor = (high / low) ** margin
        return low / factor, high * factor
    return low - margin * (high - low), high + margin * (high - low)
