"""Saved views: named sets of filters over the preferences."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.errors import ConflictError, NotFoundError
from pairloop.store.schema import saved_views

LIMIT = 100
"""Views of a policy: more names nobody would find again."""


@dataclass(frozen=True, slots=True)
class SavedView:
    """``filters``: the query parameters of the page, as texts."""

    view_id: str
    name: str
    filters: Mapping[str, str]
    created_at: datetime


def insert(c: Connection, policy: str, view: SavedView) -> None:
    """ConflictError where the name is taken, or there are `LIMIT` already."""
    there = list_(c, policy)
    if any(other.name == view.name for other in there):
        raise ConflictError(f"there is a view {view.name!r} already; delete it first, or take another name")
    if len(there) >= LIMIT:
        raise ConflictError(f"there are {LIMIT} views already; delete one first")
    row = {"view_id": view.view_id, "policy": policy, "name": view.name, "filters": dict(view.filters)}
    c.execute(sa.insert(saved_views), {**row, "created_at": view.created_at})


def list_(c: Connection, policy: str) -> list[SavedView]:
    """By name."""
    rows = c.execute(sa.select(saved_views).where(saved_views.c.policy == policy).order_by(saved_views.c.name))
    return [SavedView(row.view_id, row.name, row.filters, row.created_at) for row in rows]


def delete(c: Connection, policy: str, view_id: str) -> None:
    """NotFoundError where there is none."""
    statement = sa.delete(saved_views).where(saved_views.c.policy == policy, saved_views.c.view_id == view_id)
    if c.execute(statement).rowcount == 0:
        raise NotFoundError(f"no view {view_id!r}", param="view_id")


def forget(c: Connection, subjects: Collection[str]) -> None:
    """Views that look for somebody who is erased go with them."""
    c.execute(sa.delete(saved_views).where(saved_views.c.view_id.in_(_naming(c, subjects))))


def naming(c: Connection, subjects: Collection[str]) -> int:
    """How many views look for somebody of these."""
    return len(_naming(c, subjects))


def named(c: Connection) -> set[str]:
    """Everybody whom a view looks for."""
    return {row.filters["rater"] for row in c.execute(sa.select(saved_views)) if "rater" in row.filters}


def _naming(c: Connection, subjects: Collection[str]) -> list[str]:
    return [row.view_id for row in c.execute(sa.select(saved_views)) if row.filters.get("rater") in subjects]
