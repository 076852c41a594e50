"""From labelled groups to the rows that an objective learns from: pairs, scored groups, demonstrations. Pure."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from statistics import fmean

from pairloop.errors import InvalidRequestError
from pairloop.learner.data import GROUP_FAMILY
from pairloop.loop.pairs.builder import Made, Refuse, account, pairs_of, recorded, sampled_by
from pairloop.loop.pairs.evidence import Evidence, Row, Side, ideal_of
from pairloop.loop.pairs.rules import CompiledRows, Dropped, PairRules
from pairloop.loop.pairs.screen import gather, normalised
from pairloop.types import (
    Group,
    Label,
    LabelledGroup,
    PreferencePair,
    Prompt,
    TrainingGroup,
    TrainingRow,
)


def compile_rows(
    groups: Iterable[LabelledGroup], rules: PairRules, objective: str, *, refuse: Refuse | None = None
) -> CompiledRows:
    """Training rows of the kinds that ``objective`` learns from, by the rules of `compile_pairs`; it accounts for all feedback.

    The group family: a group with scores becomes one scored group (each completion's mean over the scorers that scored all of
    them), anything else pairs. ``sft``: demonstrations, of what was called ideal and of the chosen answers that nobody placed
    below another one; held out stay pairs and demonstrations. Every other objective: pairs.
    """
    evidence = gather(groups, rules)
    train: list[Made[TrainingRow]] = []
    heldout: list[Made[TrainingRow]] = []
    if objective in GROUP_FAMILY:
        made = _scored_groups(evidence)
        evidence.scores = []
    elif objective == "sft":
        made = _ideals(evidence)
        evidence.edits = []
    else:
        made = []
    for is_heldout in (True, False):
        kept = _screened([one for one in made if _is_heldout(one, evidence) is is_heldout], evidence, rules, refuse)
        (heldout if is_heldout else train).extend(kept)
    asked = {normalised(one.row.prompt) for one in heldout}
    pairs, heldout_pairs = pairs_of(evidence, rules, refuse, asked)
    asked |= {normalised(one.row.prompt) for one in heldout_pairs}
    heldout += heldout_pairs
    if objective == "sft":
        train = _merged([*train, *_chosen(pairs, evidence)])
    else:
        train += pairs
    for one in train:
        if normalised(one.row.prompt) in asked:
            evidence.ledger.drop(one.of, Dropped.PROMPT_IN_HELDOUT)
    return account(evidence, [one for one in train if normalised(one.row.prompt) not in asked], heldout)


def refuse_empty(compiled: CompiledRows, objective: str, *, param: str = "training_file") -> CompiledRows:
    """``compiled``; InvalidRequestError where nothing is left to train on, with the reasons and the objective that could.

    ``param``: the field that gave the data.
    """
    if compiled.train:
        return compiled
    often = sorted(compiled.dropped.items(), key=lambda item: (-item[1], item[0]))
    why = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in often) or "no feedback"
    hint = ""
    if Dropped.DEMONSTRATION_WITHOUT_PARTNER in compiled.dropped:
        hint = '; demonstrations, one ideal answer each, are for objective "sft" (a supervised job)'
    elif objective == "sft":
        hint = "; sft needs demonstrations or pairs"
    raise InvalidRequestError(f"nothing to train on with objective {objective!r}: {why}{hint}", param=param, code="unfit_rows")


def _scored_groups(evidence: Evidence) -> list[Made[TrainingRow]]:
    """One row per group whose scores differ. A pick outranks scores: it makes a pair of the two."""
    picked = {group.group_id for group, rows in evidence.picks if any(row.feedback.label in (Label.A, Label.B) for row in rows)}
    by_group: dict[str, list[tuple[Group, list[Row]]]] = defaultdict(list)
    for group, rows in evidence.scores:
        by_group[group.group_id].append((group, rows))
    made: list[Made[TrainingRow]] = []
    for group_id, scorers in by_group.items():
        group, rows = scorers[0][0], [row for _, scored in scorers for row in scored]
        evidence.counts["scored_groups"] += 1
        rewards = _mean_scores([scored for _, scored in scorers])
        has_contrast = len(set(rewards.values())) > 1
        evidence.counts["groups_with_contrast"] += has_contrast
        evidence.counts["all_correct"] += set(rewards.values()) == {1.0}
        evidence.counts["all_wrong"] += set(rewards.values()) == {0.0}
        if group_id in picked:
            evidence.ledger.drop(rows, Dropped.OUTRANKED)
        elif not has_contrast:
            evidence.ledger.drop(rows, Dropped.SCORE_WITHOUT_PARTNER if len(rewards) < 2 else Dropped.EQUAL_SCORES)
        else:
            sides = [Side(group.completions[place].text, group, group.completions[place]) for place in rewards]
            made.append(Made(_training_group("scored", sides, tuple(rewards.values()), rows), rows))
    return made


def _mean_scores(scorers: list[list[Row]]) -> dict[int, float]:
    """Completion → mean score, of the completions that every scorer scored."""
    of_scorers = [
        {row.feedback.choice_index or 0: float(row.feedback.value) for row in scored}  # type: ignore[arg-type]  # screened
        for scored in scorers
    ]
    common = set.intersection(*map(set, of_scorers))
    return {place: fmean(scores[place] for scores in of_scorers) for place in sorted(common)}


def _ideals(evidence: Evidence) -> list[Made[TrainingRow]]:
    made: list[Made[TrainingRow]] = []
    for group, row in evidence.edits:
        text = ideal_of(group, row.feedback) or ""
        if not text.strip():
            evidence.ledger.drop([row], Dropped.EMPTY_CHOSEN)
            continue
        # Sampled and called ideal as it is, or written by somebody.
        sampled = next((one for one in group.completions if one.text == text), None)
        made.append(Made(_training_group("demo", [Side(text, group, sampled)], (1.0,), [row]), [row]))
    return _merged(made)


def _chosen(pairs: list[Made[PreferencePair]], evidence: Evidence) -> list[Made[TrainingRow]]:
    """The chosen answers as demonstrations, but for those that another pair of the same prompt rejects."""
    rejected = {(one.row.prompt, one.row.rejected.text) for one in pairs}
    made: list[Made[TrainingRow]] = []
    for one in pairs:
        pair = one.row
        if (pair.prompt, pair.chosen.text) in rejected:
            evidence.ledger.drop(one.of, Dropped.OUTRANKED)
            continue
        made.append(
            Made(
                TrainingGroup(
                    row_id=_row_id("demo", pair.prompt, [pair.chosen.text], (1.0,), pair.group_ids, pair.feedback_ids),
                    prompt=pair.prompt,
                    answers=(pair.chosen,),
                    source=pair.source,
                    prompt_token_ids=pair.prompt_token_ids,
                    sampled_by=pair.sampled_by,
                    tempered=pair.tempered,
                    group_ids=pair.group_ids,
                    feedback_ids=pair.feedback_ids,
                ),
                one.of,
            )
        )
    return made


def _merged(made: list[Made[TrainingRow]]) -> list[Made[TrainingRow]]:
    """Demonstrations that say the same are one, the first, with the lineage of all."""
    alike: dict[tuple[Prompt, str], list[Made[TrainingRow]]] = defaultdict(list)
    for one in made:
        assert isinstance(one.row, TrainingGroup)
        alike[one.row.prompt, one.row.answers[0].text].append(one)
    return [_with_lineage(found) if len(found) > 1 else found[0] for found in alike.values()]


def _with_lineage(alike: list[Made[TrainingRow]]) -> Made[TrainingRow]:
    first = alike[0].row
    assert isinstance(first, TrainingGroup)
    group_ids = tuple(dict.fromkeys(group_id for one in alike for group_id in one.row.group_ids))
    feedback_ids = tuple(dict.fromkeys(feedback_id for one in alike for feedback_id in one.row.feedback_ids))
    row_id = _row_id("demo", first.prompt, [first.answers[0].text], first.rewards, group_ids, feedback_ids)
    row = replace(first, row_id=row_id, group_ids=group_ids, feedback_ids=feedback_ids)
    return Made(row, [row for one in alike for row in one.of])


def _screened(
    made: list[Made[TrainingRow]], evidence: Evidence, rules: PairRules, refuse: Refuse | None
) -> list[Made[TrainingRow]]:
    """Those with something new to say that can be trained on, at most so many per prompt."""
    kept = []
    per_prompt: Counter[Prompt] = Counter()
    for one in made:
        reason = None if any(row.is_new for row in one.of) else Dropped.EARLIER_ROUND
        reason = reason or (refuse(one.row) if refuse is not None else None)
        if reason is None and per_prompt[one.row.prompt] == rules.max_pairs_per_prompt:
            reason = Dropped.PROMPT_CAP
        if reason is not None:
            evidence.ledger.drop(one.of, reason)
            continue
        per_prompt[one.row.prompt] += 1
        kept.append(one)
    return kept


def _is_heldout(made: Made[TrainingRow], evidence: Evidence) -> bool:
    return any(group_id in evidence.heldout_groups for group_id in made.row.group_ids)


def _training_group(kind: str, sides: list[Side], rewards: tuple[float, ...], rows: list[Row]) -> TrainingGroup:
    group, version = sides[0].group, sampled_by(sides)
    feedback_ids = tuple(dict.fromkeys(row.feedback.feedback_id for row in rows))
    return TrainingGroup(
        row_id=_row_id(kind, group.prompt, [side.text for side in sides], rewards, (group.group_id,), feedback_ids),
        prompt=group.prompt,
        answers=tuple(recorded(side, with_logps=version is not None) for side in sides),
        rewards=rewards,
        source=rows[0].feedback.source,
        prompt_token_ids=group.prompt_token_ids,
        sampled_by=version,
        tempered=any(side.completion is not None for side in sides) and group.sampling.is_tempered,
        group_ids=(group.group_id,),
        feedback_ids=feedback_ids,
    )


def _row_id(
    kind: str,
    prompt: Prompt,
    texts: list[str],
    rewards: tuple[float, ...],
    group_ids: tuple[str, ...],
    feedback_ids: tuple[str, ...],
) -> str:
    """A hash of what the row says and where it comes from, as of pairs."""
    plain = prompt if isinstance(prompt, str) else [message.as_dict() for message in prompt]
    content = json.dumps([plain, texts, rewards, group_ids, feedback_ids])
    return f"{kind}_{hashlib.sha256(content.encode()).hexdigest()[:32]}"
