"""The objectives against hand-computed numbers and against the same equations in plain Python, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.objective_by_hand import F64, gradient, loss_by_hand, random_batch
from torch import Tensor

from pairloop.objective import (
    OBJECTIVES,
    Batch,
    ObjectiveSettings,
    dpo,
    effective_sample_size,
    kl_from_sampler,
    log_weights,
    sft,
    totals_of,
)
from pairloop.objective.group import centred_rewards

PAIRS = [name for name, objective in OBJECTIVES.items() if objective.needs_pairs]


def batch_of(logp: object, ref: object, *, mask: object = None, reward: object = None, weight: object = None) -> Batch:
    logp_BGT = torch.tensor(logp, dtype=F64, requires_grad=True)
    shape = logp_BGT.shape
    return Batch(
        logp_BGT=logp_BGT,
        ref_logp_BGT=torch.tensor(ref, dtype=F64),
        mask_BGT=torch.ones(shape, dtype=torch.bool) if mask is None else torch.tensor(mask),
        reward_BG=torch.tensor([[1.0, 0.0]] * shape[0] if reward is None else reward, dtype=F64),
        weight_B=torch.ones(shape[0], dtype=F64) if weight is None else torch.tensor(weight, dtype=F64),
    )


def two_pairs() -> Batch:
    """Pair 0: d+ = .3, d- = -.5, h = .8. Pair 1 (2 tokens against 1): d+ = -.2, d- = .1, h = -.3."""
    return batch_of(
        [[[-1.0, -0.5], [-2.0, -1.0]], [[-0.4, -0.6], [-0.9, 99.0]]],
        [[[-1.2, -0.6], [-1.6, -0.9]], [[-0.3, -0.5], [-1.0, -7.0]]],
        mask=[[[True, True], [True, True]], [[True, True], [True, False]]],
    )


def gradient_of(name: str, batch: Batch, settings: ObjectiveSettings) -> Tensor:
    return gradient(OBJECTIVES[name].loss(batch, settings), batch)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_is_the_papers_equation() -> None:
    loss, metrics = dpo(two_pairs(), ObjectiveSettings(beta=0.5))
    expected = -(math.log(sigmoid(0.5 * 0.8)) + math.log(sigmoid(0.5 * -0.3))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    wanted = {
        "loss": expected,
        "reward_chosen": 0.5 * (0.3 - 0.2) / 2,
        "reward_rejected": 0.5 * (-0.5 + 0.1) / 2,
        "margin": 0.5 * (0.8 - 0.3) / 2,
        "accuracy": 0.5,
        "d_chosen": 0.05,
        "d_rejected": -0.2,
        "d_chosen_per_token": (0.15 - 0.1) / 2,
        "nll_chosen": (0.75 + 0.5) / 2,
    }
    assert {name: metrics[name].item() for name in wanted} == pytest.approx(wanted, rel=1e-12)


def test_dpo_gradient_is_minus_beta_sigma_per_token() -> None:
    """grad = -beta sigmoid(-beta h) on chosen tokens, the opposite on rejected ones, over B; nothing on padding."""
    grad = gradient_of("dpo", two_pairs(), ObjectiveSettings(beta=0.5))
    a, b = 0.5 * sigmoid(-0.4) / 2, 0.5 * sigmoid(0.15) / 2
    expected = torch.tensor([[[-a, -a], [a, a]], [[-b, -b], [b, 0.0]]], dtype=F64)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)


def test_label_smoothing_and_likelihood_term() -> None:
    settings = ObjectiveSettings(beta=0.5, label_smoothing=0.1, nll_weight=0.2)
    loss, _ = dpo(two_pairs(), settings)
    expected = sum(
        -0.9 * math.log(sigmoid(0.5 * h)) - 0.1 * math.log(sigmoid(-0.5 * h)) + 0.2 * nll
        for h, nll in ((0.8, 0.75), (-0.3, 0.5))
    )
    assert loss.item() == pytest.approx(expected / 2, rel=1e-12)


def test_sft_is_the_mean_over_chosen_tokens_and_leaves_the_rejected_alone() -> None:
    batch = two_pairs()
    loss, metrics = sft(batch, ObjectiveSettings())
    assert loss.item() == pytest.approx((0.75 + 0.5) / 2, rel=1e-12)
    assert metrics["margin"].item() == pytest.approx(0.1 * 0.25, rel=1e-12)
    (grad,) = torch.autograd.grad(loss, batch.logp_BGT)
    assert torch.equal(grad[:, 1], torch.zeros(2, 2, dtype=F64))
    torch.testing.assert_close(grad[:, 0], torch.full((2, 2), -0.25, dtype=F64), rtol=1e-12, atol=0)


def test_loss_at_the_reference_is_log_2_and_nothing_has_moved() -> None:
    logp = torch.randn(5, 2, 7, generator=torch.Generator().manual_seed(0), dtype=F64).tolist()
    loss, metrics = dpo(batch_of(logp, logp), ObjectiveSettings())
    assert loss.item() == pytest.approx(math.log(2), rel=1e-15)
    assert {name: metrics[name].item() for name in ("margin", "d_chosen", "d_rejected", "kl")} == {
        "margin": 0.0,
        "d_chosen": 0.0,
        "d_rejected": 0.0,
        "kl": 0.0,
    }
    assert metrics["ess"].item() == pytest.approx(1.0, rel=1e-12)
    assert metrics["accuracy"].item() == 0.5


def test_swapped_sides_are_found_out() -> None:
    """A planted fault: exchanging chosen and rejected turns the gradient round and the margin negative."""
    right = two_pairs()
    swapped = replace(right, reward_BG=1 - right.reward_BG)
    settings = ObjectiveSettings()
    _, of_right = dpo(right, settings)
    _, of_swapped = dpo(swapped, settings)
    assert of_swapped["margin"].item() == pytest.approx(-of_right["margin"].item())
    assert of_swapped["d_chosen"].item() == pytest.approx(of_right["d_rejected"].item())
    assert (gradient_of("dpo", right, settings) * gradient_of("dpo", swapped, settings)).sum().item() < 0


def test_effective_sample_size_and_kl() -> None:
    log_w = torch.log(torch.tensor([[1.0, 2.0], [3.0, 2.0]], dtype=F64))
    assert effective_sample_size(log_w).item() == pytest.approx(64 / (4 * 18), rel=1e-12)
    one_dominates = torch.tensor([0.0, 5000.0, 0.0, 0.0])
    assert effective_sample_size(one_dominates).item() == pytest.approx(0.25)
    kl = kl_from_sampler(log_w[..., None], torch.ones(2, 2, 1, dtype=torch.bool))
    assert kl.item() == pytest.approx((0 + 2 * (1 - math.log(2)) + (2 - math.log(3))) / 4, rel=1e-12)


def test_the_sampler_and_not_the_reference_weighs_stale_pairs() -> None:
    logp = [[[-1.0], [-2.0]]]
    fresh = batch_of(logp, logp)
    stale = replace(fresh, sampler_logp_BGT=torch.tensor([[[-1.0], [-2.0 - math.log(3)]]], dtype=F64))
    assert dpo(fresh, ObjectiveSettings())[1]["ess"].item() == pytest.approx(1.0)
    assert dpo(stale, ObjectiveSettings())[1]["ess"].item() == pytest.approx(16 / (2 * 10))


def test_kl_estimate_is_the_true_kl_by_enumeration() -> None:
    """E_sampler[k3] = KL(sampler || policy) over a vocabulary of three, summed exactly."""
    sampler, policy = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    log_w = (policy / sampler).log()
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    expectation = sum(p * kl_from_sampler(w.reshape(1, 1, 1), one).item() for p, w in zip(sampler.tolist(), log_w, strict=True))
    assert expectation == pytest.approx((sampler * -log_w).sum().item(), rel=1e-12)


SETTINGS = {
    "defaults": ObjectiveSettings(),
    "smoothed": ObjectiveSettings(beta=0.7, label_smoothing=0.2, nll_weight=0.3, desirable_weight=1.5, undesirable_weight=0.5),
    "lengths": ObjectiveSettings(beta=0.4, length_normalized=True, loss_mean="tokens", advantage_std="sample", ld_alpha=0.2),
    "bounds": ObjectiveSettings(beta=0.4, token_clip=0.2, clip_low=0.1, clip_high=0.3, loss_mean="sum", dpop_weight=2.0),
    "stale": ObjectiveSettings(beta=1.3, importance="sequence", max_importance=1.2, kl_weight=0.2, advantage_std="none"),
    "margins": ObjectiveSettings(beta=2.0, simpo_margin=1.1, kl_weight=0.05, importance="none", loss_mean="sequence"),
}


def sizes_for(name: str) -> list[int]:
    return [2] * 6 if name in PAIRS else [2, 4, 1, 3, 2, 1]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_loss_is_its_equation_computed_group_by_group_in_plain_python(name: str, settings: ObjectiveSettings) -> None:
    for seed in range(4):
        batch = replace(random_batch(seed, sizes_for(name)), kl_reference=torch.tensor(0.3, dtype=F64))
        expected = loss_by_hand(name, batch, settings)
        assert OBJECTIVES[name].loss(batch, settings).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("settings", [SETTINGS[key] for key in ("defaults", "smoothed", "lengths", "bounds", "margins")])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_gradient_is_the_slope_of_the_equation_in_plain_python(name: str, settings: ObjectiveSettings) -> None:
    """Central differences of the independent computation at a few tokens; importance weights have no gradient, so not there."""
    batch = random_batch(11, sizes_for(name))
    grad = gradient_of(name, batch, settings)
    step = 1e-6
    for b, g, t in batch.mask_BGT.nonzero()[::4].tolist():
        moved = torch.zeros_like(batch.logp_BGT)
        moved[b, g, t] = step
        up, down = (
            loss_by_hand(name, replace(batch, logp_BGT=batch.logp_BGT.detach() + sign * moved), settings) for sign in (1, -1)
        )
        assert grad[b, g, t].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_plain_python_computation_would_notice_a_wrong_loss(name: str) -> None:
    """A planted fault: exchanged rewards are seen in every objective (what it compares with is not the thing itself)."""
    batch = random_batch(5, sizes_for(name), ties=False)
    wrong = OBJECTIVES[name].loss(replace(batch, reward_BG=1 - batch.reward_BG), ObjectiveSettings())
    assert wrong.item() != pytest.approx(loss_by_hand(name, batch, ObjectiveSettings()), rel=1e-3)


@pytest.mark.parametrize(("std", "size"), [("population", 1.0), ("sample", 1 / math.sqrt(2)), ("none", 0.5)])
def test_advantages_of_a_pair(std: str, size: float) -> None:
    advantage = centred_rewards(two_pairs(), std)  # type: ignore[arg-type]
    torch.testing.assert_close(advantage, torch.tensor([[size, -size]] * 2, dtype=F64), rtol=1e-15, atol=0)


def test_importance_weights_a_stale_pair_by_both_of_its_completions_up_to_the_bound() -> None:
    fresh = batch_of([[[-1.0], [-2.0]]], [[[-1.2], [-1.9]]])
    plain = dpo(fresh, ObjectiveSettings())[0].item()
    for chosen, rejected, expected in ((1.5, 1.1, 1.65), (4.0, 2.0, 2.0), (0.5, 0.8, 0.4)):
        sampler = fresh.logp_BGT.detach() - torch.tensor([[[chosen], [rejected]]], dtype=F64).log()
        loss, _ = dpo(replace(fresh, sampler_logp_BGT=sampler), ObjectiveSettings(importance="sequence"))
        assert loss.item() == pytest.approx(expected * plain, rel=1e-12)


def test_token_clip_silences_the_tokens_beyond_it() -> None:
    batch = batch_of([[[-1.0, -3.0], [-1.0, -1.0]]], [[[-1.1, -1.0], [-1.0, -1.2]]])
    loss, metrics = dpo(batch, ObjectiveSettings(beta=1.0, token_clip=0.15))
    assert loss.item() == pytest.approx(-math.log(sigmoid((0.1 - 0.15) - 0.15)), rel=1e-12)
    assert (gradient(loss, batch) != 0).tolist() == [[[True, False], [True, False]]]
    assert metrics["d_chosen"].item() == pytest.approx(-1.9), "metrics tell the log-ratios as they are"


def test_kto_of_lone_thumbs() -> None:
    batch = batch_of([[[-1.0]], [[-2.0]]], [[[-1.5]], [[-1.7]]], reward=[[1.0], [0.0]])
    settings = ObjectiveSettings(beta=0.5, desirable_weight=2.0)
    z0 = torch.tensor(0.2, dtype=F64)
    loss, metrics = OBJECTIVES["kto"](replace(batch, kl_reference=z0), settings)
    up, down = 2 * (1 - sigmoid(0.5 * (0.5 - 0.2))), 1 - sigmoid(0.5 * (0.2 + 0.3))
    assert loss.item() == pytest.approx((up + down) / 2, rel=1e-12)
    assert metrics["d_chosen"].item() == pytest.approx(0.5 / 2), "over both groups, of which one has a chosen completion"
    assert metrics["d_rejected"].item() == pytest.approx(-0.3 / 2)
    assert metrics["usable"].item() == 0
    below = OBJECTIVES["kto"].loss(replace(batch, kl_reference=-z0), settings)
    assert below.item() == OBJECTIVES["kto"].loss(batch, settings).item(), "a KL estimate below 0 counts as 0"


def test_grpo_clips_only_where_the_reward_pushes_on() -> None:
    """Ratios 2 and 1/2 on both completions: clipped are the high one of the chosen and the low one of the rejected."""
    log_2 = math.log(2)
    batch = batch_of([[[-1 + log_2, -1 - log_2], [-1 + log_2, -1 - log_2]]], [[[-1.0, -1.0], [-1.0, -1.0]]])
    loss, metrics = OBJECTIVES["grpo"](batch, ObjectiveSettings())
    assert loss.item() == pytest.approx(-((1.2 + 0.5) / 2 - (2 + 0.8) / 2) / 2, rel=1e-12)
    assert (gradient(loss, batch) != 0).tolist() == [[[False, True], [True, False]]]
    assert metrics["clip_fraction"].item() == 0.5
    loss, metrics = OBJECTIVES["grpo"](batch, ObjectiveSettings(clip_high=1.5))
    assert loss.item() == pytest.approx(-((2 + 0.5) / 2 - (2 + 0.8) / 2) / 2, rel=1e-12)
    assert metrics["clip_fraction"].item() == 0.25


def test_metrics_of_a_group_average_over_those_above_and_those_below_its_mean() -> None:
    """Rewards 1, 0, 1/2, 1 have the mean 5/8: two chosen, two rejected; the tied group beside it counts as 0."""
    logp = [[[-1.0], [-2.0], [-3.0], [-4.0]], [[-1.0], [-1.0], [-1.0], [-1.0]]]
    ref = [[[-1.1], [-2.3], [-2.8], [-4.5]], [[-9.0], [-9.0], [-9.0], [-9.0]]]
    batch = batch_of(logp, ref, reward=[[1.0, 0.0, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0]], weight=[3.0, 1.0])
    _, metrics = OBJECTIVES["rloo"](batch, ObjectiveSettings(beta=0.5))
    chosen, rejected = (0.1 + 0.5) / 2, (0.3 - 0.2) / 2
    wanted = {
        "usable": 0.75,
        "d_chosen": 0.75 * chosen,
        "d_rejected": 0.75 * rejected,
        "reward_chosen": 0.375 * chosen,
        "margin": 0.375 * (chosen - rejected),
        "accuracy": 0.75,
        "nll_chosen": 0.75 * 2.5,
    }
    assert {name: metrics[name].item() for name in wanted} == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("size", [1, 3])
def test_what_is_no_pair_is_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"needs preference pairs.*groups of {size}"):
        OBJECTIVES[name](random_batch(0, [2, size]), ObjectiveSettings())


def test_rdpo_refuses_picks_that_say_nothing() -> None:
    with pytest.raises(ValueError, match=r"below 0\.5"):
        OBJECTIVES["rdpo"](two_pairs(), ObjectiveSettings(label_smoothing=0.5))


def test_the_table_knows_what_each_objective_asks_for() -> None:
    """Read off the losses: another reference changes exactly those that need one, another z0 exactly those that want it."""
    for name, objective in OBJECTIVES.items():
        batch = random_batch(3, [2, 2, 2], ties=False)
        moved = torch.linspace(0, 1, batch.ref_logp_BGT.numel(), dtype=F64).reshape(batch.ref_logp_BGT.shape)
        other = replace(batch, ref_logp_BGT=batch.ref_logp_BGT - moved)
        with_z0 = replace(batch, kl_reference=torch.tensor(0.5, dtype=F64))
        loss, of_other, of_z0 = (objective.loss(each, ObjectiveSettings()).item() for each in (batch, other, with_z0))
        assert (loss != of_other) == objective.needs_reference, name
        assert (loss != of_z0) == objective.wants_kl_reference, name


def test_totals_and_weights_of_what_is_present() -> None:
    batch = random_batch(2, [3, 1])
    totals = totals_of(batch)
    weights, tokens = batch.weight_B.tolist(), batch.mask_BGT.sum((1, 2)).tolist()
    assert totals.weight == pytest.approx(sum(weights))
    assert totals.completions == pytest.approx(3 * weights[0] + weights[1])
    assert totals.tokens == pytest.approx(sum(w * n for w, n in zip(weights, tokens, strict=True)))
    of_present = log_weights(batch).sum(-1)[batch.present_BG]
    assert of_present.numel() == 4
    _, metrics = OBJECTIVES["grpo"](batch, ObjectiveSettings())
    assert metrics["ess"].item() == pytest.approx(effective_sample_size(of_present).item(), rel=1e-12)
    one_weight, of_ones = (
        replace(batch, weight_B=torch.full((2,), 3.0, dtype=F64)),
        kl_from_sampler(log_weights(batch), batch.mask_BGT),
    )
    assert OBJECTIVES["grpo"](one_weight, ObjectiveSettings())[1]["kl"].item() == pytest.approx(of_ones.item(), rel=1e-12)
    assert effective_sample_size(torch.zeros(0)).item() == 1
