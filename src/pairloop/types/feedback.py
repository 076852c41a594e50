"""What someone said about a group: picks, values, and the names of their metrics and tags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from pairloop.types.group import Group


class Label(StrEnum):
    """What someone said about a comparison; A is index 0 and B is index 1 of the group."""

    A = "A"
    B = "B"
    TIE = "TIE"
    BOTH_BAD = "BOTH_BAD"
    SKIP = "SKIP"


class Source(StrEnum):
    """Who gave the feedback: a person, a verifier or code scorer, or a language model judge."""

    HUMAN = "human"
    CODE = "code"
    LLM = "llm"


PREFERENCE_METRIC = "preference"
THUMBS_METRIC = "thumbs"
SCORE_METRIC = "score"
COMMENT_METRIC = "comment"
DEMONSTRATION_METRIC = "demonstration"
ERROR_METRIC = "error"
"""A verifier or judge failed on the group: no vote, and no tie."""
REPEAT_METRIC = "repeat"
"""A comparison shown to its rater once more, sides swapped: it measures how often picks are flipped, and is no vote."""
GOLD_METRIC = "gold"
"""A comparison whose answer is known, shown by the labelling queue: it measures its rater, and is no vote."""
OUR_NAMES = "pairloop."
"""How the names of tags and metadata begin that are the server's own: no client may say what they say."""
REDACTED_TAG = f"{OUR_NAMES}redacted"
"""The tag of a feedback row that says something was taken out of its value before it was stored."""
RELABELLED_TAG = f"{OUR_NAMES}relabelled_by"
"""The tag of a feedback row that an operator wrote in its rater's place: who it was."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """One immutable feedback row: a pick (metric ``preference``, with a label) or a value about one completion.

    Unique by (rater, group, metric, choice): a later row with a higher revision replaces the earlier ones, which stay.
    """

    feedback_id: str
    group_id: str
    metric: str
    source: Source
    rater_id: str
    created_at: datetime
    label: Label | None = None
    choice_index: int | None = None
    value: float | bool | str | None = None
    text: str | None = None
    shown_order: tuple[int, ...] = ()
    latency_ms: int | None = None
    revision: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LabelledGroup:
    """A group with the feedback that counts (latest revisions): what the pair builder consumes.

    ``earlier``: ids of those rows that were known to an earlier round. They say what the new ones stand against, and make no
    pair of their own.
    """

    group: Group
    feedback: tuple[Feedback, ...]
    earlier: frozenset[str] = frozenset()
