"""Gold items: which comparisons have a known answer, by an operator's word or because all who picked agreed."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.errors import ConflictError, NotFoundError
from pairloop.loop.raters import desk
from pairloop.store import Store, audit, gold, groups
from pairloop.store.audit import AuditAction
from pairloop.store.gold import Agreed, Gold, Origin
from pairloop.types import Group, GroupKind, Label

COMPARISON = 2


def mark(store: Store, config: Config, group_id: str, label: Label, reason: str, *, actor: str) -> Gold:
    """Say which answer of a comparison is the better one, A or B: from then on the queue shows it as gold.

    NotFoundError for an unknown comparison, ConflictError for one that is gold already, of a duel, or not of two answers.
    """
    reason = store.kept_words(reason)

    def commit(c: Connection) -> Gold:
        group = groups.get(c, group_id)
        if group is None or group.policy != config.policy.name:
            raise NotFoundError(f"no inference {group_id!r}", param="inference_id")
        _check(group)
        if gold.get(c, group_id) is not None:
            raise ConflictError(f"{group_id} is a gold item already; take it back first to say something else")
        return _add(c, config, group_id, label, Origin.OPERATOR, reason, actor)

    return store.write(commit)


def mark_unanimous(
    store: Store, config: Config, *, min_raters: int, limit: int, reason: str, actor: str, dryrun: bool = False
) -> list[Agreed]:
    """Make gold of up to ``limit`` comparisons from which at least so many people picked the same answer, and none another."""
    reason = store.kept_words(reason)
    with store.reading() as c:
        found = gold.unanimous(c, config.policy.name, min_raters=min_raters, newest=desk.NEWEST, limit=limit)
    if dryrun or not found:
        return found

    def commit(c: Connection) -> list[Agreed]:
        new = [one for one in found if gold.get(c, one.group_id) is None]
        for one in new:
            _add(c, config, one.group_id, one.label, Origin.UNANIMOUS, f"{reason} ({one.raters} raters agreed)", actor)
        return new

    return store.write(commit)


def take_back(store: Store, config: Config, group_id: str, reason: str, *, actor: str) -> Gold:
    """The comparison is no gold any more; what was said of it stays, and counts no more. NotFoundError where it is none."""
    reason = store.kept_words(reason)

    def commit(c: Connection) -> Gold:
        held = gold.get(c, group_id)
        if held is None or held.policy != config.policy.name:
            raise NotFoundError(f"no gold item {group_id!r}", param="inference_id")
        gold.remove(c, group_id)
        audit.record(c, AuditAction.GOLD_REMOVE, actor=actor, subject=group_id, reason=reason, details={"label": held.label})
        return held

    return store.write(commit)


def _add(c: Connection, config: Config, group_id: str, label: Label, origin: Origin, reason: str, actor: str) -> Gold:
    made = Gold(group_id, config.policy.name, label, origin, reason, datetime.now(UTC))
    gold.insert(c, made)
    details = {"label": label.value, "origin": origin.value}
    audit.record(c, AuditAction.GOLD_ADD, actor=actor, subject=group_id, reason=reason, details=details)
    return made


def _check(group: Group) -> None:
    if group.kind is GroupKind.DUEL:
        raise ConflictError(f"{group.group_id} is of a duel: whoever picks from it is told its versions")
    if group.is_erased or group.is_abandoned or len(group.completions) != COMPARISON:
        raise ConflictError(f"{group.group_id} is no comparison of two whole answers")
    if group.completions[0].text == group.completions[1].text:
        raise ConflictError(f"both answers of {group.group_id} are the same: neither is better")
