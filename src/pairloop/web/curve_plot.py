"""The picture of the curve: each version's win rate against the base and in its duel, and what became of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Literal

from pairloop.store.versions import Promotion, past_champions
from pairloop.types import BASE_VERSION, CycleState, Interval, VerdictKind
from pairloop.web.curve import Point
from pairloop.web.plots import Plot, Series, Shape, Tone
from pairloop.web.plots import Point as Place

By = Literal["version", "time"]
MAX_LABELS = 12
BASE_BEFORE = 0.7
"""How far the base stands before the first version, of the room that a version has."""
ASIDE = 0.16
"""How far the duel's mark stands beside the version's own, of the room that a version has."""


class Fate(StrEnum):
    """What became of a version; the last thing that happened counts."""

    PROMOTED = "promoted"
    HELD = "held"
    REJECTED = "rejected"
    ROLLED_BACK = "rolled back"
    DUELLING = "duelling"
    FAILED = "failed"


LOOKS: Mapping[Fate, tuple[Tone, Shape]] = {
    Fate.PROMOTED: ("good", "circle"),
    Fate.HELD: ("warn", "square"),
    Fate.REJECTED: ("bad", "cross"),
    Fate.ROLLED_BACK: ("bad", "ring"),
    Fate.DUELLING: ("accent", "ring"),
}
"""Told apart by shape as well as by colour."""
_BY_VERDICT = {
    None: Fate.DUELLING,
    VerdictKind.PROMOTE.value: Fate.PROMOTED,
    VerdictKind.HOLD.value: Fate.HELD,
    VerdictKind.REJECT.value: Fate.REJECTED,
}
_BY_STATE = {CycleState.PROMOTED: Fate.PROMOTED, CycleState.HELD: Fate.HELD, CycleState.REJECTED: Fate.REJECTED}


@dataclass(frozen=True, slots=True)
class Details:
    """What the hover tells of a version, as far as it is known; ``kl_base`` in nats per answer."""

    n_train: int | None = None
    beta: float | None = None
    kl_base: Interval | None = None
    picks: int | None = None
    duel_share: Interval | None = None


def moves(history: Sequence[Promotion]) -> dict[int, Fate]:
    """What the moves of the champion say of each version: what was promoted, and what was taken back since."""
    found: dict[int, Fate] = {}
    for event in history:
        if event.action == "promote":
            found[event.number] = Fate.PROMOTED
        elif event.action == "rollback":
            if event.previous is not None:
                found[event.previous] = Fate.ROLLED_BACK
            found[event.number] = Fate.PROMOTED
    return found


def fate_of(number: int, moved: Mapping[int, Fate], *, verdict: str | None, state: CycleState | None) -> Fate | None:
    """``verdict``: the gate's last one; ``state``: of the version's cycle. None for a version that no cycle put to the test."""
    if number in moved:
        return moved[number]
    if state is not None and state.is_terminal:
        return _BY_STATE.get(state, Fate.FAILED)
    return None if state is None else _BY_VERDICT.get(verdict, Fate.DUELLING)


def versions_plot(
    points: Sequence[Point], *, history: Sequence[Promotion], details: Mapping[int, Details], by: By, champion: int
) -> Plot:
    """Against the base with what became of each version, the duel beside it, the line of champions, the band of duels."""
    xs = _places(points, by)
    width = (max(xs) - min(xs) if xs else 0.0) / max(1, len(points) - 1) or 1.0
    moved = moves(history)
    fates = [_BY_VERDICT[point.contest.verdict] for point in points]
    fates = [moved.get(point.contest.challenger, fate) for point, fate in zip(points, fates, strict=True)]
    told = [
        (x, point, fate, _tip(point, fate, details.get(point.contest.challenger, Details())))
        for x, point, fate in zip(xs, points, fates, strict=True)
    ]
    series = [_band(points, xs, details, width), _champions(points, xs, past_champions(history))]
    for fate, (tone, shape) in LOOKS.items():
        marks = [_mark(x, point, tip) for x, point, its, tip in told if its is fate]
        if marks:
            series.append(Series(f"{fate}, against the base", marks, "dots", tone, shape=shape))
    duels = [_duel(x + ASIDE * width, point) for x, point in zip(xs, points, strict=True) if point.rate.n]
    series.append(Series("in its duel, against its champion", duels, "dots", "soft", shape="small"))
    met = [
        _met(x - ASIDE * width, point, seen) for x, point in zip(xs, points, strict=True) if (seen := point.contest.met_base)
    ]
    series.append(Series("compared with the base itself", met, "dots", "accent", shape="small"))
    counted = [point.rate.n for point in points if point.rate.n]
    return Plot(
        id="versions",
        title="Win rate of each version",
        n=f"n = {sum(counted):,} votes in {len(counted)} duels; whiskers are 95 % intervals",
        x="time, UTC" if by == "time" else "version",
        y="win rate",
        series=[one for one in series if one.points],
        marks=((0.5, "as good as the base"),),
        x_range=(min(xs) - width, max(xs) + width) if xs else None,
        y_range=(0.0, 1.0),
        x_labels=_labels(points, xs, by, champion),
        percent=True,
    )


def _places(points: Sequence[Point], by: By) -> list[float]:
    if by == "version":
        return [float(place) for place in range(1, len(points) + 1)]
    known = [point.contest.at for point in points]
    return [at.timestamp() if at is not None else float(place) for place, at in enumerate(known)]


def _labels(points: Sequence[Point], xs: Sequence[float], by: By, champion: int) -> list[tuple[float, str]]:
    if by == "version":
        every = -(-len(points) // MAX_LABELS) or 1
        newest = len(points) - 1
        labels = [
            (x, f"@{point.contest.challenger}" + (" ★" if point.contest.challenger == champion else ""))
            for place, (x, point) in enumerate(zip(xs, points, strict=True))
            if (newest - place) % every == 0 and place >= every // 2  # none that the base's would run into
        ]
        return [(_base_at(xs), f"@{BASE_VERSION}" + (" ★" if champion == BASE_VERSION else "")), *labels] if xs else []
    if not xs:
        return []
    lo, hi = min(xs), max(xs)
    form = "%H:%M:%S" if hi - lo < 600 else "%H:%M" if hi - lo < 86_400 else "%d %b"
    steps = min(6, len(xs))
    ticks = [lo + (hi - lo) * k / max(1, steps - 1) for k in range(steps)]
    return [(at, datetime.fromtimestamp(at, UTC).strftime(form)) for at in ticks]


def _mark(x: float, point: Point, tip: str) -> Place:
    against, href = point.against_base, f"/versions/{point.contest.challenger}"
    if not point.rate.n:  # stopped before anybody compared it: its place says nothing
        return Place(x, against.mean, tip=tip, href=href)
    return Place(x, against.mean, against.lo, against.hi, tip=tip, href=href)


def _duel(x: float, point: Point) -> Place:
    contest, rate = point.contest, point.rate
    tip = f"@{contest.challenger} in its duel with @{contest.champion}: {percent(rate)}\n"
    tip += f"{contest.wins} won · {contest.losses} lost · {contest.ties} tied"
    return Place(x, rate.mean, rate.lo, rate.hi, tip=tip)


def _met(x: float, point: Point, seen: Interval) -> Place:
    tip = f"@{point.contest.challenger}, compared with the base itself: {percent(seen)}, {seen.n:,} votes"
    return Place(x, seen.mean, seen.lo, seen.hi, tip=tip)


def _champions(points: Sequence[Point], xs: Sequence[float], line: Sequence[int]) -> Series:
    """The present champion and those that it descends from in office: what was rolled back is not on it."""
    kept = set(line) - {BASE_VERSION}
    joined = [
        Place(x, point.against_base.mean, tip=f"@{point.contest.challenger}, champion: {percent(point.against_base)}")
        for x, point in zip(xs, points, strict=True)
        if point.contest.challenger in kept
    ]
    first = [Place(_base_at(xs), 0.5, tip="the base", href=f"/versions/{BASE_VERSION}")] if xs else []
    return Series("champions", [*first, *joined] if joined else [], "line", "good", dashed=True)


def _base_at(xs: Sequence[float]) -> float:
    """Where the base stands, before the first version."""
    return min(xs) - BASE_BEFORE * ((max(xs) - min(xs)) / max(1, len(xs) - 1) or 1.0)


def _band(points: Sequence[Point], xs: Sequence[float], details: Mapping[int, Details], width: float) -> Series:
    shares = [
        (x, share)
        for x, point in zip(xs, points, strict=True)
        if (share := details.get(point.contest.challenger, Details()).duel_share) is not None
    ]
    if len(shares) == 1:  # an area needs two ends
        ((x, share),) = shares
        shares = [(x - ASIDE * width, share), (x + ASIDE * width, share)]
    places = [Place(x, s.mean, 0.0, s.mean, tip=f"of {s.n:,} requests while it was open") for x, s in shares]
    return Series("share of requests in the duel", places, "band", "accent")


def _tip(point: Point, fate: Fate, known: Details) -> str:
    contest = point.contest
    lines = [f"@{contest.challenger}, {fate}"]
    lines.append(f"against the base: {percent(point.against_base)}" if point.rate.n else "stopped before anybody compared it")
    facts = []
    if known.n_train is not None:
        facts.append(f"{known.n_train:,} pairs")
    if known.beta is not None:
        facts.append(f"β {known.beta:g}")
    if known.kl_base is not None:
        facts.append(f"KL to the base {known.kl_base.mean:.2f} nats")
    facts.append(f"{known.picks if known.picks is not None else contest.wins + contest.losses + contest.ties:,} picks")
    if known.duel_share is not None:
        facts.append(f"{100 * known.duel_share.mean:.0f} % of the requests meanwhile")
    return "\n".join([*lines, " · ".join(facts)])


def percent(interval: Interval) -> str:
    return f"{100 * interval.mean:.0f} % ({100 * interval.lo:.0f}–{100 * interval.hi:.0f})"
