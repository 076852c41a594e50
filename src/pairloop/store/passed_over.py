"""Groups that were excluded when a version was trained, and that an operator includes again: their turn is still to come."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store import datasets
from pairloop.store.feedback import is_latest
from pairloop.store.groups import chunked
from pairloop.store.marks import Mark, is_marked
from pairloop.store.schema import dataset_pairs, feedback, marks, pair_groups, set_aside


def groups_of(c: Connection, policy: str, parent: int) -> frozenset[str]:
    """Those of which neither ``parent`` nor an ancestor learned, with a counting vote that no dataset has left out since.

    Linear in the groups that were ever included again.
    """
    said = marks.alias("said")
    left_out = sa.exists().where(set_aside.c.feedback_id == feedback.c.feedback_id)
    undecided = sa.exists().where(feedback.c.group_id == said.c.group_id, is_latest(), ~left_out)
    statement = (
        sa.select(said.c.group_id)
        .distinct()
        .where(said.c.policy == policy, said.c.mark == Mark.EXCLUDED.value, said.c.is_set.is_(False))
        .where(~is_marked(said.c.group_id, Mark.EXCLUDED), undecided)
    )
    included = frozenset(c.execute(statement).scalars())
    return included - _learned_by(c, policy, parent, included) if included else included


def _learned_by(c: Connection, policy: str, parent: int, group_ids: frozenset[str]) -> set[str]:
    """Those with a pair in what the version or an ancestor was trained on."""
    trained_on = datasets.learned_from(c, policy, parent)
    holding = pair_groups.join(dataset_pairs, dataset_pairs.c.pair_id == pair_groups.c.pair_id)
    held = sa.select(pair_groups.c.group_id, dataset_pairs.c.dataset_id).select_from(holding)
    learned = set[str]()
    for ids in chunked(list(group_ids)):
        for group_id, dataset_id in c.execute(held.where(pair_groups.c.group_id.in_(ids))):
            learned |= {group_id} if dataset_id in trained_on else set()
    return learned
