"""The stage: the store's new labelled groups become one hash-named snapshot with its lineage."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop import faults
from pairloop.config import Config
from pairloop.errors import InvalidRequestError
from pairloop.formats import snapshot
from pairloop.formats.snapshot import HELDOUT_FILE, TRAIN_FILE
from pairloop.loop.pairs.builder import Refuse
from pairloop.loop.pairs.rows import compile_rows
from pairloop.loop.pairs.rules import CompiledRows, Dropped, PairRules
from pairloop.policy.protocols import Tokens
from pairloop.store import Artifact, Store, datasets, feedback, quarantines, versions
from pairloop.store.schema import completions as completion_table
from pairloop.store.schema import feedback as feedback_table
from pairloop.store.schema import groups as group_table
from pairloop.types import BASE_VERSION, SCORE_METRIC, Alias, Dataset, GroupKind, Pool, PreferencePair, TrainingRow, Version

logger = logging.getLogger(__name__)

SET_ASIDE_FILE = "set_aside.jsonl"
"""feedback_id and reason of every row that was not used."""

TOP_REASONS = 3
"""So many reasons are told in words where no pair is left; the record has all of them."""

_KINDS = (GroupKind.TRAIN, GroupKind.HELDOUT, GroupKind.IMPORTED)
"""Duels judge versions: their picks neither train nor measure training."""


@dataclass(frozen=True, slots=True)
class NewPairs:
    """What the evidence that ``parent`` has not learned from gives: rows after ``after_seq``, up to ``feedback_seq``."""

    compiled: CompiledRows
    rules: PairRules
    parent: int
    after_seq: int
    feedback_seq: int

    @property
    def counts(self) -> Mapping[str, int]:
        return self.compiled.counts

    @property
    def dropped(self) -> Mapping[str, int]:
        """How many feedback rows were set aside, by reason."""
        return self.compiled.dropped

    @property
    def text(self) -> str:
        """What there is to train on; where that is nothing, the most frequent reasons why."""
        train, heldout = len(self.compiled.train), len(self.compiled.heldout)
        if train:
            return f"{train} training pairs, {heldout} held out"
        often = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
        why = [f"{heldout} held out"] * (heldout > 0) + [f"{n} {reason.replace('_', ' ')}" for reason, n in often[:TOP_REASONS]]
        if len(often) > TOP_REASONS:
            why.append(f"{sum(n for _, n in often[TOP_REASONS:])} for other reasons")
        return f"no new usable pairs: {', '.join(why) or 'no new feedback'}"


def run(store: Store, tokens: Tokens | None, config: Config, *, cycle_id: str | None, parent: int) -> Dataset | None:
    """Compile what ``parent`` has not learned from yet, and record it; None where no pair can be trained on.

    Where the reasons for None are wanted: ``compile_new``, then ``record``.
    """
    return record(store, config, compile_new(store, tokens, config, parent=parent), cycle_id=cycle_id)


def record(store: Store, config: Config, new: NewPairs, *, cycle_id: str | None) -> Dataset | None:
    """Write the snapshot, with its lineage; None where no pair can be trained on.

    The folder holds ``train.jsonl`` and ``heldout.jsonl`` (``formats.snapshot``), ``set_aside.jsonl`` and the manifest. The
    same evidence gives the same dataset id; one that is recorded already is returned as it is.
    """
    compiled = new.compiled
    logger.info("pairs: %s; set aside %s", new.text, compiled.dropped)
    if not compiled.train:
        return None
    artifact = _publish(store, config, new)
    dataset = Dataset(
        dataset_id=f"dataset_{artifact.hash[:32]}",
        policy=config.policy.name,
        path=str(artifact.path),
        n_train=len(compiled.train),
        n_heldout=len(compiled.heldout),
        counts=compiled.counts,
        dropped=compiled.dropped,
        created_at=datetime.now(UTC),
    )
    faults.reach("dataset.published")
    lineage = [(row.row_id, row.group_ids, row.feedback_ids) for row in compiled.pairs]

    def insert(c: Connection) -> Dataset:
        recorded = datasets.get(c, dataset.dataset_id)
        if recorded is not None:
            return recorded
        datasets.insert(c, dataset, feedback_seq=new.feedback_seq, cycle_id=cycle_id, pairs=lineage)
        return dataset

    return store.write(insert)


def compile_new(store: Store, tokens: Tokens | None, config: Config, *, parent: int) -> NewPairs:
    """The pairs that a cycle of ``parent`` would train on now, with every reason why a row is not used. Writes nothing.

    What ``parent`` or an ancestor was trained on is used; what other versions were trained on is not, and comes again.
    ``tokens`` refuses pairs that the model's template cannot render or that exceed ``train.max_length``.
    """
    policy = config.policy.name
    with store.reading() as c:
        after_seq = datasets.used_seq(c, policy, parent)
        groups, feedback_seq = feedback.labelled_since(c, policy, after_seq=after_seq, kinds=_KINDS)
        lineage = versions.list_(c, policy, checkpoints=True)
        quarantined = quarantines.current(c, policy)
    rules = PairRules.of(config, staleness=promotions_between(lineage, parent), quarantined=quarantined)
    compiled = compile_rows(groups, rules, config.train.objective, refuse=_refusal(tokens, config.train.max_length))
    return NewPairs(compiled, rules, parent, after_seq, feedback_seq)


def count_new(store: Store, config: Config) -> int:
    """About how many new pairs a cycle would find: what came since the last cycle's snapshot, without reading any text.

    A snapshot that was built by hand, of which nothing was trained, changes nothing.

    Decisive picks of the train pool, groups whose scores differ, and, where a verifier or judge is configured, the groups
    that it has yet to label.
    """
    policy, now = config.policy.name, datetime.now(UTC)
    with store.reading() as c:
        last = datasets.last_of_a_cycle(c, policy)
        champion = versions.alias(c, policy, Alias.CHAMPION) or BASE_VERSION
        after_seq = max(last.feedback_seq if last else 0, datasets.used_seq(c, policy, champion))
        held = quarantines.current(c, policy)
        found = feedback.count_new_picks(c, policy, after_seq=after_seq, pool=Pool.TRAIN, quarantined=held)
        found += _count_contrasts(c, policy, after_seq)
        if config.label.verifier is not None or config.label.judge_url is not None:
            after = timedelta(seconds=config.label.after_s)
            found += _count_unlabelled(c, policy, since=last.created_at - after if last else None, before=now - after)
    return found


def set_aside_rows(folder: Path) -> Iterator[tuple[str, str]]:
    """The id of each feedback row that the snapshot in ``folder`` did not use, and its one reason."""
    with (folder / SET_ASIDE_FILE).open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row["feedback_id"], row["reason"]


def why_set_aside(folder: Path, feedback_ids: Iterable[str]) -> dict[str, str]:
    """The reasons of a few rows that the snapshot in ``folder`` did not use; the file is searched, not parsed."""
    whole = (folder / SET_ASIDE_FILE).read_bytes()
    found = {}
    for feedback_id in feedback_ids:
        at = whole.find(f'{{"feedback_id": {json.dumps(feedback_id)},'.encode())
        if at >= 0:
            found[feedback_id] = str(json.loads(whole[at : whole.index(b"\n", at)])["reason"])
    return found


def promotions_between(lineage: Iterable[Version], parent: int) -> Mapping[int, int]:
    """How far each version is from ``parent``: the steps between them in the tree of versions.

    Only promoted versions and canaries serve, so each step is a promotion; a version that was rolled back, or a canary that was
    withdrawn, lies on a side branch.
    """
    parents = {version.number: version.parent for version in lineage}
    above = {number: steps for steps, number in enumerate(_ancestors(parents, parent))}
    distance = {parent: 0}
    for number in parents:
        for steps, ancestor in enumerate(_ancestors(parents, number)):
            if ancestor in above:
                distance[number] = steps + above[ancestor]
                break
    return distance


def _ancestors(parents: Mapping[int, int | None], number: int) -> Iterator[int]:
    """The version, its parent, and so on up to the base."""
    at: int | None = number
    while at is not None:
        yield at
        at = parents.get(at)


def _refusal(tokens: Tokens | None, max_length: int) -> Refuse:
    """Refuses rows that are too long, or that the chat template does; recorded token ids are counted as they are."""

    def refuse(row: TrainingRow) -> Dropped | None:
        try:
            longest = _longest(row, tokens)
        except InvalidRequestError:
            return Dropped.TEMPLATE_REFUSED
        return Dropped.OVER_LONG if longest > max_length else None

    return refuse


def _longest(row: TrainingRow, tokens: Tokens | None) -> int:
    """Tokens of the prompt and the longest answer, as far as they are recorded or can be counted."""
    prompt = row.prompt_token_ids or (tokens.encode_prompt(row.prompt) if tokens is not None else ())
    answers = (
        side.token_ids or (tokens.encode_completion(row.prompt, side.text) if tokens is not None else ())
        for side in ((row.chosen, row.rejected) if isinstance(row, PreferencePair) else row.answers)
    )
    return len(prompt) + max(len(answer) for answer in answers)


def _publish(store: Store, config: Config, new: NewPairs) -> Artifact:
    compiled = new.compiled
    with store.artifacts.stage() as folder:
        snapshot.write(folder / TRAIN_FILE, compiled.train)
        snapshot.write(folder / HELDOUT_FILE, compiled.heldout)
        _write_set_aside(folder / SET_ASIDE_FILE, compiled.set_aside)
        rules = asdict(new.rules)
        rules["staleness"] = {str(version): steps for version, steps in (new.rules.staleness or {}).items()}
        manifest = {
            "kind": "dataset",
            "policy": config.policy.name,
            "parent": new.parent,
            "feedback_after_seq": new.after_seq,
            "feedback_seq": new.feedback_seq,
            "counts": compiled.counts,
            "dropped": compiled.dropped,
            "rules": rules,
        }
        return store.artifacts.publish(folder, manifest)


def _write_set_aside(path: Path, set_aside: Mapping[str, str]) -> None:
    rows = ({"feedback_id": feedback_id, "reason": reason} for feedback_id, reason in set_aside.items())
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8", newline="\n")


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
            group_table.c.kind.in_([kind.value for kind in _KINDS]),
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
