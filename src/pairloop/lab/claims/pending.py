"""Claims that are written down and that nothing here measures yet: each leaves this file when its measurement is written."""

from __future__ import annotations

from pairloop.lab.claims.base import Claim

PENDING: tuple[Claim, ...] = (
    Claim(
        id="R6",
        title="Staleness is the cost: the mean ESS predicts the final score",
        threshold="Spearman(mean ESS, final score) ≥ .7 over a grid of s × learning rate",
        command="pairloop lab claim R6",
    ),
    Claim(
        id="R7",
        title="One-off DPO over-optimises, and the round controller stops it in time",
        threshold="the hump is visible, and the controller stops within 10 % of its peak",
        command="pairloop lab claim R7",
    ),
    Claim(
        id="R8",
        title="Rounds pay, with diminishing returns",
        threshold="three positive rounds on held-out prompts",
        command="pairloop lab claim R8",
    ),
)
