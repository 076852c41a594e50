"""Thousands of duels, judged by the loop's own gate after every pick.

`loop.gate.decide` reads votes, not their order. Where every rater votes once its verdict is a function of wins and
losses, and one more win never hurts. So for each number of votes there is a least number of wins that promotes and a
greatest that rejects: `borders` finds both by asking `decide` itself, and duels are then compared with these tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache

import torch
from torch import Tensor

from pairloop.config import GateSection
from pairloop.loop.gate import decide
from pairloop.types import DuelPick, Interval
from pairloop.types import VerdictKind as Kind

DUELS_AT_ONCE = 2_000
OPENED_AT = datetime(2026, 1, 5, 8, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class PassingReport:
    """An offline report that no guardrail objects to, so that the duel alone decides."""

    metrics: Mapping[str, Interval] = field(
        default_factory=lambda: {
            "length_ratio": Interval(1.0, 1.0, 1.0, 64),
            "entropy_ratio": Interval(1.0, 1.0, 1.0, 64),
            "kl_base": Interval(0.0, 0.0, 0.0, 64),
            "bad_share_increase": Interval(0.0, 0.0, 0.0, 64),
        }
    )
    errors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Borders:
    """By number of votes n, [max_picks + 1]: the fewest wins that promote (n + 1: none), the most that reject (-1: none)."""

    promote_N: Tensor
    reject_N: Tensor


@cache
def borders(config: GateSection) -> Borders:
    """Where ``decide`` promotes and rejects, for every number of votes up to ``config.max_picks``."""
    gate = GateAsked(config)
    promote, reject = [], []
    fewest, most = 0, -1
    for n in range(config.max_picks + 1):
        while fewest > 0 and gate.verdict(fewest - 1, n - fewest + 1) is Kind.PROMOTE:
            fewest -= 1
        while fewest <= n and gate.verdict(fewest, n - fewest) is not Kind.PROMOTE:
            fewest += 1
        while most < n and gate.verdict(most + 1, n - most - 1) is Kind.REJECT:
            most += 1
        while most >= 0 and gate.verdict(most, n - most) is not Kind.REJECT:
            most -= 1
        promote.append(fewest)
        reject.append(most)
    return Borders(torch.tensor(promote), torch.tensor(reject))


class GateAsked:
    """``decide`` on so many wins and losses, one vote per rater."""

    def __init__(self, config: GateSection) -> None:
        self._config = config
        self._wins, self._losses = (
            [
                DuelPick(f"rater-{outcome}-{i}", outcome, OPENED_AT + timedelta(milliseconds=i))
                for i in range(config.max_picks + 1)
            ]
            for outcome in (1, -1)
        )

    def verdict(self, wins: int, losses: int) -> Kind:
        votes = self._wins[:wins] + self._losses[:losses]
        return decide(PassingReport(), votes, self._config, opened_at=OPENED_AT, now=OPENED_AT).kind


def promoted_at(won_DN: Tensor, table: Borders) -> Tensor:
    """The pick after which each of D duels promoted, [D], looking after every pick; 0 where none did or it was rejected before.

    won_DN: whether the challenger won each pick, in the order of the picks; at most ``max_picks`` of them.
    """
    picks = won_DN.shape[1]
    wins_DN = won_DN.cumsum(1)
    promote_D = _first(wins_DN >= table.promote_N[1 : picks + 1])
    reject_D = _first(wins_DN <= table.reject_N[1 : picks + 1])
    is_rejected_D = (reject_D > 0) & (reject_D < promote_D)
    return torch.where(is_rejected_D, torch.zeros_like(promote_D), promote_D)


def promoted_at_by_z_test(won_DN: Tensor, *, every: int) -> Tensor:
    """The planted fault: a one-sided 5 % z-test on the share of wins, repeated every ``every`` picks; as ``promoted_at``."""
    wins_DN = won_DN.cumsum(1)[:, every - 1 :: every]
    n_N = torch.arange(1, wins_DN.shape[1] + 1) * every
    return every * _first((wins_DN - n_N / 2) / (n_N / 4).sqrt() > 1.645)


def picks_of(win_rate: float, *, duels: int, picks: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Whether the challenger won each pick, [D, N] at a time, until there were ``duels`` duels."""
    for start in range(0, duels, DUELS_AT_ONCE):
        yield torch.rand(min(DUELS_AT_ONCE, duels - start), picks, generator=generator) < win_rate


def _first(flags_DN: Tensor) -> Tensor:
    """1 + the index of each row's first True, 0 where there is none."""
    return torch.where(flags_DN.any(1), flags_DN.byte().argmax(1) + 1, 0)
