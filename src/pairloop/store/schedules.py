"""The schedule that holds: the file's section, with what operators have set in the store laid over it.

What is set in the store holds for every process of the policy. Rows are appended, the newest of a setting holds; by whom, when
and why is in the audit trail.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.config import SCHEDULE_SETTINGS, Config, ScheduleSection, with_settings
from pairloop.errors import InvalidRequestError
from pairloop.store import audit as trail
from pairloop.store import triggers
from pairloop.store.audit import AuditAction
from pairloop.store.schema import audit, schedule_changes


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that an operator has set, and that holds. ``actor``: as in the audit trail."""

    name: str
    value: Any
    actor: str
    reason: str
    set_at: datetime


@dataclass(frozen=True, slots=True)
class Schedule:
    """``section`` is what holds: ``file``'s, with ``set_here`` laid over it. ``unusable``: what this version does not take, in
    words; there the file's value holds."""

    section: ScheduleSection
    file: ScheduleSection
    set_here: Mapping[str, Setting]
    unusable: tuple[str, ...] = ()


def current(c: Connection, config: Config) -> Schedule:
    """The schedule of the configured policy."""
    section, usable, unusable = config.schedule, dict[str, Setting](), list[str]()
    for setting in _newest(c, config.policy.name).values():
        try:
            section = with_settings(section, {setting.name: setting.value})
        except InvalidRequestError as error:
            unusable.append(str(error))
        else:
            usable[setting.name] = setting
    return Schedule(section, config.schedule, usable, tuple(unusable))


def set_(c: Connection, config: Config, values: Mapping[str, Any], *, actor: str, reason: str) -> Schedule:
    """Lay ``values`` over the file's, for every scheduler from its next look on; what is set so already is not set again.

    InvalidRequestError names a setting that is unknown or wrong.
    """
    before = current(c, config)
    section = with_settings(before.section, values)
    wanted = {key: getattr(section, key) for key in values}
    there = {key: setting.value for key, setting in before.set_here.items()}
    changed = {key: value for key, value in wanted.items() if key not in there or there[key] != value}
    return _record(c, config, before, changed, AuditAction.SCHEDULE_SET, actor=actor, reason=reason)


def reset(c: Connection, config: Config, settings: Collection[str] = (), *, actor: str, reason: str) -> Schedule:
    """Let the file's values hold again; of all settings where none is named. InvalidRequestError names an unknown one."""
    there = _newest(c, config.policy.name)
    for key in settings:
        if key not in SCHEDULE_SETTINGS and key not in there:
            with_settings(config.schedule, {key: None})
    wanted = [key for key in there if key in settings or not settings]
    changed = {key: getattr(config.schedule, key, None) for key in wanted}
    return _record(c, config, current(c, config), changed, AuditAction.SCHEDULE_RESET, actor=actor, reason=reason)


def unusable(c: Connection) -> list[tuple[str, str, str]]:
    """(policy, setting, what is wrong with it) of all that is set and cannot be used."""
    found = []
    for policy in c.execute(sa.select(schedule_changes.c.policy).distinct()).scalars():
        for name, setting in _newest(c, policy).items():
            try:
                with_settings(ScheduleSection(), {name: setting.value})
            except InvalidRequestError as error:
                found.append((policy, name, str(error)))
    return found


def _record(
    c: Connection,
    config: Config,
    before: Schedule,
    changed: Mapping[str, Any],
    action: AuditAction,
    *,
    actor: str,
    reason: str,
) -> Schedule:
    if not changed:
        return before
    policy = config.policy.name
    details = {key: {"old": getattr(before.section, key, None), "new": value} for key, value in changed.items()}
    seq = trail.record(c, action, actor=actor, subject=policy, reason=reason, details=details)
    shared = {"policy": policy, "is_set": action is AuditAction.SCHEDULE_SET, "audit_seq": seq}
    c.execute(sa.insert(schedule_changes), [{**shared, "setting": key, "value": value} for key, value in changed.items()])
    triggers.drop_unasked(c, policy)
    return current(c, config)


def _newest(c: Connection, policy: str) -> dict[str, Setting]:
    """What is set, by setting, as it was stored."""
    latest = sa.select(sa.func.max(schedule_changes.c.seq)).where(schedule_changes.c.policy == policy)
    statement = (
        sa.select(schedule_changes, audit.c.actor, audit.c.reason, audit.c.at)
        .join(audit)
        .where(schedule_changes.c.seq.in_(latest.group_by(schedule_changes.c.setting)), schedule_changes.c.is_set)
        .order_by(schedule_changes.c.seq)
    )
    return {row.setting: Setting(row.setting, row.value, row.actor, row.reason, row.at) for row in c.execute(statement)}
