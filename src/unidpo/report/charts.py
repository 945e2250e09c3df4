"""Curves of runs as SVG: what was logged, faint, under what it smooths to; held-out values as points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from markupsafe import Markup, escape

from unidpo.report.reading import Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers: TypeAlias = NDArray[np.float64]

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 12, 36
MOST_POINTS = 600
"""Of one line; longer ones become means of neighbours."""
COLOURS = 8
"""Runs that differ in colour; see `report.css`."""


@dataclass(frozen=True, slots=True)
class Idea:
    """One chart: a key of `words.json` after `chart-`, and the logged keys that it shows, by their dashes."""

    key: str
    logged: tuple[str, ...]
    log_scale: bool = False


IDEAS = (
    Idea("accuracy", ("rewards/accuracies",)),
    Idea("margin", ("rewards/margins",)),
    Idea("rewards", ("rewards/chosen", "rewards/rejected")),
    Idea("loss", ("loss",)),
    Idea("preference", ("preference/loss",)),
    Idea("weights", ("weights/quality", "weights/performance")),
    Idea("gate", ("nll/gate_rate",)),
    Idea("gradient", ("grad_norm",), log_scale=True),
    Idea("rate", ("learning_rate",)),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One curve.

    Attributes:
        run: number of its run, which gives the colour.
        dash: number of its key within the chart.
        held_out: whether it was measured on held-out pairs.
        x: optimizer steps.
        y: values.
        smooth: the values smoothed; of held-out ones as they are.
    """

    run: int
    dash: int
    held_out: bool
    x: list[float]
    y: list[float]
    smooth: list[float]


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart as it is drawn, and the numbers that the page's script shows under the pointer."""

    idea: Idea
    svg: Markup
    data: dict[str, Any]
    has_held_out: bool = field(default=False)


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """A chart of each idea that any run has values of, and that are not all the same."""
    charts = []
    for idea in IDEAS:
        lines = [line for number, run in enumerate(runs) for line in _lines(number, run, idea)]
        values = [value for line in lines for value in line.y]
        if len(set(values)) > 1:
            charts.append(_chart(idea, lines))
    return charts


def _lines(number: int, run: Run, idea: Idea) -> list[Line]:
    lines = []
    for dash, key in enumerate(idea.logged):
        for held_out in (False, True):
            name = f"eval_{key}" if held_out else key
            points = [(float(r["step"]), float(r[name])) for r in run.records if isinstance(r.get(name), int | float)]
            if not points:
                continue
            x, y = _thinned(np.array(points, dtype=np.float64))
            smooth = y if held_out else smoothed(y)
            lines.append(Line(number, dash, held_out, x.tolist(), y.tolist(), smooth.tolist()))
    return lines


def _thinned(points: Numbers) -> tuple[Numbers, Numbers]:
    pieces = np.array_split(points, math.ceil(len(points) / math.ceil(len(points) / MOST_POINTS)))
    means = np.array([piece.mean(axis=0) for piece in pieces])
    return means[:, 0], means[:, 1]


def smoothed(values: Numbers) -> Numbers:
    """The middle of a straight line through about a tenth of the curve around each point, so that nothing lags.

    At the ends, where the points lie on one side, the line is read off there; never outside of what there was.
    """
    count, half = len(values), len(values) // 20 + (len(values) >= 6)
    first = np.clip(np.arange(count) - half, 0, max(count - 2 * half - 1, 0))
    window = first[:, None] + np.arange(min(2 * half + 1, count))
    x, y = window - np.arange(count)[:, None], values[window]
    spread = x - x.mean(axis=1, keepdims=True)
    slope = (spread * y).sum(axis=1) / np.maximum((spread**2).sum(axis=1), 1e-12)
    middle = y.mean(axis=1) - slope * x.mean(axis=1)
    return np.asarray(np.clip(middle, values.min(), values.max()), dtype=np.float64)


def _chart(idea: Idea, lines: Sequence[Line]) -> Chart:
    ys = [y for line in lines for y in line.y]
    log_scale = idea.log_scale and min(ys) > 0
    low, high = _range([math.log10(y) for y in ys] if log_scale else ys, idea)
    right = max(x for line in lines for x in line.x)
    left = min(0.0, right - 1) if right <= 1 else 0.0
    scale = _Scale(left, right, low, high, log_scale)
    parts = [*_grid(scale), *(_path(line, scale) for line in lines)]
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" data-chart="{}">{}</svg>').format(
        WIDTH, HEIGHT, idea.key, Markup("").join(parts)
    )
    series = [
        {
            "run": line.run,
            "key": idea.logged[line.dash],
            "held": line.held_out,
            "x": line.x,
            "y": [_rounded(y) for y in line.y],
            "smooth": [_rounded(y) for y in line.smooth],
        }
        for line in lines
    ]
    box = {"left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM, "width": WIDTH}
    data = {"x0": left, "x1": right, "box": box, "series": series}
    return Chart(idea, svg, data, any(line.held_out for line in lines))


def _range(values: Sequence[float], idea: Idea) -> tuple[float, float]:
    """The ends of the vertical axis: what there is, with a little room; shares end at 0 and 1 where they come near."""
    low, high = min(values), max(values)
    room = (high - low) * 0.06
    low, high = low - room, high + room
    if idea.key in ("accuracy", "gate", "weights"):
        low, high = max(low, 0.0), min(high, 1.0)
    if idea.key in ("rate", "loss", "preference") and low > 0:
        low = 0.0
    return low, high


@dataclass(frozen=True, slots=True)
class _Scale:
    left: float
    right: float
    low: float
    high: float
    log: bool

    def x(self, step: float) -> float:
        return LEFT + (step - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)


def _grid(scale: _Scale) -> list[Markup]:
    parts = []
    if scale.log:
        values = [m * 10.0**e for e in range(math.floor(scale.low), math.ceil(scale.high)) for m in (1, 2, 5)]
        values = [value for value in values if scale.low <= math.log10(value) <= scale.high]
        values = [value for value in values if round(math.log10(value), 9) % 1 == 0] if len(values) > 6 else values
        values = values or [10**scale.low, 10**scale.high]
    else:
        values = _ticks(scale.low, scale.high, 5)
    for value in values:
        y = scale.y(value)
        parts.append(
            Markup('<line class="grid{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                " zero" if value == 0 else "", LEFT, WIDTH - RIGHT, y, y
            )
        )
        parts.append(
            Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(LEFT - 7, y + 5, _label(value, values))
        )
    parts += [
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{:,}</text>').format(
            scale.x(step), HEIGHT - BOTTOM + 22, int(step)
        )
        for step in _ticks(scale.left, scale.right, 6)
        if step == int(step)
    ]
    return parts


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within a range, at most about so many."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _label(value: float, among: Sequence[float]) -> str:
    if value and max(map(abs, among)) < 0.001:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:,.6g}"


def _path(line: Line, scale: _Scale) -> Markup:
    names = escape(f"run{line.run % COLOURS} dash{line.dash}")
    if line.held_out:
        dots = Markup("").join(
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3.5"/>').format(scale.x(x), scale.y(y))
            for x, y in zip(line.x, line.y, strict=True)
        )
        return Markup('<g class="held {}"><path d="{}"/>{}</g>').format(names, _d(line.x, line.y, scale), dots)
    raw = Markup('<path class="raw" d="{}"/>').format(_d(line.x, line.y, scale))
    return Markup('<g class="{}">{}<path class="smooth" d="{}"/></g>').format(
        names, raw if len(line.x) > 1 else "", _d(line.x, line.smooth, scale)
    )


def _d(x: Sequence[float], y: Sequence[float], scale: _Scale) -> str:
    points = [f"{scale.x(at):.1f} {scale.y(value):.1f}" for at, value in zip(x, y, strict=True)]
    # A single point has no length; a round cap draws it.
    return "M" + "L".join(points if len(points) > 1 else points * 2)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
