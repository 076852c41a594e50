"""Requests per minute, as buckets that fill up steadily, so that a caller that was quiet may send a minute's worth at once;
and places, for what stays open."""

from __future__ import annotations

import ipaddress
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Literal, NamedTuple

CALLERS = 10_000
"""Buckets kept; the one that was not used for longest goes first."""


def network_of(address: str) -> str:
    """What stands for an address where callers are counted: of IPv6 the /64, within which one host may take any address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.ip_network((int(ip), 64), strict=False))


class Taken(NamedTuple):
    """What is left after one request. ``retry_s`` is 0 where it was let in; ``reset_s``: until the bucket is full again."""

    per_minute: int
    remaining: int
    reset_s: float
    retry_s: int


class Buckets:
    """One bucket per caller; lives in one event loop."""

    def __init__(self, now: Callable[[], float] = monotonic) -> None:
        self._now = now
        self._filled: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str, per_minute: int) -> Taken:
        """Take one request out of the caller's bucket, which holds ``per_minute``."""
        now, rate = self._now(), per_minute / 60.0
        level, at = self._filled.pop(caller, (float(per_minute), now))
        level = min(float(per_minute), level + (now - at) * rate)
        let_in = level >= 1.0 - 1e-9
        level -= let_in
        self._filled[caller] = (level, now)
        if len(self._filled) > CALLERS:
            self._filled.popitem(last=False)
        retry_s = 0 if let_in else math.ceil((1.0 - level) / rate)
        return Taken(per_minute, max(0, int(level)), (per_minute - level) / rate, retry_s)


class Places:
    """So many may be open at a time, of one caller and in all; lives in one event loop."""

    def __init__(self, per_caller: int, in_all: int) -> None:
        self._per_caller = per_caller
        self._in_all = in_all
        self._of: Counter[str] = Counter()

    @property
    def open(self) -> int:
        return self._of.total()

    @contextmanager
    def taken(self, caller: str) -> Iterator[Literal["caller", "all"] | None]:
        """A place as long as it is entered; where none is left, whose places are: the caller's or all."""
        if self._of[caller] >= self._per_caller:
            yield "caller"
            return
        if self.open >= self._in_all:
            yield "all"
            return
        self._of[caller] += 1
        try:
            yield None
        finally:
            self._of[caller] -= 1
            self._of += Counter()  # who has none open is not remembered
