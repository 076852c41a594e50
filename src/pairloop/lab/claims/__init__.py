"""The claims R1 to R13: what each says, what measures it, and what the figures must be.

A new claim is one `Claim` in a module of this folder and its name in CLAIMS.
"""

from __future__ import annotations

from collections.abc import Mapping

from pairloop.lab.claims import (
    comparison,
    displacement,
    equivalence,
    few_rounds,
    gate,
    noise,
    one_off,
    position,
    rounds,
    staleness,
)
from pairloop.lab.claims.base import Claim, Outcome, Settings

_ALL: tuple[Claim, ...] = (
    *equivalence.EQUIVALENCE,
    *comparison.COMPARISON,
    staleness.R6,
    one_off.R7,
    rounds.R8,
    noise.R9,
    gate.R10,
    position.R11,
    displacement.R12,
    few_rounds.R13,
)

CLAIMS: Mapping[str, Claim] = {claim.id: claim for claim in sorted(_ALL, key=lambda claim: int(claim.id[1:]))}

__all__ = ["CLAIMS", "Claim", "Outcome", "Settings"]
