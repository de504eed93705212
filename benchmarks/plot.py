"""Log-log plots as SVG, written by hand: panels side by side, a line a series.

Takes points by series; gives the text of a picture.  Knows nothing of what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#555555")  # Okabe & Ito 2008: told apart by every eye
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 350, 68, 20, 76, 52
FONT = "font-family='DejaVu Sans, Helvetica, Arial, sans-serif'"


@dataclass(frozen=True)
class Panel:
    """One pair of axes, both logarithmic; points that are not positive are left out."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Points]
    x_ticks: Sequence[float] = ()


@dataclass(frozen=True)
class _Axis:
    """Positions of values: ``low`` lies at ``start`` and ``high`` at ``end``, in pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)


def svg(panels: Sequence[Panel]) -> str:
    """The picture of ``panels`` from left to right."""
    width = WIDTH * len(panels)
    body = "\n".join(
        f"<g transform='translate({i * WIDTH} 0)'>\n{_panel(panel)}\n</g>" for i, panel in enumerate(panels)
    )
    size = f"width='{width}' height='{HEIGHT}' viewBox='0 0 {width} {HEIGHT}'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} {FONT} font-size='12'>\n{_BACK}\n{body}\n</svg>\n"


_BACK = "<rect width='100%' height='100%' fill='white'/>"


def _panel(panel: Panel) -> str:
    series = {name: [(x, y) for x, y in points if x > 0 and y > 0] for name, points in panel.series.items()}
    everything = [point for points in series.values() for point in points]
    if not everything:
        return _text(WIDTH / 2, HEIGHT / 2, f"{panel.title}: nothing was measured")
    xs, ys = zip(*everything, strict=True)
    x_axis = _Axis(*_padded(min(xs), max(xs)), LEFT, WIDTH - RIGHT)
    y_axis = _Axis(*_decades(min(ys), max(ys)), HEIGHT - BOTTOM, TOP)
    drawn = [_line(points, x_axis, y_axis, i) for i, points in enumerate(series.values())]
    frame = f"<rect x='{LEFT}' y='{TOP}' width='{WIDTH - LEFT - RIGHT}' height='{HEIGHT - TOP - BOTTOM}'"
    return "\n".join(
        [
            _text(LEFT, 18, panel.title, "start", "font-weight='bold'"),
            *_legend(list(series)),
            *_x_ticks(panel.x_ticks or sorted(set(xs)), x_axis),
            *_y_ticks(y_axis),
            f"{frame} fill='none' stroke='#333'/>",
            *drawn,
            _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, panel.x_label),
            _text(0, 0, panel.y_label, more=f"transform='translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)'"),
        ]
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = max((high / low) ** 0.05, 1.05)
    return low / margin, high * margin


def _decades(low: float, high: float) -> tuple[float, float]:
    """The nearest round numbers below and above, so that small ranges fill their panel too."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = [m * 10.0**e for e in exponents for m in _steps(high / low)]
    return max(s for s in steps if s <= low * 0.97), min(s for s in steps if s >= high * 1.03)


def _steps(ratio: float) -> tuple[float, ...]:
    """Which multiples of powers of ten are round numbers where values span that ratio."""
    if ratio > 2e3:
        return (1,)
    return (1, 2, 5) if ratio > 3 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)


def _x_ticks(values: Sequence[float], axis: _Axis) -> list[str]:
    """A tick for every value, a label where the one before leaves room."""
    drawn, free_from = [], -math.inf
    for value in values:
        if not axis.low <= value <= axis.high:
            continue
        x, words = axis.at(value), f"{value:,.0f}"
        half = 3.6 * len(words) + 3
        bottom = HEIGHT - BOTTOM
        drawn.append(f"<line x1='{x:.1f}' y1='{TOP}' x2='{x:.1f}' y2='{bottom}' stroke='#e4e4e4'/>")
        if x - half >= free_from:
            drawn.append(_text(x, bottom + 16, words))
            free_from = x + half
    return drawn


def _y_ticks(axis: _Axis) -> list[str]:
    exponents = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    values = [m * 10.0**e for e in exponents for m in _steps(axis.high / axis.low)]
    drawn = []
    for value in (v for v in values if axis.low * 0.999 <= v <= axis.high * 1.001):
        y = axis.at(value)
        drawn.append(f"<line x1='{LEFT}' y1='{y:.1f}' x2='{WIDTH - RIGHT}' y2='{y:.1f}' stroke='#e4e4e4'/>")
        drawn.append(_text(LEFT - 6, y + 4, _number(value), "end"))
    return drawn


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.6f}".rstrip("0").rstrip(".")


def _line(points: Points, x_axis: _Axis, y_axis: _Axis, index: int) -> str:
    colour = COLOURS[index % len(COLOURS)]
    at = [(x_axis.at(x), y_axis.at(y)) for x, y in sorted(points)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    dots = "".join(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'/>" for x, y in at)
    return f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>{dots}"


def _legend(names: Sequence[str]) -> list[str]:
    """Two names a line."""
    drawn = []
    for i, name in enumerate(names):
        x, y, colour = LEFT + i % 2 * 180, 38 + i // 2 * 20, COLOURS[i % len(COLOURS)]
        drawn.append(f"<line x1='{x}' y1='{y}' x2='{x + 18}' y2='{y}' stroke='{colour}' stroke-width='2'/>")
        drawn.append(_text(x + 23, y + 4, name, "start"))
    return drawn


def _text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='#222' {more}>{escape(words)}</text>"
