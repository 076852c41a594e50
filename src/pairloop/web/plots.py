"""Plots as SVG, laid out here: no script is needed, the figures stand below as a table, both can be downloaded. Pure.

templates/_plot.html draws a `Drawing`; static/plot.js adds the hover, the PNG and the CSV.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

WIDTH, HEIGHT = 820.0, 260.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 18.0, 16.0, 40.0
MAX_POINTS = 400
"""Of a longer line every k-th point is drawn, and its last one; the table has what is drawn."""

_T = TypeVar("_T")
Style = Literal["line", "dots", "band"]
Tone = Literal["accent", "good", "bad", "warn", "soft"]
Shape = Literal["circle", "ring", "square", "cross", "small"]
"""Of dots: what must be told apart is so without colour, too."""


@dataclass(frozen=True, slots=True)
class Point:
    """``lo`` and ``hi`` are the ends of an interval; ``tip`` is told on hover, ``href`` is where a click leads."""

    x: float
    y: float
    lo: float | None = None
    hi: float | None = None
    tip: str = ""
    tone: Tone | None = None
    href: str | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """One named thing. ``line``: joined points; ``dots``: points with whiskers; ``band``: the area between lo and hi."""

    name: str
    points: Sequence[Point]
    style: Style = "line"
    tone: Tone = "accent"
    dashed: bool = False
    shape: Shape = "circle"


@dataclass(frozen=True, slots=True)
class Plot:
    """What is to be drawn. ``n``: of how many observations, in words ("n = 1,204 picks").

    ``y_range`` and ``x_range`` default to what the points need; ``marks`` are horizontal lines with a word, such as a boundary;
    ``x_labels`` replaces the numbers below the axis; ``log_y`` draws the logarithm, of positive values.
    """

    id: str
    title: str
    n: str
    x: str
    y: str
    series: Sequence[Series]
    marks: Sequence[tuple[float, str]] = ()
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    x_labels: Sequence[tuple[float, str]] | None = None
    percent: bool = False
    log_y: bool = False
    height: float = HEIGHT


@dataclass(frozen=True, slots=True)
class Dot:
    x: float
    y: float
    y_lo: float | None
    y_hi: float | None
    point: Point
    tone: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """A series in the drawing's coordinates; ``path`` is empty for dots."""

    series: Series
    path: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A plot in the drawing's coordinates; ``rows`` are the figures of the table, below ``headers``."""

    plot: Plot
    drawn: tuple[Drawn, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    marks: tuple[tuple[float, str], ...]
    rows: tuple[tuple[str, ...], ...]
    headers: tuple[str, ...] = ("series", "x", "y", "lo", "hi", "what")
    width: float = WIDTH
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP

    @property
    def height(self) -> float:
        return self.plot.height

    @property
    def bottom(self) -> float:
        return self.plot.height - BOTTOM

    @property
    def is_linked(self) -> bool:
        """Whether points lead somewhere: then it is more than an image to those who hear it read."""
        return any(dot.point.href for one in self.drawn for dot in one.dots)


def draw(plot: Plot) -> Drawing:
    """Lay a plot out in a box WIDTH wide and as high as it asks for; one without points has axes alone."""
    series = [replace(one, points=thinned(_finite(one.points))) for one in plot.series]
    scale = _Scale(plot, series)
    return Drawing(
        plot=plot,
        drawn=tuple(_drawn(one, scale) for one in series),
        x_ticks=tuple((scale.x(at), label) for at, label in plot.x_labels or scale.x_ticks()),
        y_ticks=tuple((scale.y(at), label) for at, label in scale.y_ticks()),
        marks=tuple((scale.y(at), label) for at, label in plot.marks),
        rows=tuple(
            (one.name, _exact(point.x), _exact(point.y), _exact(point.lo), _exact(point.hi), point.tip)
            for one in series
            for point in one.points
        ),
    )


@dataclass
class _Scale:
    plot: Plot
    series: Sequence[Series]
    _x: tuple[float, float] = field(init=False)
    _y: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        points = [point for one in self.series for point in one.points]
        self._x = self.plot.x_range or _range(point.x for point in points)
        heights = [v for p in points for v in (p.y, p.lo, p.hi) if v is not None] + [at for at, _ in self.plot.marks]
        if self.plot.log_y:
            heights = [math.log10(value) for value in heights if value > 0]
        self._y = self.plot.y_range or _range(heights, room=0.06)

    def x(self, value: float) -> float:
        lo, hi = self._x
        return round(LEFT + (value - lo) / (hi - lo) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        lo, hi = self._y
        at = (math.log10(value) if value > 0 else lo) if self.plot.log_y else value
        return round(TOP + (1 - (min(max(at, lo), hi) - lo) / (hi - lo)) * (self.plot.height - TOP - BOTTOM), 1)

    def x_ticks(self) -> list[tuple[float, str]]:
        return [(at, _short(at)) for at in _ticks(*self._x, most=8)]

    def y_ticks(self) -> list[tuple[float, str]]:
        ticks = _ticks(*self._y, most=5)
        if self.plot.log_y:
            return [(10**at, _short(10**at)) for at in ticks]
        return [(at, f"{100 * at:.0f} %" if self.plot.percent else _short(at)) for at in ticks]


def _drawn(series: Series, scale: _Scale) -> Drawn:
    places = [(scale.x(point.x), point) for point in series.points]
    if series.style == "band":
        over = [(x, scale.y(point.y if point.hi is None else point.hi)) for x, point in places]
        under = [(x, scale.y(point.y if point.lo is None else point.lo)) for x, point in reversed(places)]
        return Drawn(series, _path([*over, *under], closed=True), ())
    dots = tuple(
        Dot(
            x=x,
            y=scale.y(point.y),
            y_lo=None if point.lo is None else scale.y(point.lo),
            y_hi=None if point.hi is None else scale.y(point.hi),
            point=point,
            tone=point.tone or series.tone,
        )
        for x, point in places
    )
    path = _path([(dot.x, dot.y) for dot in dots]) if series.style == "line" else ""
    return Drawn(series, path, dots)


def _path(places: Sequence[tuple[float, float]], *, closed: bool = False) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in places) + ("Z" if closed else "") if places else ""


def thinned(points: Sequence[_T], most: int = MAX_POINTS) -> Sequence[_T]:
    """Not more points than can be told apart: every k-th and the last one, at most ``most`` and one. Twice is as once."""
    step = -(-(len(points) - 1) // most)
    return [*points[:-1:step], points[-1]] if step > 1 else points


def _finite(points: Iterable[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]


def _range(values: Iterable[float], *, room: float = 0.0) -> tuple[float, float]:
    """From the smallest to the largest, never empty."""
    known = [value for value in values if math.isfinite(value)]
    lo, hi = (min(known), max(known)) if known else (0.0, 1.0)
    if lo == hi:
        half = abs(lo) / 2 or 0.5
        lo, hi = lo - half, hi + half
    return lo - room * (hi - lo), hi + room * (hi - lo)


def _ticks(lo: float, hi: float, *, most: int) -> list[float]:
    """Round numbers from ``lo`` to ``hi``, at most so many and one."""
    raw = (hi - lo) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw * 0.999)
    first = math.ceil(lo / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(hi / step + 1e-9) + 1)]


def _short(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e+")
    return f"{value:,.10g}" if abs(value) < 1000 else f"{value:,.0f}"


def _exact(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
