"""A word diff of two answers, and why feedback was left out, in sentences."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from itertools import islice
from typing import NamedTuple

MAX_WORDS = 300
"""Longer answers are shown without a diff: where few words repeat often, its time grows with the cube of the length."""

_WORD = re.compile(r"\s+|\w+|[^\w\s]")


class Piece(NamedTuple):
    """A stretch of a text; ``is_own``: the other text does not have it there."""

    text: str
    is_own: bool


def diff(first: str, second: str) -> tuple[list[Piece], list[Piece]] | None:
    """Both texts in pieces, joined what they were; None where they are too long to be compared."""
    ours, theirs = ([found[0] for found in islice(_WORD.finditer(text), MAX_WORDS + 1)] for text in (first, second))
    if max(len(ours), len(theirs)) > MAX_WORDS:
        return None
    pieces: tuple[list[Piece], list[Piece]] = [], []
    for tag, i, j, k, m in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        for side, words in zip(pieces, (ours[i:j], theirs[k:m]), strict=True):
            if words:
                side.append(Piece("".join(words), tag != "equal"))
    return pieces


WHY: Mapping[str, str] = {
    "tie": "The vote is a tie: it prefers neither answer.",
    "both_bad": "The vote says that both answers are bad.",
    "skip": "The comparison was skipped.",
    "majority_tie": "As many people picked one answer as the other.",
    "outvoted": "More people picked the other answer.",
    "equal_scores": "All answers got the same score.",
    "score_without_partner": "Only one answer has a score: there is nothing to compare it with.",
    "conflicting_thumbs": "The same answer got thumbs up and thumbs down.",
    "thumb_without_partner": "No answer to the same prompt got the opposite thumb.",
    "demonstration_without_partner": "The edited answer says what was served.",
    "comment": "A comment prefers nothing.",
    "other_metric": "This metric does not train; feedback.thumb_metrics can name it.",
    "malformed": "It does not fit the group: an answer that is not there, or a value of the wrong kind.",
    "judge_error": "The labeller failed on it.",
    "repeat": "The question was asked twice to measure flips: the first answer counts.",
    "instant_pick": "It was made faster than feedback.min_latency_ms: nobody reads that fast.",
    "rater_cap": "Its rater has spoken feedback.max_picks_per_rater times already.",
    "quarantined": "Its rater is in quarantine.",
    "abandoned": "The answers did not go out to their end.",
    "deleted": "The texts were deleted.",
    "redacted": "Personal data was taken out of it: a placeholder is nothing to learn.",
    "duel": "It judged a version in a duel; such votes do not train.",
    "excluded": "An operator excluded the group from training.",
    "duplicate_group": "The same group was there twice.",
    "earlier_round": "An earlier round looked at it: it counts as context alone.",
    "stale": "It is of a version further back than pairs.max_staleness.",
    "identical": "Both answers are the same.",
    "empty_chosen": "The chosen answer is empty.",
    "conflict": "Another vote of the same strength says the opposite.",
    "outranked": "A stronger kind of vote says the opposite, or said so already.",
    "prompt_in_heldout": "The same question is held out to measure training.",
    "prompt_cap": "Its prompt has pairs.max_pairs_per_prompt pairs already.",
    "over_long": "Prompt and answer are longer than train.max_length.",
    "template_refused": "The model's chat template cannot render it.",
}
"""By `Dropped`."""
