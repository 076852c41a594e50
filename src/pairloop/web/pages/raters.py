"""Raters: everybody who picks, in figures, with what the tests say; and one of them, with quarantine and release."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response

from pairloop.errors import NotFoundError
from pairloop.loop import raters as desk
from pairloop.loop.raters import Overview, Profile
from pairloop.store import gold, picked, quarantines, raters
from pairloop.store.gold import Gold
from pairloop.store.picked import Picked
from pairloop.store.raters import Rater
from pairloop.types import Interval
from pairloop.web.context import Context, Here
from pairloop.web.pages.rater_plots import left_shares, picks_by_day, rater_href
from pairloop.web.pages.rendering import PageRoute, page
from pairloop.web.wire import NO_NUL

router = APIRouter(include_in_schema=False, route_class=PageRoute)

ON_A_PAGE = 50
GOLD_SHOWN = 20
DECISIONS_SHOWN = 50
WINDOWS = (1_000, 5_000)
"""How many of the newest picks the figures may be taken from."""

FLAGS: Mapping[str, tuple[str, str]] = {
    "side_bias": ("one side", "picks the first place as often as the second?"),
    "length_outlier": ("length", "picks the longer answer as often as the others?"),
    "duel_outlier": ("duels", "picks the challenger as often as the others?"),
    "instant_picks": ("instant", "picks slower than feedback.min_latency_ms?"),
}
"""Each test: the word on its chip, and its question."""

Window = Annotated[Literal["1000", "5000"], Query(description="Newest picks the figures are taken from.")]
Flag = Literal["all", "any", "none", "side_bias", "length_outlier", "duel_outlier", "instant_picks"]
Held = Literal["all", "yes", "no"]
Order = Literal["picks", "rater", "last", "agreement", "left", "speed", "instant", "flips", "gold"]
Text = Annotated[str, Query(max_length=512, pattern=NO_NUL)]
RaterId = Annotated[str, Query(min_length=1, max_length=1_024, pattern=NO_NUL)]
Before = Annotated[int | None, Query(ge=1, le=2**62)]

_LAST = math.inf  # who has no figure comes last


def _mean(interval: Interval | None, *, by: float = 1.0) -> float:
    return _LAST if interval is None else by * interval.mean


_ORDERS: Mapping[str, Callable[[Profile], Any]] = {
    "picks": lambda one: -one.picks,
    "rater": lambda one: one.rater_id,
    "last": lambda one: -one.last_at.timestamp(),
    "agreement": lambda one: _mean(one.agreement),
    "left": lambda one: _LAST if one.left is None else -abs(one.left.mean - 0.5),
    "speed": lambda one: _LAST if one.median_ms is None else one.median_ms,
    "instant": lambda one: -one.instant / max(one.picks, 1),
    "flips": lambda one: _LAST if one.flips is None else -one.flips.rate.mean,
    "gold": lambda one: _mean(one.gold),
}
"""What is odd comes first: least agreement, most one-sided, fastest, most instant, most flipped, most often wrong."""


@router.get("/raters")
async def list_of_raters(
    request: Request,
    context: Here,
    newest: Window = "5000",
    flag: Flag = "all",
    held: Held = "all",
    q: Text = "",
    sort: Order = "picks",
    number: Annotated[int, Query(ge=1, le=1_000_000, alias="page")] = 1,
) -> Response:
    seen, items = await asyncio.to_thread(_read, context, int(newest))
    chosen = [one for one in seen.profiles if _is_shown(one, seen, flag, held, q)]
    chosen.sort(key=lambda one: (_ORDERS[sort](one), one.rater_id))
    begin = (number - 1) * ON_A_PAGE
    asked = {"newest": newest, "flag": flag, "held": held, "q": q, "sort": sort}
    query = urlencode({name: value for name, value in asked.items() if value not in ("", "all")})
    return page(
        request,
        context,
        "raters.html",
        title="Raters",
        rater_href=rater_href,
        seen=seen,
        shown=chosen[begin : begin + ON_A_PAGE],
        found=len(chosen),
        begin=begin,
        number=number,
        has_more=len(chosen) > begin + ON_A_PAGE,
        asked=asked,
        query=query,
        windows=WINDOWS,
        flags=FLAGS,
        plots=[picks_by_day(seen.profiles), left_shares(seen.profiles)],
        gold=items,
        gold_shown=GOLD_SHOWN,
        decisions=seen.decisions[:DECISIONS_SHOWN],
        settings=context.config,
    )


def _read(context: Context, newest: int) -> tuple[Overview, list[Gold]]:
    seen = desk.overview(context.store, context.config, newest=newest)
    with context.store.reading() as c:
        return seen, gold.list_(c, context.policy_name, limit=GOLD_SHOWN)


def flags_of(one: Profile) -> tuple[str, ...]:
    return () if one.checked is None else one.checked.flags


def _is_shown(one: Profile, seen: Overview, flag: Flag, held: Held, q: str) -> bool:
    flags = flags_of(one)
    flagged = {"all": True, "any": bool(flags), "none": not flags}.get(flag, flag in flags)
    is_held = one.rater_id in seen.quarantined
    return flagged and held in ("all", "yes" if is_held else "no") and q.casefold() in one.rater_id.casefold()


@router.get("/raters/one")
async def one_rater(request: Request, context: Here, id: RaterId, newest: Window = "5000", before: Before = None) -> Response:
    about = await asyncio.to_thread(_read_one, context, id, int(newest), before)
    return page(
        request,
        context,
        "rater.html",
        title=f"Rater {about['rater'].rater_id}",
        rater_href=rater_href,
        flags=FLAGS,
        windows=WINDOWS,
        newest=newest,
        is_later=before is not None,
        settings=context.config,
        **about,
    )


def _read_one(context: Context, rater_id: str, newest: int, before: int | None) -> dict[str, Any]:
    policy = context.policy_name
    with context.store.reading() as c:
        stored = desk.known_id(c, context.store, policy, rater_id)
        rater = raters.get(c, policy, stored)
        held = quarantines.current(c, policy).get(stored)
        decisions = [one for one in quarantines.history(c, policy) if one.rater_id == stored][::-1]
        if rater is None and not decisions:
            raise NotFoundError(f"no rater {rater_id!r}; /raters lists those who picked lately", param="id")
        rows = picked.of_rater(c, policy, stored, before=before, limit=ON_A_PAGE + 1)
        right = {row.group_id: item.label for row in rows if (item := gold.get(c, row.group_id)) is not None}
    seen = desk.overview(context.store, context.config, newest=newest)
    one = next((profile for profile in seen.profiles if profile.rater_id == stored), None)
    is_alone = one is None
    if is_alone:  # nothing of late: by what they said then
        one = desk.alone(context.store, context.config, stored, newest=newest)
    return _about(rater or Rater(stored, 0, decisions[-1].created_at, decisions[0].created_at), one, rows) | {
        "seen": seen,
        "is_alone": is_alone,
        "pool": desk.pool_for(context.config, stored).value,
        "held": held,
        "decisions": decisions,
        "right": right,
    }


def _about(rater: Rater, one: Profile | None, rows: Sequence[Picked]) -> dict[str, Any]:
    shown = rows[:ON_A_PAGE]
    return {
        "rater": rater,
        "one": one,
        "rows": shown,
        "older": shown[-1].seq if len(rows) > ON_A_PAGE else None,
        "plots": [] if one is None else [picks_by_day([one])],
    }
