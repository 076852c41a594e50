"""The one pair builder: labelled groups in, preference pairs out, every feedback row accounted for. Pure."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pairloop.loop.pairs.evidence import Candidate, Evidence, Rank, Row, Side
from pairloop.loop.pairs.rules import COUNTS, Compiled, CompiledPairs, Dropped, PairRules, R
from pairloop.loop.pairs.screen import gather, normalised
from pairloop.types import LabelledGroup, PairSide, PreferencePair, Prompt, TrainingRow

Refuse = Callable[[TrainingRow], Dropped | None]
"""Why a finished row cannot be trained on (it is too long, say), or None."""

R_co = TypeVar("R_co", bound=TrainingRow, covariant=True)

_Key = tuple[bool, Prompt, str, str]


@dataclass
class _Merged:
    """All candidates that say the same of one prompt: one pair."""

    candidates: list[Candidate] = field(default_factory=list)

    @property
    def rank(self) -> Rank:
        return min(candidate.rank for candidate in self.candidates)

    @property
    def rows(self) -> list[Row]:
        return [row for candidate in self.candidates for row in candidate.rows]

    @property
    def best(self) -> Candidate:
        """The one whose record is kept: sampled by the newest single version, then the first."""
        return max(
            self.candidates,
            key=lambda candidate: -1 if (version := sampled_by((candidate.chosen, candidate.rejected))) is None else version,
        )


@dataclass(frozen=True, slots=True)
class Made(Generic[R_co]):
    """A finished training row, and the feedback that it was made of."""

    row: R_co
    of: list[Row]


def compile_pairs(groups: Iterable[LabelledGroup], rules: PairRules, *, refuse: Refuse | None = None) -> CompiledPairs:
    """Preference pairs from labelled groups, by the declared rules; the same input in the same order gives the same output.

    Groups with the same prompt (byte for byte) are one. Rows of an earlier round (``LabelledGroup.earlier``) vote, contradict
    and take part, but a pair needs a new row. Counts, besides those of feedback rows:

    - ``groups``, ``prompts`` (distinct);
    - comparisons: ``comparisons`` with a pick, ``unanimous`` (two raters or more, all the same), ``majority_tie``,
      ``decided``;
    - scores: ``scored_groups``, ``groups_with_contrast``, and of the others ``all_correct`` (each 1) and ``all_wrong``
      (each 0);
    - thumbs: ``thumbs_up``, ``thumbs_down``, ``thumbed_answers`` (distinct prompt and answer), ``conflicting_labels``
      (those with both), ``prompts_with_both`` (a clean up and a clean down);
    - pairs: ``all_pairs`` (every statement), ``distinct_pairs`` (by prompt, chosen and rejected text), ``train_pairs``,
      ``heldout_pairs``.
    """
    evidence = gather(groups, rules)
    return account(evidence, *pairs_of(evidence, rules, refuse))


def pairs_of(
    evidence: Evidence, rules: PairRules, refuse: Refuse | None, also_heldout: Collection[str] = ()
) -> tuple[list[Made[PreferencePair]], list[Made[PreferencePair]]]:
    """The pairs to train on and those held out; ``also_heldout``: further (normalised) prompts not to train on."""
    candidates = list(evidence.candidates())
    merged = _merge(candidates, evidence)
    beyond = evidence.counts.pop("beyond_cap", 0)
    evidence.counts.update(all_pairs=len(candidates) + beyond, distinct_pairs=len(merged) + beyond)
    merged = _with_news(_without_conflicts(merged, evidence), evidence)
    heldout = _finished({key: group for key, group in merged.items() if key[0]}, evidence, rules, refuse)
    train = {key: group for key, group in merged.items() if not key[0]}
    held_out = {normalised(made.row.prompt) for made in heldout} | set(also_heldout)
    for key in [key for key in train if normalised(key[1]) in held_out]:
        _drop(evidence, train.pop(key), Dropped.PROMPT_IN_HELDOUT)
    return _finished(train, evidence, rules, refuse), heldout


def _merge(candidates: list[Candidate], evidence: Evidence) -> dict[_Key, _Merged]:
    merged: dict[_Key, _Merged] = {}
    for candidate in candidates:
        chosen, rejected = candidate.chosen.text, candidate.rejected.text
        if chosen == rejected:
            evidence.ledger.drop(candidate.rows, Dropped.IDENTICAL)
        elif not chosen.strip():
            evidence.ledger.drop(candidate.rows, Dropped.EMPTY_CHOSEN)
        else:
            key = (candidate.is_heldout, candidate.prompt, chosen, rejected)
            merged.setdefault(key, _Merged()).candidates.append(candidate)
    return merged


def _without_conflicts(merged: dict[_Key, _Merged], evidence: Evidence) -> dict[_Key, _Merged]:
    """a > b against b > a: the stronger signal stays; of equal signals neither."""
    kept = {}
    for key, pair in merged.items():
        is_heldout, prompt, chosen, rejected = key
        against = merged.get((is_heldout, prompt, rejected, chosen))
        if against is None or pair.rank < against.rank:
            kept[key] = pair
        else:
            _drop(evidence, pair, Dropped.CONFLICT if pair.rank == against.rank else Dropped.OUTRANKED)
    return kept


def _with_news(merged: dict[_Key, _Merged], evidence: Evidence) -> dict[_Key, _Merged]:
    """Without the statements that only rows of earlier rounds make: those had their turn, and count as context alone."""
    old = [key for key, pair in merged.items() if not any(row.is_new for row in pair.rows)]
    for key in old:
        _drop(evidence, merged.pop(key), Dropped.EARLIER_ROUND)
    return merged


def _finished(
    merged: dict[_Key, _Merged], evidence: Evidence, rules: PairRules, refuse: Refuse | None
) -> list[Made[PreferencePair]]:
    """The pairs that can be trained on, at most so many per prompt: the stronger signals, then the earlier ones."""
    finished: dict[_Key, Made[PreferencePair]] = {}
    per_prompt: Counter[Prompt] = Counter()
    for key, group in sorted(merged.items(), key=lambda item: item[1].rank):
        pair, prompt = _pair(group), key[1]
        reason = refuse(pair) if refuse is not None else None
        if reason is None and per_prompt[prompt] == rules.max_pairs_per_prompt:
            reason = Dropped.PROMPT_CAP
        if reason is not None:
            _drop(evidence, group, reason)
            continue
        per_prompt[prompt] += 1
        finished[key] = Made(pair, group.rows)
    return [finished[key] for key in merged if key in finished]


def _drop(evidence: Evidence, pair: _Merged, reason: Dropped) -> None:
    evidence.ledger.drop(pair.rows, reason)


def account(evidence: Evidence, train: list[Made[R]], heldout: list[Made[R]]) -> Compiled[R]:
    """Close the books: each feedback row is used in a kept training row, or set aside with one reason."""
    rows, counts = evidence.ledger.rows, evidence.counts
    used = {row.serial for made in (*train, *heldout) for row in made.of}
    reasons = {serial: reason for serial, reason in sorted(evidence.ledger.reasons.items()) if serial not in used}
    assert len(used) + len(reasons) == len(rows), "every feedback row is used or has a reason"
    counts.update(
        feedback_rows=len(rows),
        feedback_used=len(used),
        prompts=len(evidence.prompts),
        train_pairs=len(train),
        heldout_pairs=len(heldout),
    )
    return Compiled(
        train=[made.row for made in train],
        heldout=[made.row for made in heldout],
        dropped=dict(sorted(Counter(reason.value for reason in reasons.values()).items())),
        counts={name: counts[name] for name in COUNTS},
        set_aside={rows[serial].feedback_id: reason.value for serial, reason in reasons.items()},
    )


def _pair(merged: _Merged) -> PreferencePair:
    best = merged.best
    sides = (best.chosen, best.rejected)
    version = sampled_by(sides)
    group_ids = _unique(side.group.group_id for c in merged.candidates for side in (c.chosen, c.rejected))
    feedback_ids = _unique(row.feedback.feedback_id for row in merged.rows)
    prompt_tokens = {side.group.prompt_token_ids for side in sides}
    return PreferencePair(
        pair_id=_pair_id(best, group_ids, feedback_ids),
        prompt=best.prompt,
        chosen=recorded(best.chosen, with_logps=version is not None),
        rejected=recorded(best.rejected, with_logps=version is not None),
        source=min(merged.candidates, key=lambda c: c.rank).source,
        prompt_token_ids=prompt_tokens.pop() if len(prompt_tokens) == 1 else (),
        sampled_by=version,
        tempered=any(side.completion is not None and side.group.sampling.is_tempered for side in sides),
        group_ids=group_ids,
        feedback_ids=feedback_ids,
    )


def sampled_by(sides: Iterable[Side]) -> int | None:
    """The one version that sampled all sides, if there is one."""
    versions = {side.completion.version if side.completion else None for side in sides}
    return versions.pop() if len(versions) == 1 else None


def recorded(side: Side, *, with_logps: bool) -> PairSide:
    """Log-probs go along only where one version sampled all sides: alone they are nobody's reference."""
    if side.completion is None:
        return PairSide(side.text)
    return PairSide(side.text, side.completion.token_ids, side.completion.logps if with_logps else ())


def _pair_id(best: Candidate, group_ids: tuple[str, ...], feedback_ids: tuple[str, ...]) -> str:
    """A hash of what the pair says and where it comes from: the same evidence gives the same id."""
    prompt = best.prompt if isinstance(best.prompt, str) else [message.as_dict() for message in best.prompt]
    content = json.dumps([prompt, best.chosen.text, best.rejected.text, group_ids, feedback_ids])
    return f"pair_{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def _unique(ids: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(ids))
