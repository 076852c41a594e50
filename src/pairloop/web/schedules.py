"""The schedule over HTTP: what holds and where it comes from, setting it, and going back to the file's values."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from sqlalchemy import Connection

from pairloop.client.shapes import Page, ScheduleResource, ScheduleSetting
from pairloop.config import SCHEDULE_SETTINGS, ScheduleSection, set_by, with_settings
from pairloop.errors import InvalidRequestError
from pairloop.loop import cycle as stage
from pairloop.loop import schedule as scheduling
from pairloop.store import cycles, schedules, triggers, versions
from pairloop.store.schedules import Schedule
from pairloop.types import BASE_VERSION, Cycle
from pairloop.web.api import check_policy
from pairloop.web.audit import BY_HAND, Actor
from pairloop.web.context import Context, Here
from pairloop.web.paging import After, Limit, page
from pairloop.web.resources import seconds
from pairloop.web.wire import Body, Text512

router = APIRouter(tags=["loop"])

RUNS_AHEAD = 3


class ScheduleBody(Body):
    """What is to be set; what is not named stays as it is. `null` for `every` or `cron`: no such clock."""

    enabled: bool = True
    every: Text512 | None = Field(default=None, examples=["6h"])
    cron: Text512 | None = Field(default=None, examples=["0 3 * * *"])
    min_pairs: int = Field(default=0, examples=[300])
    reason: Text512 | None = Field(default=None, examples=["a launch: faster rounds this week"])
    dryrun: bool = False


class ResetBody(Body):
    """The settings that are to be the file's again; all of them where none is named."""

    settings: list[Text512] | None = Field(default=None, max_length=16, examples=[["min_pairs"]])
    reason: Text512 | None = Field(default=None, examples=["the launch is over"])
    dryrun: bool = False


@router.get("/v1/schedules", summary="When cycles begin, per policy")
def list_schedules(context: Here, limit: Limit = 20, after: After = None) -> Page[ScheduleResource]:
    if after is not None:
        check_policy(context, after, param="after")
        return page([], limit=limit)
    return page([_held(context)], limit=limit)


@router.get("/v1/schedules/{name}", summary="The schedule of one policy, and where each setting comes from")
def get_schedule(name: str, context: Here) -> ScheduleResource:
    check_policy(context, name)
    return _held(context)


@router.post("/v1/schedules/{name}", summary="Set when cycles begin, from now on, before what the file says")
def set_schedule(name: str, body: ScheduleBody, context: Here, actor: Actor) -> ScheduleResource:
    """It holds for every process on this database, from its next look on; with `dryrun` it is only told what would hold."""
    check_policy(context, name)
    values = {key: getattr(body, key) for key in SCHEDULE_SETTINGS if key in body.model_fields_set}
    if not values:
        raise InvalidRequestError(f"nothing to set: name at least one of {', '.join(SCHEDULE_SETTINGS)}", param="body")
    if body.dryrun:
        return _held(context, values)
    reason = body.reason or BY_HAND
    context.store.write(lambda c: schedules.set_(c, context.config, values, actor=actor, reason=reason))
    context.moved()
    return _held(context)


@router.post("/v1/schedules/{name}/reset", summary="Go back to what the file says when cycles begin")
def reset_schedule(name: str, context: Here, actor: Actor, body: ResetBody | None = None) -> ScheduleResource:
    check_policy(context, name)
    asked = body or ResetBody()
    settings, reason = asked.settings or (), asked.reason or BY_HAND
    if unknown := [key for key in settings if key not in SCHEDULE_SETTINGS]:
        text = f"{unknown[0]!r} is no setting of the schedule; there are {', '.join(SCHEDULE_SETTINGS)}"
        raise InvalidRequestError(text, param="settings")
    if asked.dryrun:
        return _held(context, {key: getattr(context.config.schedule, key) for key in settings or SCHEDULE_SETTINGS})
    context.store.write(lambda c: schedules.reset(c, context.config, settings, actor=actor, reason=reason))
    context.moved()
    return _held(context)


def _held(context: Context, instead: Mapping[str, Any] | None = None) -> ScheduleResource:
    """The schedule as it is, or as it would be with other values."""
    new_pairs = context.board.read().now.new_pairs
    with context.store.reading() as c:
        found = schedules.current(c, context.config)
        section = with_settings(found.section, instead or {})
        return _resource(context, c, found, section, new_pairs, is_dry=instead is not None)


def _resource(
    context: Context, c: Connection, found: Schedule, section: ScheduleSection, new_pairs: int, *, is_dry: bool
) -> ScheduleResource:
    name, now = context.policy_name, datetime.now(UTC)
    recent = cycles.list_(c, name, 16)
    last = recent[0] if recent else None
    begun_at, pending = _begun_at(context, c, last), triggers.peek(c, name)
    runs = [] if begun_at is None else stage.runs_ahead(section, begun_at, now, RUNS_AHEAD)
    ended = [cycle for cycle in recent if cycle.state.is_terminal]
    wait_until = scheduling.backoff(ended)
    due = begun_at and scheduling.due(
        section, now=now, last_started_at=begun_at, new_pairs=new_pairs, pending=pending, hold_until=wait_until
    )
    return ScheduleResource(
        id=name,
        policy=name,
        enabled=section.enabled,
        every=section.every,
        cron=section.cron,
        min_pairs=section.min_pairs,
        pending=pending,
        last_started_at=None if last is None else seconds(last.created_at),
        next_run_at=seconds(runs[0]) if runs else None,
        runs=[seconds(at) for at in runs],
        due=due or None,
        settings={key: _setting(context, found, section, key) for key in SCHEDULE_SETTINGS},
        dryrun=is_dry,
    )


def _setting(context: Context, found: Schedule, section: ScheduleSection, key: str) -> ScheduleSetting:
    here = found.set_here.get(key)
    return ScheduleSetting(
        value=getattr(section, key),
        file_value=getattr(found.file, key),
        origin="set" if here is not None else set_by(context.config, "schedule", key) or "default",
        set_by=None if here is None else here.actor,
        set_at=None if here is None else seconds(here.set_at),
        reason=None if here is None else here.reason,
    )


def _begun_at(context: Context, c: Connection, last: Cycle | None) -> datetime | None:
    """From when the clock counts: the last cycle, or the base where there was none."""
    if last is not None:
        return last.created_at
    base = versions.get(c, context.policy_name, BASE_VERSION)
    return None if base is None else base.created_at
