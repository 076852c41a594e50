"""What is said about answers and what becomes of it: which picks count, who else labels, and the pairs."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from pairloop.config.section import Section, Share, duration_s


class FeedbackSection(Section):
    """Which picks count."""

    min_latency_ms: int = Field(default=1_000, ge=0)
    """Human picks faster than this are kept and set aside with the reason ``instant_pick``."""
    max_picks_per_rater: int = Field(default=50, ge=1)
    """Picks of one rater that one snapshot uses; the rest are set aside with the reason ``rater_cap``."""
    repeat_share: Share = 0.05
    """Share of the labelling queue's items (and chance after a pick on the page) that are a comparison which this rater picked
    from before, sides swapped: what is said then is no vote, and measures how often picks are flipped."""
    repeat_after: int = Field(default=5, ge=1)
    """Picks of the rater between a comparison and its repeat."""
    thumb_metrics: tuple[str, ...] = ("resolved",)
    """Metrics of your own, true or false, that count as thumbs: what is said of a whole conversation, say."""
    reasons: tuple[Annotated[str, StringConstraints(min_length=1, max_length=40, pattern=r"^[^,\n]+$")], ...] = Field(
        default=("more correct", "more helpful", "clearer", "better tone", "safer"), max_length=10
    )
    """What the page offers as reasons after a pick; those that are named are kept with the comment, in its tag `reasons`."""


class LabelSection(Section):
    """Feedback for groups that nobody picked: a verifier, or a language model judge asked in both orders."""

    verifier: str | None = None
    """``module:function``; called with (messages, completion), returns a score (higher is better)."""
    judge_url: str | None = None
    """Base URL of an OpenAI-compatible server whose model judges comparisons, asked in both orders."""
    judge_model: str | None = None
    """The judge's model name."""
    judge_api_key_env: str | None = None
    """Name of the environment variable that holds the judge's key."""
    after: str = "0s"
    """Age at which a group without feedback is labelled."""

    @field_validator("after")
    @classmethod
    def _duration(cls, value: str) -> str:
        if value != "0s":
            duration_s(value)
        return value

    @property
    def after_s(self) -> float:
        return 0.0 if self.after == "0s" else duration_s(self.after)

    @model_validator(mode="after")
    def _judge_is_whole(self) -> Self:
        if (self.judge_url is None) != (self.judge_model is None):
            raise ValueError("judge_url and judge_model go together: set both or neither")
        if self.verifier is not None and self.judge_url is not None:
            raise ValueError("verifier and judge_url exclude each other: choose one labeller")
        return self


class PairsSection(Section):
    """From groups and feedback to preference pairs."""

    max_staleness: int = Field(default=1, ge=0)
    """Promotions between the version that sampled a pair and the champion; older pairs are set aside."""
    max_pairs_per_prompt: int = Field(default=64, ge=1)
    """Pairs of one prompt that one snapshot uses; the rest are set aside with the reason ``prompt_cap``."""
    heldout_share: Share = 0.1
    """Share of prompts held out, by hash, where no rater pool splits them (imported and one-off data)."""
    max_chars: int = Field(default=200_000, ge=1)
    """Longest prompt plus answer of an imported row, in characters."""
