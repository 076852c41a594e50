"""What the gate reads and what it answers: duels with their picks, verdicts with their reasons."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class DuelKind(StrEnum):
    """``gate``: against the champion, it decides about the promotion; ``seed``: beside it, against the base."""

    GATE = "gate"
    SEED = "seed"


@dataclass(frozen=True, slots=True)
class Duel:
    """Live comparisons of challenger and champion in the gate pool; closed by its cycle's verdict.

    In a seed duel the base stands in the champion's place.
    """

    duel_id: str
    cycle_id: str
    policy: str
    champion: int
    challenger: int
    opened_at: datetime
    closed_at: datetime | None = None
    kind: DuelKind = DuelKind.GATE


@dataclass(frozen=True, slots=True)
class DuelPick:
    """One vote of a duel: +1 for the challenger, -1 for the champion, 0 for tie, both-bad or skip.

    ``is_first``: whether the challenger's answer was shown in the first place. ``length_ratio``: its characters over those of
    the champion's. Both are None where nobody was shown anything. ``slices``: the metadata that the duel is looked at by.
    """

    rater_id: str
    outcome: int
    created_at: datetime
    is_first: bool | None = None
    length_ratio: float | None = None
    slices: tuple[tuple[str, str], ...] = ()


class VerdictKind(StrEnum):
    CONTINUE = "CONTINUE"
    PROMOTE = "PROMOTE"
    HOLD = "HOLD"
    REJECT = "REJECT"


@dataclass(frozen=True, slots=True)
class Reason:
    """One rule of the gate, in words and numbers. ``passed`` is None where the rule is still open."""

    rule: str
    passed: bool | None
    text: str
    observed: float | None = None
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gate's answer. Only PROMOTE changes what customers see."""

    kind: VerdictKind
    reasons: tuple[Reason, ...]
    e_value: float = 1.0
    wins: int = 0
    losses: int = 0
    ties: int = 0
    raters: int = 0

    @property
    def text(self) -> str:
        return "; ".join(reason.text for reason in self.reasons)
