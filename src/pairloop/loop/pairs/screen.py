"""Screening: which feedback rows may speak at all, about which groups, and which prompts are held out."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from pairloop.loop.pairs.evidence import Evidence, Ledger, Row, ideal_of
from pairloop.loop.pairs.rules import Dropped, PairRules
from pairloop.types import (
    COMMENT_METRIC,
    DEMONSTRATION_METRIC,
    ERROR_METRIC,
    GOLD_METRIC,
    PREFERENCE_METRIC,
    REDACTED_TAG,
    REPEAT_METRIC,
    SCORE_METRIC,
    THUMBS_METRIC,
    Feedback,
    Group,
    GroupKind,
    Label,
    LabelledGroup,
    Pool,
    Prompt,
    Source,
)


def gather(groups: Iterable[LabelledGroup], rules: PairRules) -> Evidence:
    """Screen every row of every group: who may speak, about what. The order of the input is the order of everything."""
    evidence = Evidence(rules)
    seen: set[str] = set()
    quota, excluded = _Quota(rules), frozenset(rules.excluded)
    for labelled in groups:
        group = labelled.group
        rows = [evidence.ledger.enter(row, is_new=row.feedback_id not in labelled.earlier) for row in labelled.feedback]
        evidence.counts["groups"] += 1
        evidence.prompts.add(group.prompt)
        reason = Dropped.DUPLICATE_GROUP if group.group_id in seen else _refused_group(group, rules)
        if reason is None and group.group_id in excluded:
            reason = Dropped.EXCLUDED
        seen.add(group.group_id)
        if reason is not None:
            evidence.ledger.drop(rows, reason)
            continue
        if _is_heldout(group, rules):
            evidence.heldout_groups.add(group.group_id)
        _sort_in(evidence, rules, group, [row for row in rows if _admit(evidence.ledger, group, row, quota, rules)])
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
    if group.is_erased:
        return Dropped.DELETED
    if any(completion.is_redacted for completion in group.completions):
        return Dropped.REDACTED  # a placeholder is nothing that the model should learn to write
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


def _sort_in(evidence: Evidence, rules: PairRules, group: Group, rows: list[Row]) -> None:
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
    thumbs = (THUMBS_METRIC, *rules.thumb_metrics)
    evidence.thumbs.extend((group, row) for metric in thumbs for row in by_metric[metric])


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
    reason = _refused_row(group, row, quota, rules)
    if reason is not None:
        ledger.drop([row], reason)
    return reason is None


def _refused_row(group: Group, row: Row, quota: _Quota, rules: PairRules) -> Dropped | None:
    feedback = row.feedback
    if feedback.metric in _SAYS_NOTHING:
        return _SAYS_NOTHING[feedback.metric]
    check = _is_thumb if feedback.metric in rules.thumb_metrics else _WELL_FORMED.get(feedback.metric)
    if check is None:
        return Dropped.OTHER_METRIC
    if not check(group, feedback):
        return Dropped.MALFORMED
    if REDACTED_TAG in feedback.tags:
        return Dropped.REDACTED
    if feedback.source is Source.HUMAN and feedback.rater_id in rules.quarantined:
        return Dropped.QUARANTINED
    is_person = feedback.source is Source.HUMAN and feedback.metric == PREFERENCE_METRIC
    if is_person and feedback.latency_ms is not None and feedback.latency_ms < rules.min_latency_ms:
        return Dropped.INSTANT_PICK
    decides = feedback.metric != PREFERENCE_METRIC or feedback.label in (Label.A, Label.B)
    return Dropped.RATER_CAP if decides and row.is_new and quota.is_spent(group, feedback) else None


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
    return ideal_of(group, feedback) is not None and (feedback.choice_index is None or _names_completion(group, feedback))


_SAYS_NOTHING = {
    COMMENT_METRIC: Dropped.COMMENT,
    ERROR_METRIC: Dropped.JUDGE_ERROR,
    GOLD_METRIC: Dropped.GOLD,
    REPEAT_METRIC: Dropped.REPEAT,
}

_WELL_FORMED: dict[str, Callable[[Group, Feedback], bool]] = {
    PREFERENCE_METRIC: _is_pick,
    SCORE_METRIC: _is_score,
    THUMBS_METRIC: _is_thumb,
    DEMONSTRATION_METRIC: _is_edit,
}
