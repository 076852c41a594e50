"""Traces of people who run the loop: their name in the audit trail, on votes that they relabelled, as a removed account.

What they did and why stays: it is the loop's own record. It is told of nobody any more.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection

from pairloop.errors import ConflictError
from pairloop.store.schema import accounts, audit, feedback
from pairloop.store.subjects import ACCOUNT, KINDS, as_operators
from pairloop.types import RELABELLED_TAG

NOBODY = "erased"


def refuse_while_active(c: Connection, subjects: Collection[str]) -> None:
    """ConflictError where one of them is an account that can still sign in: it would leave traces again."""
    name = c.execute(sa.select(accounts.c.name).where(_is_theirs(subjects), accounts.c.removed_at.is_(None))).scalar()
    if name is not None:
        raise ConflictError(f"account {name!r} can still sign in; remove it first (`pairloop accounts remove {name}`)")


def named(c: Connection) -> Iterator[str]:
    """Whoever acted, every account, and what else the trail tells about a key or an address. Who relabelled has acted."""
    yield from c.execute(sa.select(audit.c.actor).distinct()).scalars()
    told = sa.or_(*(audit.c.subject.like(f"{kind}%") for kind in KINDS))
    yield from c.execute(sa.select(audit.c.subject).where(told).distinct()).scalars()
    yield from (f"{ACCOUNT}{name}" for name in c.execute(sa.select(accounts.c.name)).scalars())


def count(c: Connection, subjects: Collection[str]) -> int:
    """How many rows name one of them. Reads the audit trail, and votes with tags."""
    names = as_operators(subjects)
    if not names:
        return 0
    acts = sa.select(sa.func.count()).select_from(audit).where(sa.or_(audit.c.actor.in_(names), audit.c.subject.in_(names)))
    known = sa.select(sa.func.count()).select_from(accounts).where(_is_theirs(names))
    return c.execute(acts).scalar_one() + c.execute(known).scalar_one() + len(_relabelled(c, names))


def forget(c: Connection, subjects: Collection[str], at: datetime) -> None:
    """Take their names away. The account's row stays without its name: what was locked once stays locked.

    ``at``: when they were erased. An account of before, which a backup has brought back, was removed then, and is again.
    """
    names = as_operators(subjects)
    if not names:
        return
    for column in (audit.c.actor, audit.c.subject):
        c.execute(sa.update(audit).where(column.in_(names)).values({column.name: NOBODY}))
    for feedback_id, tags in _relabelled(c, names).items():
        told = {**tags, RELABELLED_TAG: NOBODY}
        c.execute(sa.update(feedback).where(feedback.c.feedback_id == feedback_id).values(tags=told))
    was_removed = accounts.c.removed_at.is_(None) & (accounts.c.created_at < at)
    c.execute(sa.update(accounts).where(_is_theirs(names), was_removed).values(password_hash="", removed_at=at))
    gone = {"name": f"{NOBODY}-{secrets.token_hex(8)}"}
    c.execute(sa.update(accounts).where(_is_theirs(names), accounts.c.removed_at.is_not(None)).values(gone))


def _is_theirs(subjects: Collection[str]) -> ColumnElement[bool]:
    return accounts.c.name.in_([one.removeprefix(ACCOUNT) for one in as_operators(subjects) if one.startswith(ACCOUNT)])


def _relabelled(c: Connection, names: Collection[str]) -> dict[str, dict[str, str]]:
    """The tags of the votes that one of them relabelled, by feedback id."""
    tagged = sa.cast(feedback.c.tags, sa.Text).like(f"%{RELABELLED_TAG}%")
    rows = c.execute(sa.select(feedback.c.feedback_id, feedback.c.tags).where(tagged))
    return {row.feedback_id: row.tags for row in rows if row.tags.get(RELABELLED_TAG) in names}
