"""Claims that are written down and that nothing here measures yet: each leaves this file when its measurement is written."""

from __future__ import annotations

from pairloop.lab.claims.base import Claim

PENDING: tuple[Claim, ...] = (
    Claim(
        id="R4",
        title="At equal rollouts offline DPO falls far behind; semi-online DPO, online DPO and GRPO are about equal",
        threshold="online ≥ GRPO − 3 points; s = 10 ≥ online − 3; offline ≤ online − 10; on the tasks and learning rates "
        "declared beforehand; failures and the SFT control printed",
        command="pairloop lab compare",
    ),
    Claim(
        id="R5",
        title="GRPO with groups of two keeps up with groups of sixteen",
        threshold="at equal rollouts ≥ .97 of 16-GRPO's score; at a quarter ≥ .93; at an eighth reported as it is",
        command="pairloop lab compare",
    ),
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
    Claim(
        id="R12",
        title="Likelihood displacement, and its guard",
        threshold="d⁺ < 0 on near-duplicates without the guard, ≥ −.1 nat per token with it",
        command="pairloop lab claim R12",
    ),
)
