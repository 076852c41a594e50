"""Why feedback was not used: one reason per row, that of the last dataset which looked at it.

The datasets' own folders keep what each of them said; here it can be asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store.feedback import known_ids
from pairloop.store.groups import chunked
from pairloop.store.schema import set_aside

ROWS_AT_ONCE = 2_000
"""So many go into one transaction: whoever picks meanwhile waits some ten milliseconds."""


def parts(reasons: Iterable[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """Feedback ids with their reasons, in parts for one transaction each."""
    rows = iter(reasons)
    while part := dict(islice(rows, ROWS_AT_ONCE)):
        yield part


def put(c: Connection, dataset_id: str, reasons: Mapping[str, str]) -> None:
    """Write the reasons in place of earlier ones; rows that were erased meanwhile are passed over."""
    for ids in chunked(list(reasons)):
        forget(c, ids)
        known = known_ids(c, ids)
        rows = [{"feedback_id": one, "dataset_id": dataset_id, "reason": reasons[one]} for one in ids if one in known]
        if rows:
            c.execute(sa.insert(set_aside), rows)


def forget(c: Connection, feedback_ids: Sequence[str]) -> None:
    c.execute(sa.delete(set_aside).where(set_aside.c.feedback_id.in_(feedback_ids)))


def reasons(c: Connection, feedback_ids: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(reason, dataset_id) of those of the rows that were set aside."""
    found: dict[str, tuple[str, str]] = {}
    for ids in chunked(feedback_ids):
        rows = c.execute(sa.select(set_aside).where(set_aside.c.feedback_id.in_(ids)))
        found |= {row.feedback_id: (row.reason, row.dataset_id) for row in rows}
    return found
