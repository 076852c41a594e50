"""How many picks will a duel take? Simulated crowds, judged by the gate's own count after every pick."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pairloop.config import GateSection
from pairloop.loop.gate.count import CHALLENGER, Count
from pairloop.statistics import share
from pairloop.types import DuelPick, Interval

OnStep = Callable[[str, int, int], None]

_BEGIN = datetime(2026, 1, 5, 8, tzinfo=UTC)
_DAYS = [_BEGIN + timedelta(days=i) for i in range(366)]
_STEP = 20
"""Duels between two words on the progress."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """Simulated raters. ``win_rate``: how often they prefer the challenger, on average.

    ``flips`` share of picks that say the opposite of what was meant · ``colluders`` share of raters who always pick the
    challenger · ``picks_per_rater`` picks of each, one a day · ``taste`` correlation of two picks of one rater, from 0 (all
    alike) to 1 (each always prefers the same version) · ``side_bias`` log odds that the first place adds · ``first_share`` how
    often the challenger is shown first.
    """

    win_rate: float
    flips: float = 0.0
    colluders: float = 0.0
    picks_per_rater: int = 1
    taste: float = 0.0
    side_bias: float = 0.0
    first_share: float = 0.5

    def votes(self, rng: random.Random, picks: int) -> Iterator[DuelPick]:
        """``picks`` votes in rounds: day by day every rater once, in an order of its own."""
        raters = math.ceil(picks / self.picks_per_rater)
        chances: list[float | None] = [self._chance(rng) for _ in range(raters)]
        for i in rng.sample(range(raters), round(self.colluders * raters)):
            chances[i] = None
        names, order = [str(i) for i in range(raters)], list(range(raters))
        for made in range(picks):
            day, place = divmod(made, raters)
            if place == 0:
                rng.shuffle(order)
            i = order[place]
            chance = chances[i]
            is_first = rng.random() < self.first_share
            won = chance is None or rng.random() < self._told(chance, is_first)
            yield DuelPick(names[i], 1 if won else -1, _DAYS[day % len(_DAYS)], is_first)

    def _chance(self, rng: random.Random) -> float:
        """How often one rater prefers the challenger."""
        if self.taste <= 0:
            return self.win_rate
        if self.taste >= 1:
            return float(rng.random() < self.win_rate)
        spread = 1 / self.taste - 1
        return rng.betavariate(self.win_rate * spread, (1 - self.win_rate) * spread)

    def _told(self, chance: float, is_first: bool) -> float:
        if self.side_bias and 0 < chance < 1:
            odds = math.log(chance / (1 - chance)) + (self.side_bias if is_first else -self.side_bias)
            chance = 1 / (1 + math.exp(-odds))
        return chance * (1 - self.flips) + (1 - chance) * self.flips


def simulate(
    crowd: Crowd, config: GateSection, *, duels: int, picks: int, seed: int, on_step: OnStep | None = None, text: str = ""
) -> list[int]:
    """The pick after which each duel promoted, looking after every pick; 0 where it was rejected, or never in ``picks``."""
    rng = random.Random(seed)
    ends = []
    for done in range(duels):
        if on_step is not None and done % _STEP == 0:
            on_step(text, done, duels)
        ends.append(_promoted_at(crowd.votes(rng, picks), config))
    if on_step is not None:
        on_step(text, duels, duels)
    return ends


def _promoted_at(votes: Iterator[DuelPick], config: GateSection) -> int:
    counted = Count(config)
    for made, vote in enumerate(votes, 1):
        if counted.add(vote) and (winner := counted.winner):
            return made if winner == CHALLENGER else 0
    return 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to expect of a duel: ``median`` and ``p90`` picks (None beyond ``picks``), and the share promoted by some."""

    crowd: Crowd
    duels: int
    picks: int
    median: int | None
    p90: int | None
    power: tuple[tuple[int, Interval], ...]

    def as_json(self) -> dict[str, Any]:
        crowd = {name: getattr(self.crowd, name) for name in ("win_rate", "flips", "colluders", "picks_per_rater", "taste")}
        power = [{"picks": picks, **interval._asdict()} for picks, interval in self.power]
        return {**crowd, "duels": self.duels, "picks": self.picks, "median": self.median, "p90": self.p90, "power": power}


def plan(
    crowd: Crowd,
    config: GateSection,
    *,
    at: Sequence[int],
    duels: int = 2_000,
    picks: int = 4_000,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Plan:
    """Simulates ``duels`` duels of at most ``picks`` picks; ``at``: the numbers of picks whose power is wanted."""
    ends = simulate(crowd, config, duels=duels, picks=picks, seed=seed, on_step=on_step, text="simulating duels")
    promoted = sorted(end for end in ends if end)
    power = tuple((n, share(sum(end <= n for end in promoted) / duels, duels)) for n in at)
    return Plan(crowd, duels, picks, _quantile(promoted, 0.5, duels), _quantile(promoted, 0.9, duels), power)


def _quantile(promoted: Sequence[int], q: float, duels: int) -> int | None:
    """The number of picks by which a share ``q`` of all duels promoted."""
    needed = math.ceil(q * duels)
    return promoted[needed - 1] if needed <= len(promoted) else None
