"""The schedule over HTTP: what holds and where it comes from, setting it, and going back to the file's values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter
from pydantic import Field

from pairloop.client.shapes import Page, ScheduleResource, ScheduleSetting
from pairloop.config import SCHEDULE_SETTINGS
from pairloop.errors import InvalidRequestError
from pairloop.loop import outlook
from pairloop.loop.outlook import Origin
from pairloop.store import schedules
from pairloop.web.api import check_policy
from pairloop.web.audit import BY_HAND, Actor
from pairloop.web.context import Context, Here
from pairloop.web.paging import After, Limit, page
from pairloop.web.resources import seconds
from pairloop.web.wire import Body, Text512

router = APIRouter(tags=["loop"])


class ScheduleBody(Body):
    """What is to be set; what is not named stays as it is. `null` for `every` or `cron`: no such clock."""

    enabled: bool = True
    every: Text512 | None = None
    cron: Text512 | None = None
    min_pairs: int = 0
    reason: Text512 | None = None
    dryrun: bool = False


class ResetBody(Body):
    """The settings that are to be the file's again; all of them where none is named."""

    settings: list[Text512] | None = Field(default=None, max_length=16)
    reason: Text512 | None = None
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
    reason = context.store.kept_words(body.reason or BY_HAND)
    context.store.write(lambda c: schedules.set_(c, context.config, values, actor=actor, reason=reason))
    context.moved()
    return _held(context)


@router.post("/v1/schedules/{name}/reset", summary="Go back to what the file says when cycles begin")
def reset_schedule(name: str, context: Here, actor: Actor, body: ResetBody | None = None) -> ScheduleResource:
    check_policy(context, name)
    asked = body or ResetBody()
    settings, reason = asked.settings or (), context.store.kept_words(asked.reason or BY_HAND)
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
        found = outlook.look(c, context.config, new_pairs, instead)
    section, started_at = found.section, found.last_started_at
    return ScheduleResource(
        id=context.policy_name,
        policy=context.policy_name,
        enabled=section.enabled,
        every=section.every,
        cron=section.cron,
        min_pairs=section.min_pairs,
        pending=found.pending,
        last_started_at=None if started_at is None else seconds(started_at),
        next_run_at=seconds(found.runs[0]) if found.runs else None,
        runs=[seconds(at) for at in found.runs],
        due=found.due,
        text=found.text,
        settings={key: _setting(one) for key, one in found.settings.items()},
        dryrun=instead is not None,
    )


def _setting(one: Origin) -> ScheduleSetting:
    return ScheduleSetting(
        value=one.value,
        file_value=one.file_value,
        origin=one.origin,
        set_by=one.set_by,
        set_at=None if one.set_at is None else seconds(one.set_at),
        reason=one.reason,
    )
