"""Why feedback was not used: one reason per row, that of the last dataset which decided about it.

A dataset that uses a row takes its reason away. Of what its parent has learned from it decides nothing: that is context.

The datasets' own folders keep what each of them said; here it can be asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store.groups import chunked
from pairloop.store.schema import dataset_pairs, feedback, pair_feedback, set_aside

ROWS_AT_ONCE = 2_000
"""So many go into one transaction: whoever picks meanwhile waits some ten milliseconds."""


def parts(reasons: Iterable[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """Feedback ids with their reasons, in parts for one transaction each."""
    rows = iter(reasons)
    while part := dict(islice(rows, ROWS_AT_ONCE)):
        yield part


def batches(feedback_ids: Iterable[str]) -> Iterator[list[str]]:
    """Feedback ids in parts for one transaction each."""
    rows = iter(feedback_ids)
    while part := list(islice(rows, ROWS_AT_ONCE)):
        yield part


def put(c: Connection, dataset_id: str, reasons: Mapping[str, str], *, learned_from: Collection[str]) -> None:
    """Write the reasons in place of earlier ones; rows that were erased meanwhile are passed over.

    So are those with a pair in the datasets that the parent has ``learned_from``: it had its turn with them.
    """
    held = pair_feedback.join(dataset_pairs, dataset_pairs.c.pair_id == pair_feedback.c.pair_id)
    mine = (pair_feedback.c.feedback_id == feedback.c.feedback_id, dataset_pairs.c.dataset_id.in_(learned_from))
    is_learned = sa.exists().select_from(held).where(*mine)
    for ids in chunked(list(reasons)):
        decided = sa.select(feedback.c.feedback_id).where(feedback.c.feedback_id.in_(ids), ~is_learned)
        told = list(c.execute(decided).scalars())
        if told:
            forget(c, told)
            c.execute(
                sa.insert(set_aside), [{"feedback_id": one, "dataset_id": dataset_id, "reason": reasons[one]} for one in told]
            )


def forget(c: Connection, feedback_ids: Sequence[str]) -> None:
    for ids in chunked(feedback_ids):
        c.execute(sa.delete(set_aside).where(set_aside.c.feedback_id.in_(ids)))


def ask_again(c: Connection, group_ids: Sequence[str], reason: str) -> None:
    """Votes about these groups that were left out for this reason are left out no more: they wait for the next dataset."""
    for ids in chunked(group_ids):
        theirs = sa.select(feedback.c.feedback_id).where(feedback.c.group_id.in_(ids))
        c.execute(sa.delete(set_aside).where(set_aside.c.feedback_id.in_(theirs), set_aside.c.reason == reason))


def reasons(c: Connection, feedback_ids: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(reason, dataset_id) of those of the rows that were set aside."""
    found: dict[str, tuple[str, str]] = {}
    for ids in chunked(feedback_ids):
        rows = c.execute(sa.select(set_aside).where(set_aside.c.feedback_id.in_(ids)))
        found |= {row.feedback_id: (row.reason, row.dataset_id) for row in rows}
    return found
