"""What a parent has not learned from yet: read from the store, and compiled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pairloop.config import Config
from pairloop.errors import InvalidRequestError
from pairloop.loop.pairs.builder import Refuse
from pairloop.loop.pairs.rows import compile_rows
from pairloop.loop.pairs.rules import CompiledRows, Dropped, PairRules
from pairloop.policy.protocols import Tokens
from pairloop.store import datasets, feedback, marks, passed_over, quarantines, versions
from pairloop.store.marks import Mark
from pairloop.store.reader import Readable
from pairloop.types import GroupKind, PreferencePair, TrainingRow, Version

TOP_REASONS = 3
"""So many reasons are told in words where no pair is left; the record has all of them."""

KINDS = (GroupKind.TRAIN, GroupKind.HELDOUT, GroupKind.IMPORTED)
"""Duels judge versions: their picks neither train nor measure training."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the evidence that ``parent`` has not learned from: rows after ``after_seq``, up to ``feedback_seq``.

    ``dropped``: how many feedback rows were set aside, by reason.
    """

    rules: PairRules
    parent: int
    after_seq: int
    feedback_seq: int
    counts: Mapping[str, int]
    dropped: Mapping[str, int]

    @property
    def n_train(self) -> int:
        return self.counts["train_pairs"]

    @property
    def n_heldout(self) -> int:
        return self.counts["heldout_pairs"]

    @property
    def text(self) -> str:
        """What there is to train on; where that is nothing, the most frequent reasons why."""
        if self.n_train:
            return f"{self.n_train} training pairs, {self.n_heldout} held out"
        often = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
        why = [f"{self.n_heldout} held out"] * (self.n_heldout > 0)
        why += [f"{n} {reason.replace('_', ' ')}" for reason, n in often[:TOP_REASONS]]
        if len(often) > TOP_REASONS:
            why.append(f"{sum(n for _, n in often[TOP_REASONS:])} for other reasons")
        return f"no new usable pairs: {', '.join(why) or 'no new feedback'}"


@dataclass(frozen=True, slots=True)
class NewPairs(Tally):
    """The rows themselves, with their tally."""

    compiled: CompiledRows


def compile_new(store: Readable, tokens: Tokens | None, config: Config, *, parent: int) -> NewPairs:
    """The pairs that a cycle of ``parent`` would train on now, with every reason why a row is not used. Writes nothing.

    What ``parent`` or an ancestor was trained on is used; what other versions were trained on is not, and comes again. So does
    what was excluded when they were, and is included since.
    ``tokens`` refuses pairs that the model's template cannot render or that exceed ``train.max_length``. All of it is in
    memory: where there may be much, `staged` and `near_or_apart` have it done in a process of its own.
    """
    policy = config.policy.name
    with store.reading() as c:
        after_seq = datasets.used_seq(c, policy, parent)
        again = passed_over.groups_of(c, policy, parent)
        groups, feedback_seq = feedback.labelled_since(c, policy, after_seq=after_seq, kinds=KINDS, again=again)
        lineage = versions.list_(c, policy, checkpoints=True)
        quarantined = quarantines.current(c, policy)
        excluded = marks.marked(c, policy, Mark.EXCLUDED).intersection(labelled.group.group_id for labelled in groups)
    distances = promotions_between(lineage, parent)
    rules = PairRules.of(config, staleness=distances, quarantined=quarantined, excluded=excluded)
    compiled = compile_rows(groups, rules, config.train.objective, refuse=_refusal(tokens, config.train.max_length))
    return NewPairs(rules, parent, after_seq, feedback_seq, compiled.counts, compiled.dropped, compiled)


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
