"""From admitted feedback rows to candidate pairs: what each kind of feedback says, before candidates meet each other.

Signals are ranked pick > score > edit > thumb; within picks, people before judges. The rank decides only where two signals
contradict each other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice

from pairloop.loop.pairs.rules import Dropped, PairRules
from pairloop.types import Completion, Feedback, Group, Label, Prompt, Source


class Rank(IntEnum):
    """Lower wins where two signals contradict each other."""

    HUMAN_PICK = 0
    PICK = 1
    SCORE = 2
    EDIT = 3
    THUMB = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One feedback row with its place in the input, which identifies it; not new where an earlier round knew it."""

    serial: int
    feedback: Feedback
    is_new: bool


@dataclass(frozen=True, slots=True)
class Side:
    """A text, the group it belongs to, and the completion it was sampled as (None: somebody wrote it)."""

    text: str
    group: Group
    completion: Completion | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One statement that ``chosen`` is better than ``rejected``, and the rows that say so."""

    prompt: Prompt
    is_heldout: bool
    chosen: Side
    rejected: Side
    rank: Rank
    rows: tuple[Row, ...]

    @property
    def source(self) -> Source:
        return self.rows[0].feedback.source


_Votes = list[tuple[Group, Row]]
"""The thumbs of one answer to one prompt, each with the group that it was given in."""


def ideal_of(group: Group, feedback: Feedback) -> str | None:
    """The answer that a demonstration calls ideal: the one it gives, or else the completion that it names."""
    given = feedback.text if feedback.value is None or isinstance(feedback.value, bool) else feedback.value
    if given:
        return given if isinstance(given, str) else None
    index = feedback.choice_index
    return group.completions[index].text if index is not None and 0 <= index < len(group.completions) else None


class Ledger:
    """Every feedback row that came in, and the first reason why one is set aside."""

    def __init__(self) -> None:
        self.rows: list[Feedback] = []
        self.reasons: dict[int, Dropped] = {}

    def enter(self, feedback: Feedback, *, is_new: bool) -> Row:
        self.rows.append(feedback)
        return Row(len(self.rows) - 1, feedback, is_new)

    def drop(self, rows: Iterable[Row], reason: Dropped) -> None:
        for row in rows:
            self.reasons.setdefault(row.serial, reason if row.is_new else Dropped.EARLIER_ROUND)


@dataclass
class Evidence:
    """The rows that may speak (``screen.gather`` admits them), by what they say."""

    rules: PairRules
    ledger: Ledger = field(default_factory=Ledger)
    counts: Counter[str] = field(default_factory=Counter)
    heldout_groups: set[str] = field(default_factory=set)
    prompts: set[Prompt] = field(default_factory=set)
    picks: list[tuple[Group, list[Row]]] = field(default_factory=list)
    scores: list[tuple[Group, list[Row]]] = field(default_factory=list)
    edits: list[tuple[Group, Row]] = field(default_factory=list)
    thumbs: list[tuple[Group, Row]] = field(default_factory=list)

    def candidates(self) -> list[Candidate]:
        return [*self._from_picks(), *self._from_scores(), *self._from_edits(), *self._from_thumbs()]

    def _candidate(self, chosen: Side, rejected: Side, rank: Rank, rows: Iterable[Row]) -> Candidate:
        group = chosen.group
        return Candidate(group.prompt, group.group_id in self.heldout_groups, chosen, rejected, rank, tuple(rows))

    def _from_picks(self) -> Iterator[Candidate]:
        """One candidate per comparison that its raters decided."""
        for group, rows in self.picks:
            self.counts["comparisons"] += 1
            voters = self._voters(rows)
            if not voters:
                continue
            winner = _majority(voters)
            self.counts["unanimous"] += len(voters) > 1 and len({row.feedback.label for row in voters}) == 1
            self.counts["majority_tie"] += winner is None and len(voters) > 1
            if winner is None:
                self._drop_undecided(voters)
                continue
            self.counts["decided"] += 1
            for_it = [row for row in voters if row.feedback.label is winner]
            self.ledger.drop((row for row in voters if row.feedback.label is not winner), Dropped.OUTVOTED)
            chosen, rejected = (0, 1) if winner is Label.A else (1, 0)
            rank = Rank.HUMAN_PICK if for_it[0].feedback.source is Source.HUMAN else Rank.PICK
            yield self._candidate(_side(group, chosen), _side(group, rejected), rank, for_it)

    def _voters(self, rows: list[Row]) -> list[Row]:
        """The rows that vote: not the skips, and where people picked not those of judges."""
        voters = [row for row in rows if row.feedback.label is not Label.SKIP]
        self.ledger.drop((row for row in rows if row.feedback.label is Label.SKIP), Dropped.SKIP)
        people = [row for row in voters if row.feedback.source is Source.HUMAN]
        if people:
            self.ledger.drop((row for row in voters if row.feedback.source is not Source.HUMAN), Dropped.OUTRANKED)
        return people or voters

    def _drop_undecided(self, voters: list[Row]) -> None:
        if len(voters) > 1:
            self.ledger.drop(voters, Dropped.MAJORITY_TIE)
        else:
            is_tie = voters[0].feedback.label is Label.TIE
            self.ledger.drop(voters, Dropped.TIE if is_tie else Dropped.BOTH_BAD)

    def _from_scores(self) -> Iterator[Candidate]:
        """Higher over lower, among the completions that one scorer scored in one group."""
        for group, rows in self.scores:
            values = [float(row.feedback.value) for row in rows]  # type: ignore[arg-type]  # screened: a number
            self.counts["scored_groups"] += 1
            self.counts["groups_with_contrast"] += len(set(values)) > 1
            self.counts["all_correct"] += set(values) == {1.0}
            self.counts["all_wrong"] += set(values) == {0.0}
            alone = len(rows) == 1
            better = [
                (a, b) for a, high in zip(rows, values, strict=True) for b, low in zip(rows, values, strict=True) if high > low
            ]
            if not better:
                self.ledger.drop(rows, Dropped.SCORE_WITHOUT_PARTNER if alone else Dropped.EQUAL_SCORES)
            for a, b in better:
                yield self._candidate(_side(group, _index(a)), _side(group, _index(b)), Rank.SCORE, (a, b))

    def _from_edits(self) -> Iterator[Candidate]:
        """The ideal answer over what was served: the completion it is about, or each of the group."""
        for group, row in self.edits:
            ideal = Side(ideal_of(group, row.feedback) or "", group, None)
            index = row.feedback.choice_index
            served = range(len(group.completions)) if index is None else (index,)
            if all(group.completions[place].text == ideal.text for place in served):
                self.ledger.drop([row], Dropped.DEMONSTRATION_WITHOUT_PARTNER)
                continue
            for place in served:
                yield self._candidate(ideal, _side(group, place), Rank.EDIT, (row,))

    def _from_thumbs(self) -> Iterator[Candidate]:
        """Each clean up over each clean down of one prompt; an answer with both labels takes part in nothing.

        Of ups and downs whose pairs would exceed the prompt's cap, only so many are made.
        """
        for answers in self._thumbs_by_prompt():
            ups, downs = self._clean_thumbs(answers)
            self.counts["prompts_with_both"] += bool(ups and downs)
            made = _spread(len(ups), len(downs), self.rules.max_pairs_per_prompt)
            self.counts["beyond_cap"] += len(ups) * len(downs) - len(made)
            for i, j in made:
                (up_group, up), (down_group, down) = ups[i][0], downs[j][0]
                chosen, rejected = _side(up_group, _index(up)), _side(down_group, _index(down))
                rows = [row for _, row in (*ups[i], *downs[j])]
                yield self._candidate(chosen, rejected, Rank.THUMB, rows)
            reason = Dropped.PROMPT_CAP if made else Dropped.THUMB_WITHOUT_PARTNER
            used = {("up", i) for i, _ in made} | {("down", j) for _, j in made}
            for side, answered in (("up", ups), ("down", downs)):
                left = [votes for place, votes in enumerate(answered) if (side, place) not in used]
                self.ledger.drop((row for votes in left for _, row in votes), reason)

    def _clean_thumbs(self, answers: dict[str, _Votes]) -> tuple[list[_Votes], list[_Votes]]:
        """The answers that only have thumbs up, and those that only have thumbs down."""
        clean: dict[bool, list[_Votes]] = {True: [], False: []}
        for votes in answers.values():
            labels = {bool(row.feedback.value) for _, row in votes}
            if len(labels) == 1:
                clean[labels.pop()].append(votes)
            else:
                self.counts["conflicting_labels"] += 1
                self.ledger.drop((row for _, row in votes), Dropped.CONFLICTING_THUMBS)
        return clean[True], clean[False]

    def _thumbs_by_prompt(self) -> Iterable[dict[str, _Votes]]:
        """Per prompt and split: the thumbs of each distinct answer."""
        found: dict[tuple[bool, Prompt], dict[str, _Votes]] = defaultdict(lambda: defaultdict(list))
        for group, row in self.thumbs:
            self.counts["thumbs_up" if row.feedback.value else "thumbs_down"] += 1
            key = (group.group_id in self.heldout_groups, group.prompt)
            found[key][_side(group, _index(row)).text].append((group, row))
        self.counts["thumbed_answers"] += sum(len(answers) for answers in found.values())
        return found.values()


def _majority(voters: list[Row]) -> Label | None:
    """A or B where more raters picked it than the other and than neither (tie, both bad); else None."""
    votes = Counter(row.feedback.label for row in voters)
    a, b = votes[Label.A], votes[Label.B]
    neither = len(voters) - a - b
    if a > max(b, neither):
        return Label.A
    return Label.B if b > max(a, neither) else None


def _spread(n: int, m: int, limit: int | None) -> list[tuple[int, int]]:
    """At most ``limit`` of the n x m index pairs, each once, such that the first ones use every index as early as possible."""
    if not n or not m:
        return []
    made = (
        ((i % n, (i + turn) % m) for turn in range(m) for i in range(n))
        if n >= m
        else (((j + turn) % n, j) for turn in range(n) for j in range(m))
    )
    return list(islice(made, limit))


def _index(row: Row) -> int:
    assert row.feedback.choice_index is not None, "screened: the row names a completion"
    return row.feedback.choice_index


def _side(group: Group, index: int) -> Side:
    completion = group.completions[index]
    return Side(completion.text, group, completion)
