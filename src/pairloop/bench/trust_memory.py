"""The memory of a server under a steady load: readings, and by a line whether it grows once the caches are full."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, linear_regression
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from pairloop.bench.servers import Server
from pairloop.statistics import T95
from pairloop.types import Interval

TENTHS = 10
WARM_UP = 2
"""Tenths in which libraries, compiled statements and SQLite's pages come in; the line begins after them."""
SQLITE = "pairloop_sqlite_memory_bytes"


@dataclass
class Memory:
    """Megabytes, reading by reading: of the whole process, and what SQLite holds of it. ``peak_mb``: as the system saw it."""

    rss_mb: list[float] = field(default_factory=list)
    sqlite_mb: list[float] = field(default_factory=list)
    peak_mb: float = 0.0

    async def read(self, server: Server, http: httpx.AsyncClient) -> None:
        """One more reading; raises what the server's ``/metrics`` raises, and ValueError where SQLite is not in it."""
        text = (await http.get("/metrics")).raise_for_status().text
        self.rss_mb.append(server.rss_mb)
        self.peak_mb = server.peak_mb
        self.sqlite_mb.append(_sqlite_mb(text))


def _sqlite_mb(text: str) -> float:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == SQLITE:
                return float(sample.value) / 1e6
    raise ValueError(f"{SQLITE} is not among the server's metrics")


def figures(memory: Memory, minutes: float) -> dict[str, Any]:
    """What the report says; the first reading was taken before the load, the others evenly through ``minutes``."""
    rss, sqlite = (tenths(readings[1:]) for readings in (memory.rss_mb, memory.sqlite_mb))
    others = [whole - part for whole, part in zip(rss, sqlite, strict=True)]
    return {
        "first_mb": round(memory.rss_mb[0], 1),
        "peak_mb": round(memory.peak_mb, 1),
        "rss_mb": [round(one, 1) for one in rss],
        "sqlite_mb": [round(one, 1) for one in sqlite],
        "warm_up_minutes": minutes * WARM_UP / TENTHS,
        "growth": _growth(rss, minutes),
        "growth_without_sqlite": _growth(others, minutes),
    }


def tenths(readings: Sequence[float]) -> list[float]:
    """The mean of each tenth of the readings, of which there are ten at least."""
    bounds = [round(len(readings) * k / TENTHS) for k in range(TENTHS + 1)]
    return [fmean(readings[begin:end]) for begin, end in pairwise(bounds)]


def _growth(mb: Sequence[float], minutes: float) -> dict[str, list[float]]:
    """[value, low, high] in MB an hour, and in per cent from the first to the last tenth after the warm-up."""
    settled = mb[WARM_UP:]
    line = slope(settled)  # MB a tenth
    percent = 100 * (len(settled) - 1) / (fmean(settled) - line.mean * (len(settled) - 1) / 2)
    each = line[:3]
    return {
        "mb_per_hour": [round(one * TENTHS * 60 / minutes, 2) for one in each],
        "percent": [round(one * percent, 2) for one in each],
    }


def slope(values: Sequence[float]) -> Interval:
    """Of the least-squares line through at least three values, a step apart, with Student's 95 % interval.

    It takes what is left beside the line for independent: use means of stretches, not single readings.
    """
    n = len(values)
    if n < 3:
        raise ValueError(f"a line with an interval takes three values, not {n}")
    value, at_zero = linear_regression(range(n), values)
    left_over = math.fsum((one - at_zero - value * step) ** 2 for step, one in enumerate(values))
    half = T95[min(n - 3, len(T95) - 1)] * math.sqrt(left_over / (n - 2) * 12 / (n * (n * n - 1)))
    return Interval(value, value - half, value + half, n)


def told(found: Mapping[str, Any]) -> tuple[str, str]:
    """Two cells in words: how much memory, and whether it grows."""
    first, rss, sqlite = found["first_mb"], found["rss_mb"], found["sqlite_mb"]
    where = f"{first:.0f} at the start, {rss[WARM_UP]:.0f} in the tenth after {found['warm_up_minutes']:g} minutes of warm-up, "
    where += f"{rss[-1]:.0f} in the last one (of it SQLite's: {sqlite[WARM_UP]:.0f}, then {sqlite[-1]:.0f}); "
    where += f"peak {found['peak_mb']:.0f}"
    growth, others = found["growth"], found["growth_without_sqlite"]
    words = f"{_between(growth['percent'], ' %')} ({_between(growth['mb_per_hour'], ' MB an hour')}); "
    return where, words + f"without SQLite's {_between(others['mb_per_hour'], ' MB an hour')}"


def _between(of: Sequence[float], unit: str) -> str:
    value, low, high = of
    return f"{value:+.1f}{unit} [{low:+.1f}, {high:+.1f}]"
