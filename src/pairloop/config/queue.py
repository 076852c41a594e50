"""The labelling queue: how many look at a comparison, for how long it is theirs, gold items and guidelines."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from pairloop.config.section import Section, Share, duration_s


class QueueSection(Section):
    """The labelling queue: what people who label are shown."""

    reviewers: int = Field(default=1, ge=1, le=100)
    """So many different raters pick from a comparison before it leaves the queue; a skip is no pick."""
    hold: str = "10m"
    """How long a comparison that a rater was shown is theirs; then it goes back to the queue."""
    gold_share: Share = 0.1
    """Share of the items that are gold: a comparison whose answer is known. What is said of it is no vote, and measures its
    rater. Without gold items there are none."""
    guidelines: Path | None = None
    """A markdown file that the queue shows; each pick is tagged with the hash of what it said. Read anew for each page."""

    @field_validator("hold")
    @classmethod
    def _duration(cls, value: str) -> str:
        duration_s(value)
        return value

    @property
    def hold_s(self) -> float:
        return duration_s(self.hold)
