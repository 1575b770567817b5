"""Small line charts as numbers for an SVG: where lines, dots and ticks are.

The page that shows them gives the colours, so that they fit a light and a dark one; and a
chart costs a millisecond, for a run draws them at each save. Units of the SVG, x to the
right and y down.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Point = tuple[float, float]  # step, value
WIDTH, HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 24  # margins
_MOST_DOTS = 40
_DECADE = 10.0


@dataclass(frozen=True)
class Dot:
    """A point, and what it says when it is pointed at."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: for the legend.
        last: its last value, for the legend.
        path: for the attribute ``d`` of an SVG path.
        dots: its points, where they are few.
    """

    label: str
    last: str
    path: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Tick:
    """A mark of an axis, and its number."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A chart as the page draws it."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def draw(title: str, series: Mapping[str, Sequence[Point]]) -> Chart | None:
    """A chart of all series that have points, or None; y is logarithmic over decades.

    Args:
        title: of the chart.
        series: label to points in the order of their steps; values are finite.
    """
    shown = {label: points for label, points in series.items() if points}
    if not shown:
        return None
    steps = [step for points in shown.values() for step, _ in points]
    values = [value for points in shown.values() for _, value in points]
    right, top = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    first, last = min(steps), max(steps)
    if first == last:
        first -= 1
    x = _scale(first, last, _LEFT, right)
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low >= _DECADE
    if not logarithmic:
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = low - room if low < 0 or low > room else 0.0, high + room
    bend: Callable[[float], float] = math.log10 if logarithmic else float
    straight = _scale(bend(low), bend(high), top, _TOP)

    def y(value: float) -> float:
        return straight(bend(value))

    lines = tuple(_line(label, points, x, y) for label, points in shown.items())
    x_ticks = tuple(Tick(x(tick), number(tick)) for tick in _ticks(first, last, False, whole=True))
    y_ticks = tuple(Tick(y(tick), number(tick)) for tick in _ticks(low, high, logarithmic))
    return Chart(title, lines, x_ticks, y_ticks)


def number(value: float) -> str:
    """A value in few characters."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _line(
    label: str,
    points: Sequence[Point],
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> Line:
    places = [(x(step), y(value)) for step, value in points]
    path = "M" + " L".join(f"{across:.1f} {down:.1f}" for across, down in places)
    dots = [
        Dot(round(across, 1), round(down, 1), f"step {number(step)}: {number(value)}")
        for (across, down), (step, value) in zip(places, points, strict=True)
    ]
    few = len(dots) <= _MOST_DOTS
    return Line(label, number(points[-1][1]), path, tuple(dots) if few else ())


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float, logarithmic: bool, whole: bool = False) -> list[float]:
    from matplotlib.ticker import LogLocator, MaxNLocator

    if logarithmic:
        few = high / low <= _DECADE**2
        found = LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8).tick_values(low, high)
    else:
        found = MaxNLocator(4, integer=whole).tick_values(low, high)
    return [float(tick) for tick in found if low <= tick <= high]
