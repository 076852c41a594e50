"""Plots about raters: picks by day, and how often each picks the answer on the left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import date, timedelta
from urllib.parse import quote

from pairloop.loop.raters import Profile
from pairloop.web.plots import Drawing, Plot, Point, Series, Tone, draw

LINES = 5
"""Raters with a line of their own; the others share one."""
DOTS = 12
_TONES: Sequence[Tone] = ("accent", "good", "warn", "bad", "soft")


def picks_by_day(profiles: Sequence[Profile]) -> Drawing:
    """A line for each of those with the most picks, one for all others; days are UTC."""
    most = sorted(profiles, key=lambda one: (-one.picks, one.rater_id))
    lines = [(one.rater_id, one.days) for one in most[:LINES]]
    others: Counter[date] = Counter()
    for one in most[LINES:]:
        others.update(one.days)
    if others:
        lines.append((f"{len(most) - LINES:,} others", others))
    days = sorted({day for _, by_day in lines for day in by_day})
    span = [days[0] + timedelta(n) for n in range((days[-1] - days[0]).days + 1)] if days else []
    series = [
        Series(
            short(name),
            [
                Point(float(place), float(by_day.get(day, 0)), tip=f"{name}\n{day}: {by_day.get(day, 0):,} picks")
                for place, day in enumerate(span)
            ],
            style="line" if len(span) > 1 else "dots",
            tone=_TONES[min(n, LINES - 1)],
            dashed=n == LINES,
        )
        for n, (name, by_day) in enumerate(lines)
    ]
    step = max(1, -(-len(span) // 8))
    picks = sum(one.picks for one in profiles)
    return draw(
        Plot(
            "picks-by-day",
            "Picks per day",
            f"n = {picks:,} picks",
            "day (UTC)",
            "picks",
            series,
            y_range=(0.0, 1.1 * max([1, *(n for _, by_day in lines for n in by_day.values())])),
            x_labels=[(float(place), f"{day:%d %b}") for place, day in enumerate(span) if place % step == 0],
        )
    )


def left_shares(profiles: Sequence[Profile]) -> Drawing:
    """Of those with the most decisive picks, how often the answer in the first place was chosen, with 95 % intervals."""
    told = [(one, one.left) for one in profiles if one.left is not None]
    told = sorted(told, key=lambda pair: (-pair[1].n, pair[0].rater_id))[:DOTS]
    points = []
    for place, (one, left) in enumerate(told):
        is_odd = one.checked is not None and "side_bias" in one.checked.flags
        shares = f"{100 * left.mean:.0f} % left ({100 * left.lo:.0f}–{100 * left.hi:.0f}) of {left.n:,} picks"
        tip = f"{one.rater_id}\n{shares}"
        tone: Tone | None = "bad" if is_odd else None
        points.append(Point(float(place), left.mean, left.lo, left.hi, tip, tone, rater_href(one.rater_id)))
    labels = [(float(place), _tail(one.rater_id)) for place, (one, _) in enumerate(told)]
    n = sum(left.n for _, left in told)
    return draw(
        Plot(
            "left-shares",
            "Share of picks for the answer on the left",
            f"n = {n:,} decisive picks of {len(points)} raters",
            "rater, most picks first",
            "left",
            [Series("share with 95 % interval; red: one side too often", points, style="dots")],
            marks=[(0.5, "a coin")],
            x_range=(-0.5, len(points) + 0.5),
            y_range=(0.0, 1.0),
            x_labels=labels,
            percent=True,
        )
    )


def _tail(name: str) -> str:
    """Names that begin alike are told apart by their ends."""
    return name if len(name) <= 7 else f"…{name[-6:]}"


def rater_href(rater_id: str) -> str:
    """The page of a rater, whose id may be anything: also ``..``, which browsers take out of a path even encoded."""
    return f"/raters/one?id={quote(rater_id, safe='')}"


def short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
