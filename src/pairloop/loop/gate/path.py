"""How the evidence of a duel grew, vote by vote."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from pairloop.config import GateSection
from pairloop.loop.gate.count import CHAMPION, Count
from pairloop.loop.gate.evidence import capped, log_e_value
from pairloop.types import DuelPick, Verdict


class Step(NamedTuple):
    """After ``votes`` votes that count, the last of them cast ``at``.

    ``wins`` and ``losses``: as they enter the e-value. ``logs``: of both e-values, where those rest on more than two counts.
    """

    votes: int
    wins: int
    losses: int
    at: datetime
    logs: tuple[float, float] | None = None

    @property
    def e_value(self) -> float:
        """The evidence for the challenger. Computed when asked for: of thousands of steps a plot draws some hundred."""
        return capped(log_e_value(self.wins, self.losses) if self.logs is None else self.logs[0])

    @property
    def against(self) -> float:
        """The evidence for the champion."""
        return capped(log_e_value(self.losses, self.wins) if self.logs is None else self.logs[1])


def path(duel_votes: Sequence[DuelPick], config: GateSection) -> list[Step]:
    """The e-process after each vote that counts; the last step is what `decide` says of the same votes."""
    counted, steps = Count(config), list[Step]()
    for vote in sorted(duel_votes, key=lambda vote: vote.created_at):
        if counted.add(vote):
            logs = (counted.log_e_value(), counted.log_e_value(CHAMPION)) if config.cluster == "rater" else None
            steps.append(Step(len(counted.counted), *counted.evidence(), vote.created_at, logs))
    return steps


def judged(verdict: Verdict, config: GateSection) -> int:
    """How many votes that count a verdict rests on: so many steps of the path lead to it."""
    return verdict.wins + verdict.losses + (verdict.ties if config.ties == "half" else 0)
