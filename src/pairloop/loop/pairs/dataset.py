"""The stage: the store's new labelled groups become one hash-named snapshot with its lineage."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop import faults
from pairloop.config import Config
from pairloop.loop.pairs.fresh import KINDS
from pairloop.loop.pairs.staging import SET_ASIDE_FILE, Staged, staged
from pairloop.policy.protocols import Tokens
from pairloop.store import Store, datasets, feedback, marks, quarantines, set_aside, versions
from pairloop.store.schema import completions as completion_table
from pairloop.store.schema import feedback as feedback_table
from pairloop.store.schema import groups as group_table
from pairloop.types import BASE_VERSION, SCORE_METRIC, Alias, Dataset, GroupKind, Pool

logger = logging.getLogger(__name__)


def run(store: Store, tokens: Tokens | None, config: Config, *, cycle_id: str | None, parent: int) -> Dataset | None:
    """Compile what ``parent`` has not learned from yet, and record it; None where no pair can be trained on.

    Where the reasons for None are wanted: ``staged``, then ``record``.
    """
    with staged(store, tokens, config, parent=parent) as new:
        assert new is not None, "nobody stops it"
        return record(store, config, new, cycle_id=cycle_id)


def record(store: Store, config: Config, new: Staged, *, cycle_id: str | None) -> Dataset | None:
    """Publish the staged snapshot, with its lineage; None where no pair can be trained on.

    The folder holds ``train.jsonl`` and ``heldout.jsonl`` (``formats.snapshot``), ``set_aside.jsonl`` and the manifest. The
    same evidence gives the same dataset id; one that is recorded already is returned as it is.
    """
    logger.info("pairs: %s; set aside %s", new.text, new.dropped)
    if not new.n_train:
        return None
    artifact = store.artifacts.publish(new.folder, _manifest(config, new))
    dataset = Dataset(
        dataset_id=f"dataset_{artifact.hash[:32]}",
        policy=config.policy.name,
        path=str(artifact.path),
        n_train=new.n_train,
        n_heldout=new.n_heldout,
        counts=new.counts,
        dropped=new.dropped,
        created_at=datetime.now(UTC),
    )
    faults.reach("dataset.published")

    def insert(c: Connection) -> Dataset:
        recorded = datasets.get(c, dataset.dataset_id)
        if recorded is not None:
            return recorded
        datasets.insert(c, dataset, feedback_seq=new.feedback_seq, cycle_id=cycle_id, pairs=new.lineage())
        return dataset

    recorded = store.write(insert)
    _tell_reasons(store, recorded, new)
    return recorded


def _tell_reasons(store: Store, dataset: Dataset, new: Staged) -> None:
    """What this dataset left out has its reason from now on, and what it uses has none any more."""
    with store.reading() as c:
        learned = datasets.learned_from(c, dataset.policy, new.parent)
    for part in set_aside.parts(set_aside_rows(store.artifacts.local(dataset.path))):
        put = partial(set_aside.put, dataset_id=dataset.dataset_id, reasons=part, learned_from=learned)
        store.write(put)
    for used in set_aside.batches(one for _, _, feedback_ids in new.lineage() for one in feedback_ids):
        store.write(partial(set_aside.forget, feedback_ids=used))


class PairCount(NamedTuple):
    """About how many, and what they were counted ``of``: another count of the same finds as many. None where it may not."""

    number: int
    of: tuple[int, int, int, frozenset[str]] | None


def count_new(store: Store, config: Config) -> int:
    """About how many new pairs a cycle would find: what came since the last cycle's snapshot, without reading any text.

    A snapshot that was built by hand, of which nothing was trained, changes nothing.

    Decisive picks of the train pool, groups whose scores differ, and, where a verifier or judge is configured, the groups
    that it has yet to label.
    """
    return counted_new(store, config, None).number


def counted_new(store: Store, config: Config, earlier: PairCount | None) -> PairCount:
    """`count_new`, or what it said ``earlier`` where nothing was written since that it counts from.

    That takes a tenth of a second where 90,000 picks wait. What an erasure took away is missed until the next pick.
    """
    policy, now = config.policy.name, datetime.now(UTC)
    with store.reading() as c:
        last = datasets.last_of_a_cycle(c, policy)
        champion = versions.alias(c, policy, Alias.CHAMPION) or BASE_VERSION
        after_seq = max(last.feedback_seq if last else 0, datasets.used_seq(c, policy, champion))
        held = quarantines.current(c, policy)
        of = (after_seq, feedback.max_seq(c, policy), marks.max_seq(c, policy), frozenset(held))
        if earlier is not None and earlier.of == of:
            return earlier
        found = feedback.count_new_picks(c, policy, after_seq=after_seq, pool=Pool.TRAIN, quarantined=held)
        found += _count_contrasts(c, policy, after_seq)
        if config.label.verifier is not None or config.label.judge_url is not None:
            after = timedelta(seconds=config.label.after_s)
            found += _count_unlabelled(c, policy, since=last.created_at - after if last else None, before=now - after)
            return PairCount(found, None)  # these become due as time goes by
    return PairCount(found, of)


def set_aside_rows(folder: Path) -> Iterator[tuple[str, str]]:
    """The id of each feedback row that the snapshot in ``folder`` did not use, and its one reason."""
    with (folder / SET_ASIDE_FILE).open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row["feedback_id"], row["reason"]


def _manifest(config: Config, new: Staged) -> dict[str, Any]:
    rules = asdict(new.rules)
    rules["staleness"] = {str(version): steps for version, steps in (new.rules.staleness or {}).items()}
    return {
        "kind": "dataset",
        "policy": config.policy.name,
        "parent": new.parent,
        "feedback_after_seq": new.after_seq,
        "feedback_seq": new.feedback_seq,
        "counts": new.counts,
        "dropped": new.dropped,
        "rules": rules,
    }


def _count_contrasts(c: Connection, policy: str, after_seq: int) -> int:
    """Train pool groups in which one scorer gave different scores, newer than ``after_seq``. Linear in the new rows."""
    scored = (
        sa.select(feedback_table.c.group_id)
        .select_from(feedback_table.join(group_table))
        .where(
            feedback_table.c.policy == policy,
            feedback_table.c.seq > after_seq,
            feedback_table.c.metric == SCORE_METRIC,
            group_table.c.pool == Pool.TRAIN.value,
            group_table.c.kind.in_([kind.value for kind in KINDS]),
        )
        .group_by(feedback_table.c.group_id, feedback_table.c.source, feedback_table.c.rater_id)
        .having(sa.func.count(sa.distinct(sa.cast(feedback_table.c.value, sa.Text))) > 1)
    )
    return c.execute(sa.select(sa.func.count()).select_from(scored.subquery())).scalar_one()


def _count_unlabelled(c: Connection, policy: str, *, since: datetime | None, before: datetime) -> int:
    """Train pool groups old enough to be labelled, and too young for the last cycle to have labelled them."""
    is_comparison = sa.exists().where(completion_table.c.group_id == group_table.c.group_id, completion_table.c.position == 1)
    has_feedback = sa.exists().where(feedback_table.c.group_id == group_table.c.group_id)
    statement = (
        sa.select(sa.func.count())
        .select_from(group_table)
        .where(
            group_table.c.policy == policy,
            group_table.c.pool == Pool.TRAIN.value,
            group_table.c.kind == GroupKind.TRAIN.value,
            group_table.c.created_at < before,
            is_comparison,
            ~has_feedback,
        )
    )
    if since is not None:
        statement = statement.where(group_table.c.created_at >= since)
    return c.execute(statement).scalar_one()
