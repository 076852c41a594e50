"""The parts of `pairloop bench trust`: each measures one promise, and can be measured alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairloop.bench.settings import OnStep

PARTS = ("gate", "picks", "swap", "loops", "soak")
"""In the order in which they run."""


@dataclass(frozen=True, slots=True)
class TrustSettings:
    """What every part is told. ``folder``: for databases and logs; ``duels``: simulated duels of each kind."""

    folder: Path
    on_step: OnStep
    duels: int = 2_000
    seed: int = 0
    quick: bool = False
    minutes: float = 30.0
    """How long the soak takes."""


@dataclass(frozen=True, slots=True)
class Part:
    """``measure`` tells the figures as one JSON object, ``rows`` those of the table below ``headers``."""

    measure: Callable[[TrustSettings], dict[str, Any]]
    headers: Sequence[str]
    rows: Callable[[Mapping[str, Any]], Sequence[Sequence[str]]]


TITLES = {
    "gate": "The gate, on simulated duels that are looked at after every pick",
    "picks": "Picks under load, each on the disk before its 201",
    "swap": "Versions that change under load",
    "loops": "Whole loops whose picks are coin tosses",
    "soak": "Everything at once",
}


def section(found: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown: a table for each part that was measured, and when and where it was."""
    lines = []
    for name in PARTS:
        if name in found:
            one = part(name)
            lines += ["", f"{TITLES[name]} ({found[name]['measured_at'][:10]}, {found[name]['device']}):", ""]
            lines += [f"| {' | '.join(one.headers)} |", "|---" * len(one.headers) + "|"]
            lines += [f"| {' | '.join(row)} |" for row in one.rows(found[name])]
    return lines


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
    if name == "swap":
        from pairloop.bench import trust_swap

        return Part(trust_swap.measure, trust_swap.HEADERS, trust_swap.rows)
    if name == "loops":
        from pairloop.bench import trust_loops

        return Part(trust_loops.measure, trust_loops.HEADERS, trust_loops.rows)
    if name == "soak":
        from pairloop.bench import trust_soak

        return Part(trust_soak.measure, trust_soak.HEADERS, trust_soak.rows)
    raise ValueError(f"no part {name!r}: {', '.join(PARTS)}")
