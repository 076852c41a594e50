"""Label: groups that nobody judged get feedback rows from the configured verifier, or from a judge asked in both orders.

A verifier scores every completion (rows of metric ``score``, source ``code``); a judge compares the two answers of a
comparison (rows of metric ``preference``, source ``llm``). Where either fails there is no row, but a counted and logged error:
the group stays without feedback and is tried again next time. Left out on purpose: labelling what a person has judged.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection

from pairloop import faults
from pairloop.config import Config
from pairloop.judge import PairwiseJudge, Verifier, VerifierError, load_verifier, messages_of
from pairloop.store import Store, feedback, groups
from pairloop.store.ids import new_id
from pairloop.types import PREFERENCE_METRIC, SCORE_METRIC, Feedback, Group, GroupKind, Source

logger = logging.getLogger(__name__)

LIMIT = 20_000
"""Groups that one run looks at, oldest first."""
BATCH = 64
"""Groups labelled between two writes: what a killed run loses."""
JUDGE_THREADS = 8
GIVE_UP_AFTER = 2 * BATCH
"""Errors in a row after which the rest is left for the next run: the labeller is down, not unlucky."""

_KINDS = (GroupKind.TRAIN, GroupKind.HELDOUT)
_COMPARISON = 2


@dataclass(frozen=True, slots=True)
class LabelRecord:
    """Groups labelled, groups on which the labeller failed (``reasons`` says why), and groups left alone."""

    labelled: int = 0
    errors: int = 0
    skipped: int = 0
    flipped: int = 0
    """Of the labelled: ties because the judge changed its mind with the order."""
    labeller: str | None = None
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Labelled:
    """What a labeller made of one group: rows, or the reason of its failure; neither where the group is not for it."""

    rows: tuple[Feedback, ...] = ()
    error: str | None = None


_Labeller = Callable[[Sequence[Group]], list[_Labelled]]


def run(store: Store, config: Config, *, limit: int = LIMIT) -> LabelRecord:
    """Label at most ``limit`` groups of both pools that have two answers or more, no feedback, and are ``label.after`` old.

    Rows are durable batch by batch. ConfigError where the configured labeller cannot be had.
    """
    if config.label.verifier is None and config.label.judge_url is None:
        return LabelRecord()
    before = datetime.now(UTC) - timedelta(seconds=config.label.after_s)
    with store.reading() as c:
        waiting = groups.unlabelled(
            c, config.policy.name, pool=None, before=before, limit=limit, kinds=_KINDS, min_completions=_COMPARISON
        )
    with _labeller(config) as (name, label):
        return _run(store, waiting, name, label)


def _run(store: Store, waiting: list[Group], name: str, label: _Labeller) -> LabelRecord:
    tally: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    in_a_row = 0
    for start in range(0, len(waiting), BATCH):
        if in_a_row >= GIVE_UP_AFTER:
            tally["skipped"] += len(waiting) - start
            logger.error("label: %s failed %d times in a row; %d groups wait", name, in_a_row, len(waiting) - start)
            break
        made = label(waiting[start : start + BATCH])
        _write(store, [row for one in made for row in one.rows])
        for group, one in zip(waiting[start : start + BATCH], made, strict=True):
            in_a_row = in_a_row + 1 if one.error is not None else 0
            if one.error is not None:
                reasons[one.error] += 1
                logger.warning("label: %s: %s", group.group_id, one.error)
            tally["errors" if one.error is not None else "labelled" if one.rows else "skipped"] += 1
            tally["flipped"] += any(row.tags.get("flipped") == "true" for row in one.rows)
    return LabelRecord(tally["labelled"], tally["errors"], tally["skipped"], tally["flipped"], name, dict(reasons))


def _write(store: Store, rows: Sequence[Feedback]) -> None:
    def insert(c: Connection) -> None:
        for row in rows:
            feedback.insert(c, row)

    if rows:
        store.write(insert)
        faults.reach("label.after_batch")


@contextmanager
def _labeller(config: Config) -> Iterator[tuple[str, _Labeller]]:
    """The configured labeller's name, and the labeller itself."""
    if config.label.verifier is not None:
        verifier = load_verifier(config.label.verifier)
        yield verifier.name, lambda batch: [_score(verifier, group) for group in batch]
        return
    with PairwiseJudge.configured(config.label) as judge, ThreadPoolExecutor(JUDGE_THREADS, "judge") as threads:
        yield judge.model, lambda batch: list(threads.map(lambda group: _compare(judge, group), batch))


def score(verifier: Verifier, group: Group) -> tuple[Feedback, ...]:
    """One score per completion; VerifierError where the verifier failed on any of them."""
    messages, now = messages_of(group.prompt), datetime.now(UTC)
    scores = [verifier(messages, completion.text) for completion in group.completions]
    return tuple(
        Feedback(
            feedback_id=new_id("feedback"),
            group_id=group.group_id,
            metric=SCORE_METRIC,
            source=Source.CODE,
            rater_id=verifier.name,
            created_at=now,
            choice_index=index,
            value=value,
        )
        for index, value in enumerate(scores)
    )


def _score(verifier: Verifier, group: Group) -> _Labelled:
    try:
        return _Labelled(score(verifier, group))
    except VerifierError as error:
        return _Labelled(error=str(error))


def _compare(judge: PairwiseJudge, group: Group) -> _Labelled:
    """The judge's pick; groups that are no comparison are left alone."""
    if len(group.completions) != _COMPARISON:
        return _Labelled()
    judgement = judge.compare(messages_of(group.prompt), *(completion.text for completion in group.completions))
    label = judgement.outcome.label
    if label is None:
        return _Labelled(error=judgement.reason or "the judge failed")
    row = Feedback(
        feedback_id=new_id("feedback"),
        group_id=group.group_id,
        metric=PREFERENCE_METRIC,
        source=Source.LLM,
        rater_id=judge.model,
        created_at=datetime.now(UTC),
        label=label,
        tags={"flipped": "true"} if judgement.flipped else {},
    )
    return _Labelled((row,))
