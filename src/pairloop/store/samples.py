"""What versions said to prompts of their offline report, beside the champion's answers: kept to be read, counted nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store.groups import ERASED_HASH, chunked, load_ids, shadow_id
from pairloop.store.schema import groups, samples
from pairloop.types import Prompt


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer each of a version (``ours``) and of the champion of then (``theirs``, version ``against``) to a prompt.

    ``group_id``: the request that the prompt was taken from, whose erasure takes this, too.
    """

    group_id: str
    against: int
    ours: str
    theirs: str


def put(c: Connection, policy: str, number: int, rows: Sequence[Sample], at: datetime) -> None:
    """Keep these of a version, in place of those of an earlier report on it; not of requests that were erased meanwhile."""
    c.execute(sa.delete(samples).where(samples.c.policy == policy, samples.c.number == number))
    wanted = [row.group_id for row in rows]
    there = sa.select(groups.c.group_id).where(groups.c.group_id.in_(wanted), groups.c.prompt_hash != ERASED_HASH)
    known = set(c.execute(there).scalars())
    values = [
        {
            "policy": policy,
            "number": number,
            "position": position,
            "group_id": row.group_id,
            "against": row.against,
            "ours": row.ours,
            "theirs": row.theirs,
            "created_at": at,
        }
        for position, row in enumerate(rows)
        if row.group_id in known
    ]
    if values:
        c.execute(sa.insert(samples), values)


def of_version(c: Connection, policy: str, number: int) -> list[tuple[Prompt, Sample]]:
    """Those that are kept of a version, each with its prompt."""
    mine = sa.select(samples).where(samples.c.policy == policy, samples.c.number == number)
    rows = [Sample(row.group_id, row.against, row.ours, row.theirs) for row in c.execute(mine.order_by(samples.c.position))]
    prompts = {group.group_id: group.prompt for group in load_ids(c, [row.group_id for row in rows])}
    return [(prompts[row.group_id], row) for row in rows]


def forget(c: Connection, group_ids: Sequence[str]) -> None:
    """Of groups that are erased, and of what was said in their shadow: an answer repeats what it was asked."""
    for ids in chunked([*group_ids, *map(shadow_id, group_ids)]):
        c.execute(sa.delete(samples).where(samples.c.group_id.in_(ids)))
