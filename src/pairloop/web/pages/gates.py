"""The gate: what it said of each cycle's challenger, and everything that its word rests on."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from sqlalchemy import Connection

from pairloop.errors import InvalidRequestError, NotFoundError
from pairloop.loop import cycle as loop_cycle
from pairloop.loop import gate
from pairloop.loop.cycle import Compared, Review
from pairloop.store import cycles, duels, verdicts
from pairloop.types import (
    PREFERENCE_METRIC,
    Cycle,
    CycleState,
    Interval,
    Label,
    LabelledGroup,
    Message,
    Verdict,
    VerdictKind,
    spoken,
)
from pairloop.web.context import Context, Here
from pairloop.web.pages.gate_rules import rule_of
from pairloop.web.pages.rendering import PageRoute, page
from pairloop.web.plots import Drawing, Plot, Point, Series, draw, thinned
from pairloop.web.wire import MAX_INT32

ON_A_PAGE = 25
COMPARISONS_ON_A_PAGE = 10
DRAWN = 200
"""Steps of the evidence that are drawn, of up to thousands: each costs two e-values."""
MOST_TEXT = 4_000
"""Characters of an answer that are shown; a page of the longest ones would be 20 MB."""

Show = Literal["lost", "won", "tied", "aside", "all"]
SHOWN: dict[str, str] = {
    "lost": "Regressions",
    "won": "Wins",
    "tied": "Ties",
    "aside": "Set aside",
    "all": "All",
}
Number = Annotated[int, Path(ge=1, le=MAX_INT32)]
Before = Annotated[int | None, Query(ge=1, le=MAX_INT32, description="Cycles numbered below this one.")]
PageNumber = Annotated[int, Query(ge=1, le=100_000, alias="page")]

router = APIRouter(include_in_schema=False, route_class=PageRoute)


@dataclass(frozen=True, slots=True)
class Line:
    """A cycle in the list, with the gate's last word on it."""

    cycle: Cycle
    challenger: int | None
    champion: int
    verdict: Verdict
    rate: Interval
    is_open: bool


@dataclass(frozen=True, slots=True)
class Side:
    """An answer of a comparison; ``more``: characters that are not shown."""

    version: int | None
    place: str
    text: str
    more: int
    picked: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """A comparison as two columns, the champion's answer first."""

    group_id: str
    question: str
    turns: tuple[Message, ...]
    sides: tuple[Side, Side]
    votes: tuple[str, ...]
    slices: tuple[tuple[str, str], ...]


@router.get("/gates")
async def gates(request: Request, context: Here, before: Before = None, kind: VerdictKind | None = None) -> Response:
    lines, more = await asyncio.to_thread(_lines, context, before, kind)
    return page(
        request,
        context,
        "gates.html",
        title="Gate",
        lines=lines,
        older=lines[-1].cycle.number if more else None,
        before=before,
        kind=kind,
        kinds=list(VerdictKind),
    )


@router.get("/gates/{number}")
async def gate_of(
    number: Number,
    request: Request,
    context: Here,
    show: Show = "lost",
    slice_: Annotated[str | None, Query(max_length=200, alias="slice")] = None,
    at: PageNumber = 1,
) -> Response:
    found = await asyncio.to_thread(_review, context, number)
    facets = _facets(found.compared)
    within = _slice(found, slice_)
    wanted = [one for one in facets[show] if within is None or within in _slices_of(one)]
    if at > _pages(len(wanted)):
        raise InvalidRequestError(f"there are {_pages(len(wanted))} pages of these comparisons", param="page")
    first = (at - 1) * COMPARISONS_ON_A_PAGE
    pairs = await asyncio.to_thread(_pairs, context, found, wanted[first : first + COMPARISONS_ON_A_PAGE])
    challenger = loop_cycle.challenger_of(found.cycle, found.duel)
    return page(
        request,
        context,
        "gate.html",
        title=f"Gate, cycle {number}",
        found=found,
        cycle=found.cycle,
        verdict=found.verdict,
        challenger=challenger,
        champion=found.cycle.parent if found.duel is None else found.duel.champion,
        rules=[rule_of(look.reason, look.interval) for look in found.looks],
        drawing=drawing_of(found),
        adjusted=gate.bradley_terry(gate.count(found.votes, found.config).counted),
        rate=None if found.verdict is None else _rate(found.verdict),
        offline=next((step.record["offline_duel"] for step in found.cycle.steps if "offline_duel" in step.record), None),
        ended=found.cycle.steps[-1].record.get("reason") if found.cycle.state.is_terminal else None,
        pairs=pairs,
        counts={name: len(some) for name, some in facets.items()},
        shown_words=SHOWN,
        show=show,
        slice=slice_,
        slice_counts=Counter(one for some in facets[show] for one in _slices_of(some)),
        at=at,
        pages=_pages(len(wanted)),
    )


# --- the list


def _lines(context: Context, before: int | None, kind: VerdictKind | None) -> tuple[list[Line], bool]:
    """A page of them, and whether there are older ones."""
    with context.store.reading() as c:
        found = cycles.judged(c, context.policy_name, ON_A_PAGE + 1, before=before, kind=kind)
        return [_line(c, one) for one in found[:ON_A_PAGE]], len(found) > ON_A_PAGE


def _line(c: Connection, cycle: Cycle) -> Line:
    verdict = verdicts.for_cycle(c, cycle.cycle_id)[-1][1]
    duel = duels.of_cycle(c, cycle.policy, cycle.cycle_id)
    return Line(
        cycle,
        loop_cycle.challenger_of(cycle, duel),
        cycle.parent if duel is None else duel.champion,
        verdict,
        _rate(verdict),
        cycle.state is CycleState.DUELLING,
    )


def _rate(verdict: Verdict) -> Interval:
    """The challenger's win rate, ties half."""
    return gate.win_rate(verdict.wins + verdict.ties / 2, verdict.wins + verdict.losses + verdict.ties)


# --- one verdict


def _review(context: Context, number: int) -> Review:
    with context.store.reading() as c:
        cycle = cycles.numbered(c, context.policy_name, number)
        if cycle is None:
            raise NotFoundError(f"no cycle {number} of {context.policy_name}", param="number")
        return loop_cycle.review(c, context.config, cycle)


def drawing_of(found: Review) -> Drawing | None:
    """E by votes on a logarithmic scale, with the line that it must reach; those after the verdict apart."""
    if not found.path:
        return None
    before, after = (thinned(part, DRAWN) for part in (found.path[: found.judged], found.path[max(found.judged - 1, 0) :]))
    series = [
        Series("E, for the challenger", [_point(step.votes, step.e_value, "E") for step in before]),
        Series("reversed E, for the champion", [_point(step.votes, step.against, "reversed E") for step in before], tone="bad"),
    ]
    if len(found.path) > found.judged:
        series.append(
            Series("E of votes after the verdict", [_point(s.votes, s.e_value, "E") for s in after], tone="soft", dashed=True)
        )
    needed = 1 / found.config.alpha
    return draw(
        Plot(
            id=f"evidence-cycle-{found.cycle.number}",
            title="The evidence, vote by vote",
            n=f"n = {len(found.path):,} votes that count",
            x="votes that count",
            y="E",
            series=series,
            marks=[(needed, f"boundary 1/alpha = {needed:.3g}"), (1.0, "")],
            x_range=(0, max(len(found.path), found.config.min_picks)),
            log_y=True,
        )
    )


def _point(votes: int, e_value: float, word: str) -> Point:
    return Point(votes, max(e_value, 1e-12), tip=f"vote {votes}: {word} = {e_value:.3g}")


# --- the comparisons


def _facets(compared: Sequence[Compared]) -> dict[str, Sequence[Compared]]:
    """By what may be asked for, the comparisons that came out so."""
    found = defaultdict[int | None, list[Compared]](list)
    for one in compared:
        found[None if one.vote is None else one.vote.outcome].append(one)
    return {"lost": found[-1], "won": found[1], "tied": found[0], "aside": found[None], "all": compared}


def _slices_of(one: Compared) -> tuple[tuple[str, str], ...]:
    return () if one.vote is None else one.vote.slices


def _slice(found: Review, wanted: str | None) -> tuple[str, str] | None:
    """``key:value`` as a pair; the keys are those that the gate looks at."""
    if wanted is None:
        return None
    key, colon, value = wanted.partition(":")
    if not colon or key not in found.config.slices:
        known = ", ".join(found.config.slices) or "none: gate.slices is empty"
        raise InvalidRequestError(f"a slice is key:value, of a key that gate.slices names ({known})", param="slice")
    return key, value


def _pages(n: int) -> int:
    return max(1, -(-n // COMPARISONS_ON_A_PAGE))


def _pairs(context: Context, found: Review, some: Sequence[Compared]) -> list[Pair]:
    with context.store.reading() as c:
        labelled = duels.picks_about(c, [one.group_id for one in some])
    return [_pair(one, labelled[one.group_id], found) for one in some]


def _pair(one: Compared, labelled: LabelledGroup, found: Review) -> Pair:
    group, rows = labelled.group, [row for row in labelled.feedback if row.metric == PREFERENCE_METRIC]
    turns = () if isinstance(group.prompt, str) else spoken(group.prompt)
    asked = group.prompt if isinstance(group.prompt, str) else next((t.content for t in turns[::-1] if t.role == "user"), "")
    first = min(rows, key=lambda row: (row.created_at, row.feedback_id), default=None)
    order = first.shown_order if first is not None and first.shown_order else (0, 1)
    champion = 0 if found.duel is None or group.completions[0].version == found.duel.champion else 1
    chosen = {Label.A: 0, Label.B: 1}.get(first.label or Label.SKIP) if first is not None else None
    sides = [
        Side(
            completion.version,
            "shown first" if order[0] == index else "shown second",
            completion.text[:MOST_TEXT],
            max(0, len(completion.text) - MOST_TEXT),
            chosen == index,
        )
        for index, completion in enumerate(group.completions)
    ]
    names = [f"@{completion.version}" for completion in group.completions]
    votes = tuple(_vote(row.rater_id, row.label, names, row.latency_ms, row.text) for row in rows)
    return Pair(group.group_id, asked[:MOST_TEXT], turns[:-1], (sides[champion], sides[1 - champion]), votes, _slices_of(one))


def _vote(rater: str, label: Label | None, names: Sequence[str], latency_ms: int | None, text: str | None) -> str:
    words = {
        Label.A: f"picked {names[0]}",
        Label.B: f"picked {names[1]}",
        Label.TIE: "said tie",
        Label.BOTH_BAD: "said both are bad",
        Label.SKIP: "skipped it",
    }
    told = f"{rater} {words[label or Label.SKIP]}"
    told += f" after {latency_ms / 1000:.1f} s" if latency_ms is not None else ""
    return f"{told}: “{text[:MOST_TEXT]}”" if text else told
