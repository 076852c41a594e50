"""Versions, the aliases that point at them, and the history of how those moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.errors import NotFoundError
from pairloop.store import artifacts, events
from pairloop.store.schema import aliases, removed_artifacts, versions
from pairloop.store.schema import promotions as promotion_table
from pairloop.types import BASE_VERSION, Alias, Version, VersionKind

PromotionAction = Literal["promote", "rollback", "retire"]

BASE_SELECTOR = "base"
"""What follows the ``@`` of a model name that means version 0."""

_ALIAS = sa.select(aliases.c.number).where(aliases.c.policy == sa.bindparam("policy"), aliases.c.alias == sa.bindparam("alias"))
_ALIASES = sa.select(aliases.c.alias, aliases.c.number).where(aliases.c.policy == sa.bindparam("policy"))
_GET = sa.select(versions).where(versions.c.policy == sa.bindparam("policy"), versions.c.number == sa.bindparam("number"))


@dataclass(frozen=True, slots=True)
class Promotion:
    """One move of the champion alias, or a challenger's retirement: which version, from which, and why."""

    policy: str
    number: int
    previous: int | None
    action: PromotionAction
    reason: str
    cycle_id: str | None
    created_at: datetime


def insert(c: Connection, version: Version) -> None:
    """Write a version; ConflictError (from the writer) where its number is taken."""
    path = artifacts.to_row(c, version.path)
    c.execute(sa.delete(removed_artifacts).where(removed_artifacts.c.path == path))  # the same weights were made again
    c.execute(
        sa.insert(versions),
        {
            "policy": version.policy,
            "number": version.number,
            "kind": version.kind.value,
            "path": path,
            "artifact_hash": version.artifact_hash,
            "parent": version.parent,
            "dataset_id": version.dataset_id,
            "run_id": version.run_id,
            "created_at": version.created_at,
            "job_id": version.job_id,
            "step_number": version.step_number,
            "model_name": version.model_name,
            "metrics": None if version.metrics is None else dict(version.metrics),
            "record": None if version.record is None else dict(version.record),
        },
    )


def get(c: Connection, policy: str, number: int) -> Version | None:
    row = c.execute(_GET, {"policy": policy, "number": number}).first()
    return None if row is None else _version(c, row)


def list_(
    c: Connection, policy: str, *, after: int | None = None, limit: int | None = None, checkpoints: bool = False
) -> list[Version]:
    """The versions of a policy by number, the base first; those that follow number ``after``, at most ``limit``.

    The checkpoints of fine-tuning jobs are among them only where asked for.
    """
    statement = sa.select(versions).where(versions.c.policy == policy).order_by(versions.c.number).limit(limit)
    if after is not None:
        statement = statement.where(versions.c.number > after)
    if not checkpoints:
        statement = statement.where(versions.c.step_number.is_(None))
    return [_version(c, row) for row in c.execute(statement)]


def newest(c: Connection, policy: str, *, before: int | None = None, limit: int) -> list[Version]:
    """Those of ``list_`` the other way round, the highest number first; those below number ``before``."""
    this = [versions.c.policy == policy, versions.c.step_number.is_(None)]
    if before is not None:
        this.append(versions.c.number < before)
    statement = sa.select(versions).where(*this).order_by(versions.c.number.desc()).limit(limit)
    return [_version(c, row) for row in c.execute(statement)]


def count(c: Connection, policy: str) -> int:
    """How many versions ``list_`` has."""
    this = (versions.c.policy == policy, versions.c.step_number.is_(None))
    return c.execute(sa.select(sa.func.count()).select_from(versions).where(*this)).scalar_one()


def of_job(c: Connection, job_id: str) -> list[Version]:
    """What a fine-tuning job made, oldest first: its checkpoints, and at last its model."""
    statement = sa.select(versions).where(versions.c.job_id == job_id).order_by("number")
    return [_version(c, row) for row in c.execute(statement)]


def by_model_name(c: Connection, model_name: str) -> Version | None:
    """The version that a fine-tuning job gave this name (``ft:...``)."""
    row = c.execute(sa.select(versions).where(versions.c.model_name == model_name)).first()
    return None if row is None else _version(c, row)


def next_number(c: Connection, policy: str) -> int:
    """One more than the highest number; the base's number where there is none. Versions are never deleted, so never reused."""
    highest = c.execute(sa.select(sa.func.max(versions.c.number)).where(versions.c.policy == policy)).scalar()
    return BASE_VERSION if highest is None else highest + 1


def alias(c: Connection, policy: str, alias: Alias) -> int | None:
    """The version's number that the alias names now."""
    number: int | None = c.execute(_ALIAS, {"policy": policy, "alias": alias.value}).scalar()
    return number


def aliases_of(c: Connection, policy: str) -> dict[Alias, int]:
    """All aliases of a policy with the versions' numbers that they name now."""
    return {Alias(row.alias): row.number for row in c.execute(_ALIASES, {"policy": policy})}


def set_alias(c: Connection, policy: str, alias: Alias, number: int | None) -> None:
    """Point the alias at a version, or remove it with None; NotFoundError for an unknown version."""
    this = (aliases.c.policy == policy, aliases.c.alias == alias.value)
    if number is None:
        c.execute(sa.delete(aliases).where(*this))
        return
    if get(c, policy, number) is None:
        raise NotFoundError(f"no version {policy}@{number}", param="version")
    if c.execute(sa.update(aliases).where(*this).values(number=number)).rowcount == 0:
        c.execute(sa.insert(aliases), {"policy": policy, "alias": alias.value, "number": number})


def record_promotion(
    c: Connection,
    policy: str,
    *,
    number: int,
    previous: int | None,
    action: PromotionAction,
    reason: str,
    cycle_id: str | None,
    at: datetime,
) -> None:
    """Append a row to the policy's history; the alias itself is set by ``set_alias``, in the same transaction."""
    c.execute(
        sa.insert(promotion_table),
        {
            "policy": policy,
            "number": number,
            "previous": previous,
            "action": action,
            "reason": reason,
            "cycle_id": cycle_id,
            "created_at": at,
        },
    )
    events.version_changed(c, policy, number=number, previous=previous, action=action, reason=reason, at=at)


def promotions(c: Connection, policy: str) -> list[Promotion]:
    """The policy's history, oldest first."""
    rows = c.execute(sa.select(promotion_table).where(promotion_table.c.policy == policy).order_by(promotion_table.c.seq))
    return [
        Promotion(
            policy=row.policy,
            number=row.number,
            previous=row.previous,
            action=row.action,
            reason=row.reason,
            cycle_id=row.cycle_id,
            created_at=row.created_at,
        )
        for row in rows
    ]


def past_champions(history: Sequence[Promotion]) -> list[int]:
    """The champions one can go back to, oldest first, the present one last: promotions push, rollbacks pop."""
    stack = [BASE_VERSION]
    for event in history:
        if event.action == "promote":
            stack.append(event.number)
        elif event.action == "rollback" and event.number in stack:
            last = len(stack) - 1 - stack[::-1].index(event.number)
            del stack[last + 1 :]
    return stack


def forerunners(c: Connection, policy: str, n: int) -> list[int]:
    """The last ``n`` different champions before the present one, the latest first."""
    before = dict.fromkeys(reversed(past_champions(promotions(c, policy))[:-1]))
    return [number for number in before if number != alias(c, policy, Alias.CHAMPION)][:n]


def named(c: Connection, policy: str, name: str) -> Version:
    """The version that ``name`` means: a number, ``policy@number``, ``policy@base``, ``policy@`` an alias, the policy's bare
    name for its champion, or the name that a fine-tuning job gave (``ft:...``). NotFoundError for any other."""
    if name.startswith("ft:"):
        made = by_model_name(c, name)
        if made is not None:
            return made
    owner, at, selector = name.partition("@")
    if not at:
        owner, selector = (policy, name) if name.isdecimal() else (name, Alias.CHAMPION.value)
    number: int | None = None
    if selector in list(Alias):
        number = alias(c, owner, Alias(selector))
    elif selector == BASE_SELECTOR:
        number = BASE_VERSION
    elif selector.isascii() and selector.isdecimal() and len(selector) <= 9:
        number = int(selector)
    version = get(c, owner, number) if number is not None else None
    if version is None:
        raise NotFoundError(f"no version {name!r}; `pairloop versions` names those of {policy}", param="version")
    return version


def policies(c: Connection) -> list[str]:
    """The names of all policies that have a version."""
    return list(c.execute(sa.select(versions.c.policy).distinct().order_by(versions.c.policy)).scalars())


def _version(c: Connection, row: Row[Any]) -> Version:
    kind = VersionKind(row.kind)
    return Version(
        policy=row.policy,
        number=row.number,
        kind=kind,
        path=row.path if kind is VersionKind.BASE else artifacts.from_row(c, row.path),  # the base is the user's own
        artifact_hash=row.artifact_hash,
        parent=row.parent,
        dataset_id=row.dataset_id,
        run_id=row.run_id,
        created_at=row.created_at,
        job_id=row.job_id,
        step_number=row.step_number,
        model_name=row.model_name,
        metrics=row.metrics,
        record=row.record,
    )
