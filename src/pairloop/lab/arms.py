"""Arms of the comparison: what is sampled when, which groups come of it, and how they are trained on.

All arms of a comparison start from one base, see the same prompts in the same order, and spend the same rollouts, unless
their name says otherwise (``grpo_2_quarter``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pairloop.config.train import RECIPE


@dataclass(frozen=True, slots=True)
class Arm:
    """How one arm spends its rollouts.

    sync_steps: optimizer steps between samplings, s of semi-online DPO; 0: all is sampled from the base (offline). share: of
    the budget's rollouts; the steps stay the same, their batches shrink. resamples: a step waits until enough groups have
    different scores, with fewer steps for the same rollouts (DAPO's dynamic sampling). rounds: instead of ``sync_steps``, the
    product's way: so many rounds of equal size, each with a fresh optimizer, a warm-up and a decay of its own, ``epochs``, and
    the product's round controller. heldout_share: of a round's groups, kept from training for the controller's looks.
    resync_steps: steps inside a round after which the reference is synced to the policy (0: never). group: what an arm learns
    from a sampled group, see `pairloop.lab.run.groups_of`. rate: times the comparison's learning rate. train: settings that
    differ from the comparison's.
    """

    name: str
    objective: str = "dpo"
    group_size: int = 2
    group: Literal["pair", "scores", "best"] = "pair"
    sync_steps: int = 1
    share: float = 1.0
    resamples: bool = False
    rounds: int = 0
    heldout_share: float = 0.0
    resync_steps: int = 0
    rate: float = 1.0
    train: Mapping[str, Any] = field(default_factory=dict)


def _grpo(name: str, group_size: int, **changes: Any) -> Arm:
    return Arm(name, objective="grpo", group_size=group_size, group="scores", **changes)


def _dpo(name: str, sync_steps: int, **train: Any) -> Arm:
    return Arm(name, sync_steps=sync_steps, train={"beta": 0.1, "nll_weight": 0.0, **train})


STANDARD = (
    _dpo("offline", 0),
    *(_dpo(f"dpo_s{s}", s) for s in (1, 4, 10, 16, 40)),
    _grpo("grpo_8", 8),
    _grpo("grpo_16", 16),
    _grpo("grpo_2", 2),
    _grpo("grpo_2_quarter", 2, share=0.25),
    _grpo("grpo_2_eighth", 2, share=0.125),
    _grpo("grpo_2_resampled", 2, resamples=True),
    Arm("sft", objective="sft", group="best"),
)

ONLINE_BY_NAME = (
    *(Arm(name, objective=name) for name in ("dpo", "cdpo", "rdpo", "ipo", "dpo_norm", "ld_dpo", "dpop", "dpo_nll")),
    *(Arm(name, objective=name) for name in ("simpo", "orpo", "kto")),
    *(Arm(name, objective=name, group_size=8, group="scores") for name in ("grpo", "rloo", "dr_grpo", "dapo")),
)
"""Every objective by its name, on fresh samples for each step; `sft` is among the standard arms."""


UNSTOPPED: Mapping[str, Any] = {
    "warn_ess": 0.0,
    "min_length_ratio": 0.0,
    "max_length_ratio": 0.0,
    "min_entropy_ratio": 0.0,
    "heldout_every": 0,
}
"""The round controller told to stop nothing, so that an arm shows its loss alone."""


def _rounds(name: str, resync_steps: int = 0, rate: float = 1.0, **train: Any) -> Arm:
    return Arm(name, rounds=4, resync_steps=resync_steps, rate=rate, train={"warmup_steps": 4, **UNSTOPPED, **train})


def _imitation(name: str, group_size: int, epochs: int) -> Arm:
    train = {"warmup_steps": 4, "epochs": epochs, **UNSTOPPED}
    return Arm(name, objective="sft", group="best", group_size=group_size, rounds=4, train=train)


FEW_ROUNDS = (
    _rounds("recipe", **RECIPE),
    _rounds("recipe_half_rate", rate=0.5, **RECIPE),
    Arm("recipe_controlled", rounds=4, heldout_share=0.125, train={"warmup_steps": 4, "warn_ess": 0.0, **RECIPE}),
    _rounds("rounds_4"),
    _rounds("rounds_4_beta_1", beta=1.0),
    _rounds("rounds_4_nll", nll_weight=1.0),
    _rounds("rounds_4_beta_1_nll", beta=1.0, nll_weight=1.0),
    _rounds("rounds_4_clip", token_clip=0.5),
    _rounds("rounds_4_importance", importance="sequence"),
    _rounds("rounds_4_sync", resync_steps=4),
    _rounds("rounds_4_nll_epochs_2", nll_weight=1.0, epochs=2),
    _rounds("rounds_4_beta_1_nll_epochs_2", beta=1.0, nll_weight=1.0, epochs=2),
    _imitation("rounds_4_sft", 2, 5),
    _imitation("rounds_4_sft_8", 8, 5),
    _imitation("rounds_4_sft_32", 32, 5),
    _imitation("rounds_4_sft_64", 64, 5),
)
"""The product's way, four rounds of one sampling each: the recipe for it, the levers one at a time, and imitation beside it.

``recipe`` was chosen on the tasks sort and style alone (docs/LOG.md), and so were the passes of the controls.
``recipe_controlled``: under the product's round controller, with an eighth of the pairs held out for its looks.
"""

_LONG = {"warmup_steps": 4, "final_lr_share": 1.0, "epochs": 8, "warn_ess": 0.0}

ONE_OFF = (
    Arm("one_off", rounds=1, train={**_LONG, **UNSTOPPED}),
    Arm("one_off_controlled", rounds=1, heldout_share=0.125, train={**_LONG, "heldout_every": 8}),
)
"""One sampling, and plain DPO on it for as long as the controller lets it."""

ARMS: Mapping[str, Arm] = {arm.name: arm for arm in (*STANDARD, *ONLINE_BY_NAME, *FEW_ROUNDS, *ONE_OFF)}
