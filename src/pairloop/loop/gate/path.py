"""How the evidence of a duel grew, vote by vote."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from pairloop.config import GateSection
from pairloop.loop.gate.count import CHAMPION, Count
from pairloop.loop.gate.verdict import e_value_of
from pairloop.types import DuelPick, Verdict


class Step(NamedTuple):
    """After ``votes`` votes that count: the evidence for the challenger, and ``against`` it for the champion."""

    votes: int
    e_value: float
    against: float
    at: datetime


def path(duel_votes: Sequence[DuelPick], config: GateSection) -> list[Step]:
    """The e-process after each vote that counts; the last step is what `decide` says of the same votes."""
    counted, steps = Count(config), list[Step]()
    for vote in sorted(duel_votes, key=lambda vote: vote.created_at):
        if counted.add(vote):
            against = e_value_of(counted, CHAMPION)
            steps.append(Step(len(counted.counted), e_value_of(counted), against, vote.created_at))
    return steps


def judged(verdict: Verdict, config: GateSection) -> int:
    """How many votes that count a verdict rests on: so many steps of the path lead to it."""
    return verdict.wins + verdict.losses + (verdict.ties if config.ties == "half" else 0)
