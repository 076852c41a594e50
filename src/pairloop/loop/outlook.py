"""When the next cycle begins, as the schedule stands or would stand: what is told and shown before anything is set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

from pairloop.config import SCHEDULE_SETTINGS, Config, ScheduleSection, set_by, with_settings
from pairloop.loop import schedule as scheduling
from pairloop.loop.cycle import runs_ahead
from pairloop.store import cycles, schedules, triggers, versions
from pairloop.store.schedules import Schedule
from pairloop.types import BASE_VERSION

RUNS_AHEAD = 3
SET = "set"
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Origin:
    """A setting beside the file's own value. ``origin``: ``default``, ``file``, the environment variable, or ``set``; then by
    whom, when and why."""

    value: bool | int | str | None
    file_value: bool | int | str | None
    origin: str
    set_by: str | None = None
    set_at: datetime | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Outlook:
    """``runs``: the next times of the clock, if each cycle begins on time. ``due``: why one begins once none is open."""

    section: ScheduleSection
    settings: Mapping[str, Origin]
    unusable: tuple[str, ...]
    pending: str | None
    last_started_at: datetime | None
    runs: tuple[datetime, ...]
    due: str | None
    text: str


def look(c: Connection, config: Config, new_pairs: int, instead: Mapping[str, Any] | None = None) -> Outlook:
    """The outlook; with ``instead`` under other settings. InvalidRequestError names one that is unknown or wrong."""
    name, now = config.policy.name, datetime.now(UTC)
    found = schedules.current(c, config)
    section = with_settings(found.section, instead or {})
    recent, base = cycles.list_(c, name, 16), versions.get(c, name, BASE_VERSION)
    last_at = recent[0].created_at if recent else None
    begun_at = last_at or (None if base is None else base.created_at)
    pending = triggers.peek(c, name)
    runs, due = list[datetime](), None
    if begun_at is not None:
        runs = runs_ahead(section, begun_at, now, RUNS_AHEAD)
        rest_until = scheduling.backoff([cycle for cycle in recent if cycle.state.is_terminal])
        due = scheduling.due(
            section, now=now, last_started_at=begun_at, new_pairs=new_pairs, pending=pending, hold_until=rest_until
        )
    settings = {key: _origin(config, found, section, key) for key in SCHEDULE_SETTINGS}
    text = _text(section, runs, due, new_pairs)
    return Outlook(section, settings, found.unusable, pending, last_at, tuple(runs), due, text)


def _origin(config: Config, found: Schedule, section: ScheduleSection, key: str) -> Origin:
    value, file_value, here = getattr(section, key), getattr(found.file, key), found.set_here.get(key)
    if here is None:
        return Origin(value, file_value, set_by(config, "schedule", key) or DEFAULT)
    return Origin(value, file_value, SET, here.actor, here.set_at, here.reason)


def _text(section: ScheduleSection, runs: list[datetime], due: str | None, new_pairs: int) -> str:
    """One sentence for people."""
    if due is not None:
        return f"A cycle begins as soon as none is open: {due}."
    if not section.enabled:
        return "Paused: a cycle begins only when somebody asks for one."
    ways = []
    if runs:
        first, *rest = (f"{at:%Y-%m-%d %H:%M}" for at in runs)
        ways.append(f"on {first} UTC" + (f" (then {', '.join(rest)})" if rest else ""))
    elif section.every is not None or section.cron is not None:
        ways.append("by the clock, which counts from the first start")
    if section.min_pairs:
        ways.append(f"at {section.min_pairs:,} new pairs (now {new_pairs:,})")
    return f"The next cycle begins {', or '.join(ways) or 'only when somebody asks for one'}."
