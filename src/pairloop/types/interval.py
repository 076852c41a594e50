"""A number that was estimated."""

from __future__ import annotations

from typing import NamedTuple


class Interval(NamedTuple):
    """A point estimate with its 95 % interval and the number of observations behind it."""

    mean: float
    lo: float
    hi: float
    n: int
