"""From labelled groups to candidate pairs: what each kind of feedback says, before candidates meet each other.

Signals are ranked pick > score > edit > thumb; within picks, people before judges. The rank decides only where two signals
contradict each other.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from pairloop.loop.pairs.rules import Dropped, PairRules
from pairloop.types import (
    COMMENT_METRIC,
    DEMONSTRATION_METRIC,
    PREFERENCE_METRIC,
    SCORE_METRIC,
    THUMBS_METRIC,
    Completion,
    Feedback,
    Group,
    GroupKind,
    Label,
    LabelledGroup,
    Pool,
    Prompt,
    Source,
)


class Rank(IntEnum):
    """Lower wins where two signals contradict each other."""

    HUMAN_PICK = 0
    PICK = 1
    SCORE = 2
    EDIT = 3
    THUMB = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One feedback row with its place in the input, which identifies it."""

    serial: int
    feedback: Feedback


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


class Ledger:
    """Every feedback row that came in, and the first reason why one is set aside."""

    def __init__(self) -> None:
        self.rows: list[Feedback] = []
        self.reasons: dict[int, Dropped] = {}

    def enter(self, feedback: Feedback) -> Row:
        self.rows.append(feedback)
        return Row(len(self.rows) - 1, feedback)

    def drop(self, rows: Iterable[Row], reason: Dropped) -> None:
        for row in rows:
            self.reasons.setdefault(row.serial, reason)


@dataclass
class Evidence:
    """All labelled groups, screened: the rows that may speak, by what they say."""

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
            voters = _split_off(self.ledger, rows, Label.SKIP, Dropped.SKIP)
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
            is_human = any(row.feedback.source is Source.HUMAN for row in for_it)
            rank = Rank.HUMAN_PICK if is_human else Rank.PICK
            yield self._candidate(_side(group, chosen), _side(group, rejected), rank, for_it)

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
            ideal = Side(str(row.feedback.value or row.feedback.text), group, None)
            index = row.feedback.choice_index
            served = range(len(group.completions)) if index is None else (index,)
            for place in served:
                yield self._candidate(ideal, _side(group, place), Rank.EDIT, (row,))

    def _from_thumbs(self) -> Iterator[Candidate]:
        """Each clean up over each clean down of one prompt; an answer with both labels takes part in nothing."""
        for answers in self._thumbs_by_prompt():
            clean: dict[bool, list[list[tuple[Group, Row]]]] = {True: [], False: []}
            for votes in answers.values():
                labels = {bool(row.feedback.value) for _, row in votes}
                if len(labels) == 1:
                    clean[labels.pop()].append(votes)
                    continue
                self.counts["conflicting_labels"] += 1
                self.ledger.drop((row for _, row in votes), Dropped.CONFLICTING_THUMBS)
            self.counts["prompts_with_both"] += bool(clean[True] and clean[False])
            for ups in clean[True]:
                for downs in clean[False]:
                    (up_group, up), (down_group, down) = ups[0], downs[0]
                    rows = [row for _, row in (*ups, *downs)]
                    chosen, rejected = _side(up_group, _index(up)), _side(down_group, _index(down))
                    yield self._candidate(chosen, rejected, Rank.THUMB, rows)
            lone = clean[True] if not clean[False] else clean[False] if not clean[True] else []
            self.ledger.drop((row for votes in lone for _, row in votes), Dropped.THUMB_WITHOUT_PARTNER)

    def _thumbs_by_prompt(self) -> Iterable[dict[str, list[tuple[Group, Row]]]]:
        """Per prompt and split: the thumbs of each distinct answer."""
        found: dict[tuple[bool, Prompt], dict[str, list[tuple[Group, Row]]]] = defaultdict(lambda: defaultdict(list))
        for group, row in self.thumbs:
            self.counts["thumbs_up" if row.feedback.value else "thumbs_down"] += 1
            key = (group.group_id in self.heldout_groups, group.prompt)
            found[key][_side(group, _index(row)).text].append((group, row))
        self.counts["thumbed_answers"] += sum(len(answers) for answers in found.values())
        return found.values()


def gather(groups: Iterable[LabelledGroup], rules: PairRules) -> Evidence:
    """Screen every row of every group: who may speak, about what. The order of the input is the order of everything."""
    evidence = Evidence()
    seen: set[str] = set()
    quota = _Quota(rules)
    for labelled in groups:
        group = labelled.group
        rows = [evidence.ledger.enter(feedback) for feedback in labelled.feedback]
        evidence.counts["groups"] += 1
        evidence.prompts.add(group.prompt)
        reason = Dropped.DUPLICATE_GROUP if group.group_id in seen else _refused_group(group, rules)
        seen.add(group.group_id)
        if reason is not None:
            evidence.ledger.drop(rows, reason)
            continue
        if _is_heldout(group, rules):
            evidence.heldout_groups.add(group.group_id)
        _sort_in(evidence, group, [row for row in rows if _admit(evidence.ledger, group, row, quota, rules)])
    return evidence


def normalised(prompt: Prompt) -> str:
    """The prompt's words and roles, whatever their case and white space: prompts that agree here are one question."""
    parts = [("", prompt)] if isinstance(prompt, str) else [(message.role, message.content) for message in prompt]
    return "\n".join(f"{role}: {' '.join(content.casefold().split())}" for role, content in parts)


def _refused_group(group: Group, rules: PairRules) -> Dropped | None:
    if group.kind is GroupKind.DUEL:
        return Dropped.DUEL
    if group.is_abandoned:
        return Dropped.ABANDONED
    if rules.staleness is not None:
        for completion in group.completions:
            version = completion.version
            if version is not None and rules.staleness.get(version, math.inf) > rules.max_staleness:
                return Dropped.STALE
    return None


def _is_heldout(group: Group, rules: PairRules) -> bool:
    """The gate pool's groups; of imported ones, which no rater pool splits, a share by the prompt's hash."""
    if group.pool is Pool.GATE:
        return True
    if group.kind is not GroupKind.IMPORTED:
        return False
    digest = hashlib.sha256(normalised(group.prompt).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < rules.heldout_share * 2**64


def _sort_in(evidence: Evidence, group: Group, rows: list[Row]) -> None:
    """Lay the admitted rows of a group on their piles."""
    by_metric: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_metric[row.feedback.metric].append(row)
    if picks := by_metric[PREFERENCE_METRIC]:
        evidence.picks.append((group, picks))
    by_scorer: dict[tuple[Source, str], list[Row]] = defaultdict(list)
    for row in by_metric[SCORE_METRIC]:
        by_scorer[row.feedback.source, row.feedback.rater_id].append(row)
    evidence.scores.extend((group, scored) for scored in by_scorer.values())
    evidence.edits.extend((group, row) for row in by_metric[DEMONSTRATION_METRIC])
    evidence.thumbs.extend((group, row) for row in by_metric[THUMBS_METRIC])


class _Quota:
    """Counts the rows that each person has spoken with, in the order of the input."""

    def __init__(self, rules: PairRules) -> None:
        self._limit = rules.max_picks_per_rater
        self._spoken: Counter[str] = Counter()

    def is_spent(self, group: Group, feedback: Feedback) -> bool:
        if self._limit is None or feedback.source is not Source.HUMAN or group.kind is GroupKind.IMPORTED:
            return False
        self._spoken[feedback.rater_id] += 1
        return self._spoken[feedback.rater_id] > self._limit


def _admit(ledger: Ledger, group: Group, row: Row, quota: _Quota, rules: PairRules) -> bool:
    """Whether the row may speak; where not, its reason is in the ledger."""
    reason = _refused_row(group, row.feedback, quota, rules)
    if reason is not None:
        ledger.drop([row], reason)
    return reason is None


def _refused_row(group: Group, feedback: Feedback, quota: _Quota, rules: PairRules) -> Dropped | None:
    if feedback.metric == COMMENT_METRIC:
        return Dropped.COMMENT
    check = _WELL_FORMED.get(feedback.metric)
    if check is None:
        return Dropped.OTHER_METRIC
    if not check(group, feedback):
        return Dropped.MALFORMED
    is_person = feedback.source is Source.HUMAN and feedback.metric == PREFERENCE_METRIC
    if is_person and feedback.latency_ms is not None and feedback.latency_ms < rules.min_latency_ms:
        return Dropped.INSTANT_PICK
    decides = feedback.metric != PREFERENCE_METRIC or feedback.label in (Label.A, Label.B)
    return Dropped.RATER_CAP if decides and quota.is_spent(group, feedback) else None


def _is_pick(group: Group, feedback: Feedback) -> bool:
    return len(group.completions) == 2 and feedback.label is not None


def _names_completion(group: Group, feedback: Feedback) -> bool:
    return feedback.choice_index is not None and 0 <= feedback.choice_index < len(group.completions)


def _is_thumb(group: Group, feedback: Feedback) -> bool:
    return isinstance(feedback.value, bool) and _names_completion(group, feedback)


def _is_score(group: Group, feedback: Feedback) -> bool:
    value = feedback.value
    return isinstance(value, int | float) and math.isfinite(value) and _names_completion(group, feedback)


def _is_edit(group: Group, feedback: Feedback) -> bool:
    ideal = feedback.value or feedback.text
    return isinstance(ideal, str) and (feedback.choice_index is None or _names_completion(group, feedback))


_WELL_FORMED: dict[str, Callable[[Group, Feedback], bool]] = {
    PREFERENCE_METRIC: _is_pick,
    SCORE_METRIC: _is_score,
    THUMBS_METRIC: _is_thumb,
    DEMONSTRATION_METRIC: _is_edit,
}


def _split_off(ledger: Ledger, rows: list[Row], label: Label, reason: Dropped) -> list[Row]:
    """The rows without that label, which are set aside."""
    ledger.drop((row for row in rows if row.feedback.label is label), reason)
    return [row for row in rows if row.feedback.label is not label]


def _majority(voters: list[Row]) -> Label | None:
    """A or B where more raters picked it than the other and than neither (tie, both bad); else None."""
    votes = Counter(row.feedback.label for row in voters)
    a, b = votes[Label.A], votes[Label.B]
    neither = len(voters) - a - b
    if a > max(b, neither):
        return Label.A
    return Label.B if b > max(a, neither) else None


def _index(row: Row) -> int:
    assert row.feedback.choice_index is not None, "screened: the row names a completion"
    return row.feedback.choice_index


def _side(group: Group, index: int) -> Side:
    completion = group.completions[index]
    return Side(completion.text, group, completion)
