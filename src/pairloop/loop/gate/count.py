"""From votes to evidence: which of one rater's votes count, one by one as they come."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import NamedTuple

from pairloop.config import GateSection
from pairloop.loop.gate.evidence import Staked, border, log_e_value
from pairloop.types import DuelPick

CHALLENGER, CHAMPION = 1, -1


@dataclass(frozen=True, slots=True)
class Tally:
    """The votes that count; ``raters`` counts distinct people."""

    wins: int
    losses: int
    ties: int
    raters: int

    @property
    def decisive(self) -> int:
        return self.wins + self.losses

    @property
    def votes(self) -> int:
        return self.wins + self.losses + self.ties


class _Score(NamedTuple):
    """What one rater's votes come to."""

    wins: int = 0
    losses: int = 0
    ties: int = 0

    @property
    def net(self) -> int:
        return self.wins - self.losses


class Count:
    """The record of a duel, which only grows: a vote that counts stays, for the e-process is valid only for such a record.

    With ``cluster = "rater_day"`` a rater's first vote of each (UTC) day counts, or with ties dropped the first decisive one:
    one rater's many picks are one opinion, and the first one, unlike the majority, is fixed when it is made. ``"rater"`` and
    ``"pick"`` count the first ``max_picks_per_rater`` ones, together as one vote or each as its own.
    """

    def __init__(self, config: GateSection) -> None:
        self.config = config
        self._by_day = config.cluster == "rater_day"
        self._drops_ties = config.ties == "drop"
        self._room = 1 if self._by_day else config.max_picks_per_rater
        self._used: Counter[tuple[str, date | None]] = Counter()
        self._dropped: Counter[tuple[str, date | None]] = Counter()
        self._raters: dict[str, _Score] = {}
        self._scores: Counter[_Score] = Counter()
        self._wins = self._losses = self._ties = 0
        self._staked = {winner: Staked(config.max_picks_per_rater) for winner in (CHALLENGER, CHAMPION)}
        self.counted: list[DuelPick] = []
        """The votes that count, in their order; without dropped ties."""

    def add(self, vote: DuelPick) -> bool:
        """Count a vote, which was made after all that were added before; False where it changes nothing."""
        key = (vote.rater_id, vote.created_at.date() if self._by_day else None)
        if self._used[key] >= self._room:
            return False
        if vote.outcome == 0 and self._drops_ties:
            self._dropped[key] = 1 if self._by_day else self._dropped[key] + 1
            return False
        self._used[key] += 1
        self.counted.append(vote)
        if self._by_day:
            self._dropped.pop(key, None)
        self._score(vote)
        return True

    def _score(self, vote: DuelPick) -> None:
        before = self._raters.get(vote.rater_id, _Score())
        won, lost, tied = vote.outcome > 0, vote.outcome < 0, vote.outcome == 0
        after = _Score(before.wins + won, before.losses + lost, before.ties + tied)
        self._raters[vote.rater_id] = after
        self._scores[before] -= 1
        self._scores[after] += 1
        self._wins, self._losses, self._ties = self._wins + won, self._losses + lost, self._ties + tied
        if self.config.cluster == "rater":
            for winner, staked in self._staked.items():
                staked.move(winner * before.net, winner * after.net)

    @property
    def tally(self) -> Tally:
        ties = self._dropped.total() if self._drops_ties else self._ties
        return Tally(self._wins, self._losses, ties, len(self._raters))

    @property
    def is_enough(self) -> bool:
        """Whether the minimum of decisive picks and of raters is there."""
        return self._wins + self._losses >= self.config.min_picks and len(self._raters) >= self.config.min_raters

    @property
    def left_out(self) -> int:
        """How many raters ``robust`` leaves out: the share of those who voted, rounded up."""
        return math.ceil(self.config.robust * len(self._raters) - 1e-9)

    def log_e_value(self, winner: int = CHALLENGER, *, leave_out: int = 0) -> float:
        """Log of the evidence for ``winner``, without the ``leave_out`` raters most favourable to the challenger."""
        if self.config.cluster == "rater":
            return self._staked_without(winner, leave_out).log_e_value
        wins, losses = self.evidence(leave_out)
        return log_e_value(wins, losses) if winner == CHALLENGER else log_e_value(losses, wins)

    @property
    def winner(self) -> int:
        """Who is shown to be better, by an e-value of 1/alpha; 0 while nobody is, or the minimum is missing.

        The challenger must be so without the raters whom ``robust`` leaves out, too.
        """
        if not self.is_enough:
            return 0
        if self._reaches(CHALLENGER, 0):
            return CHALLENGER if not self.left_out or self._reaches(CHALLENGER, self.left_out) else 0
        return CHAMPION if self._reaches(CHAMPION, 0) else 0

    def evidence(self, leave_out: int = 0) -> tuple[int, int]:
        """Wins and losses that enter the e-value; with ``ties = "half"`` each two ties add one of both (a supermartingale)."""
        wins, losses, ties = self._wins, self._losses, self._ties
        for score, n in self._most_favourable(leave_out):
            wins, losses, ties = wins - n * score.wins, losses - n * score.losses, ties - n * score.ties
        return wins + ties // 2, losses + ties // 2

    def _reaches(self, winner: int, leave_out: int) -> bool:
        if self.config.cluster == "rater":
            return self._staked_without(winner, leave_out).is_at_least(-math.log(self.config.alpha))
        wins, losses = self.evidence(leave_out)
        line = border(self.config.alpha)
        return line.is_reached(wins, losses) if winner == CHALLENGER else line.is_reached(losses, wins)

    def _staked_without(self, winner: int, leave_out: int) -> Staked:
        staked = self._staked[winner]
        if not leave_out:
            return staked
        return staked.without((winner * score.net, n) for score, n in self._most_favourable(leave_out))

    def _most_favourable(self, n: int) -> Iterator[tuple[_Score, int]]:
        """Scores and how many of the ``n`` raters have each: by wins less losses, among equals those of the fewest votes.

        Fewest, because the same lead over fewer votes is the stronger evidence: without it the least is left.
        """
        for score in sorted(self._scores, key=lambda score: (-score.net, sum(score))) if n else ():
            taken = min(n, self._scores[score]) if score != _Score() else 0
            n -= taken
            if taken:
                yield score, taken


def count(duel_votes: Sequence[DuelPick], config: GateSection) -> Count:
    """All votes of a duel, counted in the order they were made."""
    counted = Count(config)
    for vote in sorted(duel_votes, key=lambda vote: vote.created_at):
        counted.add(vote)
    return counted
