"""How a version comes to answer, and what takes it back."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, field_validator, model_validator

from pairloop.config.section import Positive, Section, Share

REFUSALS = (
    r"\bas an ai( language)? model\b",
    r"\bi(['’]m| am) (sorry|afraid),? (but )?i (can(['’]t|not)|am (not able|unable))\b",
    r"^\s*i (can(['’]t|not)|am (not able|unable) to) (help|assist|answer|do)\b",
)


class DeploySection(Section):
    """How a version that passed the gate comes to answer, and the live guards that take it back.

    Each guard compares the version's live answers with those of the champion whose place it takes. Together they take back a
    version that is no worse in at most ``alpha`` of all watches, however often they look.
    """

    canary_share: Share = 0.0
    """Share of users, by a hash that each canary salts anew, whom a version answers first when the gate has promoted it; 0: it
    answers everybody at once."""
    canary_hours: Positive = 1.0
    """Hours a canary lasts at least."""
    canary_requests: int = Field(default=200, ge=0)
    """Requests it must have answered before it may answer everybody; the guards must have enough to compare, too."""
    shadow_share: Share = 0.0
    """Share of ordinary requests that the challenger or canary answers, too, unseen, once the client has its answer and where
    the sampler has room. Such answers are kept and watched; they never train, never duel, and nobody is shown one."""
    watch_hours: float = Field(default=24.0, ge=0.0)
    """Hours after a promotion in which the guards watch the new champion; 0 watches none."""
    auto_rollback: bool = True
    """Whether a guard that breaks brings the former champion back by itself; otherwise it is only told. A canary is always
    withdrawn."""
    keep_warm: int = Field(default=1, ge=0)
    """Former champions that stay loaded, so that a rollback waits for nothing; never more than ``policy.max_loaded`` allows."""
    alpha: float = Field(default=0.01, gt=0.0, lt=0.5)
    """Chance that the guards, all together, take back a version that is no worse."""
    min_answers: int = Field(default=30, ge=1)
    """Answers (of thumbs, a third as many) before a guard says anything."""
    max_error_rise: Share = 0.02
    """Points by which the share of answers that failed may exceed the former champion's."""
    max_latency_ratio: float = Field(default=2.0, gt=1.0)
    """How many times as long as the former champion's the median token may take; below 5 ms none is slow."""
    min_length_ratio: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Lower bound of the median answer's length over the former champion's."""
    max_length_ratio: float = Field(default=2.0, gt=1.0)
    """Upper bound of the median answer's length over the former champion's."""
    max_refusal_rise: Share = 0.05
    """Points by which the share of refused, empty or cut-off answers may exceed the former champion's."""
    max_thumbs_down_rise: Share = 0.1
    """Points by which the share of thumbs down among thumbs may exceed the former champion's."""
    refusals: tuple[str, ...] = REFUSALS
    """Regular expressions, whatever the case, of which one in an answer's first 300 characters makes it a refusal."""

    @field_validator("refusals")
    @classmethod
    def _patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _canary_has_a_control(self) -> Self:
        if self.canary_share == 1.0:
            raise ValueError("canary_share = 1 leaves nobody to compare with: choose less, such as 0.1, or 0 for no canary")
        return self
