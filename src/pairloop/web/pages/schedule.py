"""The schedule: what starts the next cycle and when, setting it, the settings behind it, how long the last cycles took."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response

from pairloop.config import Config, Section, set_by
from pairloop.loop import outlook
from pairloop.loop import schedule as scheduling
from pairloop.scaffold import toml_value
from pairloop.store import counts, cycles
from pairloop.store.counts import HeldLease
from pairloop.types import Cycle, CycleState
from pairloop.web.context import Context, Here
from pairloop.web.pages.cadence import CADENCES, DAYS, cadence_of
from pairloop.web.pages.live import STAGE_WORDS, view_of
from pairloop.web.pages.rendering import PageRoute, page

SHOWN = 20
SECTIONS = ("schedule", "gate", "train")

router = APIRouter(include_in_schema=False, route_class=PageRoute)


class Part(NamedTuple):
    """How long a cycle was in a state; ``x`` and ``width`` place it in a bar that is 100 wide."""

    state: str
    word: str
    seconds: float
    x: float
    width: float


@dataclass(frozen=True, slots=True)
class Lap:
    """A cycle and how long its steps took, up to now where it is still open."""

    cycle: Cycle
    parts: Sequence[Part]
    seconds: float


class Setting(NamedTuple):
    """``origin``: the environment variable, ``file``, or None where it is the default."""

    key: str
    value: str
    about: str
    origin: str | None


@router.get("/schedule")
async def schedule_page(request: Request, context: Here) -> Response:
    status = await asyncio.to_thread(context.board.read)
    found = await asyncio.to_thread(_read, context, status.now.new_pairs)
    values = {**view_of(status), **found, "sections": settings(context.config)}
    return page(request, context, "schedule.html", title="Schedule", stage_words=STAGE_WORDS, **values)


def _read(context: Context, new_pairs: int) -> dict[str, Any]:
    now = datetime.now(UTC)
    with context.store.reading() as c:
        past = cycles.list_(c, context.policy_name, SHOWN)
        held = counts.held_leases(c)
        at = context.store.clock(c)
        ahead = outlook.look(c, context.config, new_pairs)
    rest_until = scheduling.backoff([cycle for cycle in past if cycle.state.is_terminal])
    return {
        "laps": laps(past, now),
        "lease": _lease(held, context.policy_name),
        "database_now": at,
        "rest_until": rest_until if rest_until is not None and rest_until > now else None,
        "turns_here": context.scheduler is not None,
        "ahead": ahead,
        "schedule": ahead.section,
        "cadence": cadence_of(ahead.section),
        "cadences": CADENCES,
        "days": DAYS,
        "shown": _toml,
    }


def laps(past: Sequence[Cycle], now: datetime) -> list[Lap]:
    """The cycles with their durations, drawn on the scale of the longest."""
    took = [(cycle, _spans(cycle, now)) for cycle in past]
    longest = max((sum(spans.values()) for _, spans in took), default=0.0) or 1.0
    return [Lap(cycle, _parts(spans, longest), sum(spans.values())) for cycle, spans in took]


def _spans(cycle: Cycle, now: datetime) -> dict[CycleState, float]:
    """Seconds in each state that is none of the ends."""
    spans: dict[CycleState, float] = {}
    ends = [step.created_at for step in cycle.steps[1:]] + [now]
    for step, until in zip(cycle.steps, ends, strict=True):
        if not step.state.is_terminal:
            spans[step.state] = spans.get(step.state, 0.0) + max(0.0, (until - step.created_at).total_seconds())
    return spans


def _parts(spans: Mapping[CycleState, float], longest: float) -> list[Part]:
    parts, x = [], 0.0
    for state, seconds in spans.items():
        width = 100 * seconds / longest
        parts.append(Part(state.value, STAGE_WORDS.get(state.value, state.value), seconds, round(x, 2), round(width, 2)))
        x += width
    return parts


def _lease(held: Sequence[HeldLease], policy: str) -> HeldLease | None:
    """Who turns the policy's cycle now; nobody while a cycle waits for picks, or none is open."""
    return next((lease for lease in held if lease.name == f"cycle:{policy}"), None)


def settings(config: Config) -> dict[str, list[Setting]]:
    """The settings of the file and the environment that decide about cycles, what was set first."""
    return {name: sorted(_settings(config, name), key=lambda one: one.origin is None) for name in SECTIONS}


def _settings(config: Config, name: str) -> list[Setting]:
    section: Section = getattr(config, name)
    return [
        Setting(key, _toml(getattr(section, key)), (field.description or "").replace("``", "`"), set_by(config, name, key))
        for key, field in type(section).model_fields.items()
    ]


def _toml(value: Any) -> str:
    return "–" if value is None else toml_value(value)
