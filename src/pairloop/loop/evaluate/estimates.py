"""Estimates with intervals, paired by prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pairloop.errors import UserError
from pairloop.statistics import Z95, share
from pairloop.types import Interval


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the influence of each sample on it (delta method), so that ratios and differences stay paired by prompt."""

    value: float
    influence: tuple[float, ...]

    def interval(self, every: int | None = None) -> Interval:
        """Normal 95 % interval. Samples ``every`` places apart share a prompt: they are one observation of it, not several."""
        n = len(self.influence)
        by_prompt = [math.fsum(self.influence[i :: every or n]) for i in range(every or n)]
        spread = math.fsum(i * i for i in by_prompt) * len(by_prompt) / (len(by_prompt) - 1)
        half = Z95 * math.sqrt(spread) / n
        return Interval(self.value, self.value - half, self.value + half, n)


def mean(values: Sequence[float]) -> Estimate:
    value = math.fsum(values) / len(values)
    return Estimate(value, tuple(one - value for one in values))


def ratio(a: Estimate, b: Estimate) -> Estimate:
    if b.value == 0:
        raise UserError("the ratio is undefined: its denominator is 0")
    value = a.value / b.value
    return Estimate(value, tuple((i - value * j) / b.value for i, j in zip(a.influence, b.influence, strict=True)))


def difference(a: Estimate, b: Estimate) -> Estimate:
    return Estimate(a.value - b.value, tuple(i - j for i, j in zip(a.influence, b.influence, strict=True)))


def shared(estimate: Estimate) -> Interval:
    return share(estimate.value, len(estimate.influence))
