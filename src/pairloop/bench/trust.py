"""The parts of `pairloop bench trust`: each measures one promise, and can be measured alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairloop.bench.settings import OnStep

PARTS = ("gate", "picks")
"""In the order in which they run."""


@dataclass(frozen=True, slots=True)
class TrustSettings:
    """What every part is told. ``folder``: for databases and logs; ``duels``: simulated duels of each kind."""

    folder: Path
    on_step: OnStep
    duels: int = 2_000
    seed: int = 0
    quick: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """``measure`` tells the figures as one JSON object, ``rows`` those of the table below ``headers``."""

    measure: Callable[[TrustSettings], dict[str, Any]]
    headers: Sequence[str]
    rows: Callable[[Mapping[str, Any]], Sequence[Sequence[str]]]


def part(name: str) -> Part:
    """The part of this name, its module imported only now."""
    if name == "gate":
        from pairloop.bench import trust_gate

        return Part(
            lambda settings: trust_gate.measure(duels=settings.duels, seed=settings.seed, on_step=settings.on_step),
            trust_gate.HEADERS,
            trust_gate.rows,
        )
    if name == "picks":
        from pairloop.bench import trust_picks

        return Part(trust_picks.measure, trust_picks.HEADERS, trust_picks.rows)
    raise ValueError(f"no part {name!r}: {', '.join(PARTS)}")
