"""The declared rules of the pair builder, and what it hands out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, Self, TypeVar

from pairloop.config import Config
from pairloop.types import PreferencePair, TrainingRow


class Dropped(StrEnum):
    """Why a feedback row became part of no training row. Every row that is not used has exactly one of these."""

    # what was said decides nothing
    TIE = "tie"
    BOTH_BAD = "both_bad"
    SKIP = "skip"
    MAJORITY_TIE = "majority_tie"
    OUTVOTED = "outvoted"
    EQUAL_SCORES = "equal_scores"
    SCORE_WITHOUT_PARTNER = "score_without_partner"
    CONFLICTING_THUMBS = "conflicting_thumbs"
    THUMB_WITHOUT_PARTNER = "thumb_without_partner"
    DEMONSTRATION_WITHOUT_PARTNER = "demonstration_without_partner"
    COMMENT = "comment"
    OTHER_METRIC = "other_metric"
    MALFORMED = "malformed"
    JUDGE_ERROR = "judge_error"
    REPEAT = "repeat"
    GOLD = "gold"
    # who said it, and how
    INSTANT_PICK = "instant_pick"
    RATER_CAP = "rater_cap"
    QUARANTINED = "quarantined"
    # what it was said about
    ABANDONED = "abandoned"
    DELETED = "deleted"
    REDACTED = "redacted"
    DUEL = "duel"
    EXCLUDED = "excluded"
    DUPLICATE_GROUP = "duplicate_group"
    EARLIER_ROUND = "earlier_round"
    STALE = "stale"
    # what the pair would be
    IDENTICAL = "identical"
    EMPTY_CHOSEN = "empty_chosen"
    CONFLICT = "conflict"
    OUTRANKED = "outranked"
    PROMPT_IN_HELDOUT = "prompt_in_heldout"
    PROMPT_CAP = "prompt_cap"
    OVER_LONG = "over_long"
    TEMPLATE_REFUSED = "template_refused"


@dataclass(frozen=True, slots=True)
class PairRules:
    """Which feedback counts. The defaults set nothing aside but what cannot be a pair.

    ``staleness`` maps each version to the promotions between it and the parent; a version that it lacks is too old. None
    asks nothing. Imported groups have no rater to cap and no version to be stale.
    """

    min_latency_ms: int = 0
    max_picks_per_rater: int | None = None
    max_pairs_per_prompt: int | None = None
    max_staleness: int = 0
    staleness: Mapping[int, int] | None = None
    quarantined: tuple[str, ...] = ()
    """Raters whose feedback is set aside."""
    excluded: tuple[str, ...] = ()
    """Groups that an operator decided not to train on."""
    heldout_share: float = 0.0
    """Share of the prompts of imported groups, by hash, that is held out."""
    thumb_metrics: tuple[str, ...] = ()
    """Further metrics that count as thumbs."""

    @classmethod
    def of(
        cls,
        config: Config,
        *,
        staleness: Mapping[int, int] | None = None,
        quarantined: Iterable[str] = (),
        excluded: Iterable[str] = (),
        split_prompts: bool = True,
    ) -> Self:
        """The configured rules; without ``split_prompts`` no imported prompt is held out."""
        return cls(
            min_latency_ms=config.feedback.min_latency_ms,
            max_picks_per_rater=config.feedback.max_picks_per_rater,
            max_pairs_per_prompt=config.pairs.max_pairs_per_prompt,
            max_staleness=config.pairs.max_staleness,
            staleness=staleness,
            quarantined=tuple(sorted(quarantined)),
            excluded=tuple(sorted(excluded)),
            heldout_share=config.pairs.heldout_share if split_prompts else 0.0,
            thumb_metrics=config.feedback.thumb_metrics,
        )


COUNTS = (
    "groups",
    "prompts",
    "feedback_rows",
    "feedback_used",
    "comparisons",
    "unanimous",
    "majority_tie",
    "decided",
    "scored_groups",
    "groups_with_contrast",
    "all_correct",
    "all_wrong",
    "thumbs_up",
    "thumbs_down",
    "thumbed_answers",
    "conflicting_labels",
    "prompts_with_both",
    "all_pairs",
    "distinct_pairs",
    "train_pairs",
    "heldout_pairs",
)
"""The names in ``CompiledPairs.counts``; ``compile_pairs`` says what they count."""


R = TypeVar("R", bound=TrainingRow)


@dataclass(frozen=True, slots=True)
class Compiled(Generic[R]):
    """The rows to train on and those held out; ``dropped`` counts feedback rows by reason.

    Feedback rows in (``counts["feedback_rows"]``) = ``counts["feedback_used"]`` + the sum of ``dropped``. ``set_aside``
    names the reason of each row that was not used, by feedback id.
    """

    train: list[R]
    heldout: list[R]
    dropped: dict[str, int]
    counts: dict[str, int]
    set_aside: dict[str, str]

    @property
    def pairs(self) -> list[R]:
        """All rows, those to train on first."""
        return self.train + self.heldout


CompiledPairs = Compiled[PreferencePair]
CompiledRows = Compiled[TrainingRow]
