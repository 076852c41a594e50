"""Whole loops whose picks are coin tosses: how many versions are promoted that nobody prefers.

Each loop is `pairloop demo` with customers who toss a coin: a server, four cycles that train, and four duels. Its seed is
drawn, not chosen, and told.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pairloop.bench.settings import OnStep
from pairloop.bench.trust import TrustSettings
from pairloop.config import GateSection
from pairloop.demo.run import DemoOptions, run_demo
from pairloop.statistics import binomial_tail

HEADERS = ("loops", "duels", "promoted", "at most", "chance of so many or more at alpha")
LOOPS, QUICK_LOOPS = 20, 1
CUSTOMERS = 128
"""Who train, per cycle: what they toss for matters little here, and it is their duels that count."""
SURE = 0.025
"""The bound is the largest number of promotions that is not rarer than this where every duel errs with chance alpha."""


class _Quiet:
    """Tells how far the loops are, and leaves their own lines out."""

    def __init__(self, tell: OnStep) -> None:
        self._tell = tell

    def stage(self, text: str) -> None:
        pass

    def bar(self, text: str, done: int, of: int) -> None:
        self._tell(text, done, of)


def measure(settings: TrustSettings) -> dict[str, Any]:
    """So many loops, one after the other; promotions are counted over all their duels."""
    loops = QUICK_LOOPS if settings.quick else LOOPS
    folder = settings.folder / "loops"
    shutil.rmtree(folder, ignore_errors=True)
    seeds, verdicts = [], []
    for number in range(loops):
        seed = random.SystemRandom().randrange(2**31)
        watcher = _Quiet(partial(_within, settings.on_step, number, loops))
        done = run_demo(DemoOptions(out=folder / str(number), seed=seed, noise=1.0, customers=CUSTOMERS), watcher)
        seeds.append(seed)
        verdicts.append([one.verdict for one in done.rounds if one.duel_picks > 0])
        shutil.rmtree(folder / str(number), ignore_errors=True)
    duels = sum(len(of_loop) for of_loop in verdicts)
    promoted = sum(of_loop.count("PROMOTE") for of_loop in verdicts)
    alpha = GateSection().alpha
    return {
        "loops": loops,
        "duels": duels,
        "promoted": promoted,
        "bound": bound(duels, alpha),
        "p_so_many": binomial_tail(promoted, duels, alpha),
        "seeds": seeds,
        "verdicts": verdicts,
    }


def rows(found: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """The table of ``measure``, below `HEADERS`."""
    return [
        (
            f"{found['loops']:,}",
            f"{found['duels']:,}",
            f"{found['promoted']:,}",
            f"{found['bound']:,}",
            f"{found['p_so_many']:.2f}",
        )
    ]


def bound(duels: int, alpha: float) -> int:
    return max(k for k in range(duels + 1) if binomial_tail(k, duels, alpha) >= SURE)


def _within(tell: OnStep, number: int, loops: int, text: str, done: int, of: int) -> None:
    tell(f"loop {number + 1} of {loops}, {text}", done, of)
