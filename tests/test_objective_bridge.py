"""The bridge between DPO and GRPO: where their gradients are the same up to a factor, and where they are not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.objective_by_hand import F64, gradient, random_batch

from pairloop.objective import OBJECTIVES, Batch, ObjectiveSettings
from pairloop.objective.preference import cdpo


def at_the_reference(seed: int, n: int = 6) -> Batch:
    """Decided pairs of ragged lengths, where policy = reference = sampler, of weight 1."""
    batch = random_batch(seed, [2] * n, ties=False)
    return replace(batch, ref_logp_BGT=batch.logp_BGT.detach(), sampler_logp_BGT=None, weight_B=torch.ones(n, dtype=F64))


def bridge(name: str, chosen: ObjectiveSettings, batch: Batch, *, base: str = "dpo") -> tuple[float, float]:
    """1 - cosine with the gradient of DPO, and how many times as long that of DPO is."""
    of_dpo = gradient(OBJECTIVES[base].loss(batch, replace(chosen, label_smoothing=0.0)), batch).flatten()
    other = gradient(OBJECTIVES[name].loss(batch, chosen), batch).flatten()
    return 1 - (of_dpo @ other / (of_dpo.norm() * other.norm())).item(), (of_dpo.norm() / other.norm()).item()


BETA, E, PAIRS = 0.3, 0.2, 6
TABLE = [
    ("grpo", {"loss_mean": "sum"}, BETA),
    ("grpo", {"loss_mean": "sum", "advantage_std": "sample"}, math.sqrt(2) * BETA),
    ("grpo", {"loss_mean": "sum", "advantage_std": "none"}, 2 * BETA),
    ("grpo", {"loss_mean": "sum", "clip_low": 0.01, "clip_high": 0.01}, BETA),
    ("grpo", {"loss_mean": "sum", "kl_weight": 0.5}, BETA),
    ("grpo", {"loss_mean": "sum", "importance": "sequence"}, BETA),
    ("dr_grpo", {}, 2 * BETA),
    ("rloo", {}, BETA),
    ("cdpo", {"label_smoothing": E}, 1 / (1 - 2 * E)),
    ("rdpo", {"label_smoothing": E}, 1 - 2 * E),
    ("ipo", {}, BETA * BETA / 2),
    ("kto", {}, 4.0),
    ("dpop", {}, 1.0),
    ("dpo", {"token_clip": 0.1}, 1.0),
    ("dpo", {"importance": "sequence"}, 1.0),
]


@pytest.mark.parametrize(("name", "options", "ratio"), TABLE)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_bridge_between_the_objectives_at_the_reference(
    name: str, options: dict[str, object], ratio: float, seed: int
) -> None:
    """At policy = reference = sampler, over ragged lengths; ratio is |gradient of DPO| / |gradient of the other|."""
    chosen = replace(ObjectiveSettings(beta=BETA), **options)  # type: ignore[arg-type]
    distance, found = bridge(name, chosen, at_the_reference(seed, PAIRS))
    assert distance < 1e-12
    assert found == pytest.approx(ratio, rel=1e-9)


def test_dapo_is_dpo_times_the_tokens_over_twice_the_pairs() -> None:
    batch = at_the_reference(2, PAIRS)
    distance, found = bridge("dapo", ObjectiveSettings(beta=BETA), batch)
    assert distance < 1e-12
    assert found == pytest.approx(BETA * int(batch.mask_BGT.sum()) / (2 * PAIRS), rel=1e-9)


def test_length_normalisation_is_a_real_difference() -> None:
    """GRPO's 1 / |o| is normalised DPO's d / L, and neither is summed DPO unless all lengths are equal."""
    batch = at_the_reference(3, PAIRS)
    distance, found = bridge("grpo", ObjectiveSettings(beta=BETA), batch, base="dpo_norm")
    assert distance < 1e-12
    assert found == pytest.approx(BETA, rel=1e-9)
    assert bridge("grpo", ObjectiveSettings(beta=BETA), batch)[0] > 0.01
    equal = replace(batch, mask_BGT=torch.ones_like(batch.mask_BGT))
    assert bridge("grpo", ObjectiveSettings(beta=BETA), equal)[0] < 1e-12


def test_the_bridge_finds_planted_faults() -> None:
    """Off the reference the equality is gone, and a constant added to the standard deviation shows in the ratio."""
    batch = at_the_reference(4, PAIRS)
    chosen = ObjectiveSettings(beta=BETA, loss_mean="sum")
    away_BGT = torch.linspace(-0.5, 0.5, batch.ref_logp_BGT.numel(), dtype=F64).reshape(batch.ref_logp_BGT.shape)
    drifted = replace(batch, ref_logp_BGT=batch.ref_logp_BGT + away_BGT)
    assert bridge("grpo", chosen, drifted)[0] > 1e-4
    scaled = gradient(OBJECTIVES["grpo"].loss(batch, chosen), batch) * (0.5 / (0.5 + 1e-4))
    assert gradient(OBJECTIVES["dpo"].loss(batch, chosen), batch).norm() / scaled.norm() != pytest.approx(BETA, rel=1e-9)


def test_at_a_flip_rate_of_one_half_a_pick_says_nothing() -> None:
    batch = at_the_reference(5)
    loss = cdpo(batch, ObjectiveSettings(label_smoothing=0.5))
    assert gradient(loss, batch).abs().max().item() < 1e-16


def test_rdpo_is_unbiased_under_flips() -> None:
    """(1 - e) of the loss as picked and e of it flipped is plain DPO's, at every margin (2403.00409)."""
    batch = random_batch(6, [2] * 5, ties=False)
    chosen = ObjectiveSettings(beta=0.9, label_smoothing=E)
    as_picked = OBJECTIVES["rdpo"].loss(batch, chosen)
    flipped = OBJECTIVES["rdpo"].loss(replace(batch, reward_BG=1 - batch.reward_BG), chosen)
    plain = OBJECTIVES["dpo"].loss(batch, replace(chosen, label_smoothing=0.0))
    assert ((1 - E) * as_picked + E * flipped).item() == pytest.approx(plain.item(), rel=1e-12)
