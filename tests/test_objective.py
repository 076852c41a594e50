"""The objectives against hand-computed numbers, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pairloop.objective import OBJECTIVES, Batch, ObjectiveSettings, dpo, effective_sample_size, kl_from_sampler, sft

F64 = torch.float64


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


def gradient(batch: Batch, settings: ObjectiveSettings, name: str = "dpo") -> Tensor:
    loss, _ = OBJECTIVES[name](batch, settings)
    (grad,) = torch.autograd.grad(loss, batch.logp_BGT)
    return grad


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
    grad = gradient(two_pairs(), ObjectiveSettings(beta=0.5))
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


def test_label_smoothing_scales_the_gradient_at_the_reference() -> None:
    """SCIENCE table: cDPO(eps) / DPO = 1 - 2 eps where policy = reference."""
    logp = [[[-1.0, -0.5], [-2.0, -1.0]]]
    plain = gradient(batch_of(logp, logp), ObjectiveSettings())
    smoothed = gradient(batch_of(logp, logp), ObjectiveSettings(label_smoothing=0.2))
    torch.testing.assert_close(smoothed, 0.6 * plain, rtol=1e-12, atol=0)


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


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_gets_no_gradient_whatever_it_holds(name: str, garbage: float) -> None:
    mask = [[[True, True, False], [True, False, False]]]
    settings = ObjectiveSettings(beta=0.3, nll_weight=0.5, label_smoothing=0.1)
    clean = batch_of([[[-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0]]], [[[-1.1, -1.8, 0.0], [-0.7, 0.0, 0.0]]], mask=mask)
    dirty = batch_of(
        [[[-1.0, -2.0, garbage], [-0.5, garbage, garbage]]], [[[-1.1, -1.8, 0.0], [-0.7, 1.0, garbage]]], mask=mask
    )
    grad = gradient(dirty, settings, name)
    assert torch.equal(grad, gradient(clean, settings, name))
    assert torch.equal(grad[~dirty.mask_BGT], torch.zeros(3, dtype=F64))
    _, metrics = OBJECTIVES[name](dirty, settings)
    assert all(math.isfinite(value.item()) for value in metrics.values())


@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_extreme_log_ratios_stay_finite(shift: float, dtype: torch.dtype) -> None:
    logp = torch.tensor([[[shift, -1.0], [-shift, -1.0]]], dtype=dtype, requires_grad=True)
    batch = replace(
        batch_of(logp.tolist(), torch.zeros(1, 2, 2).tolist()), logp_BGT=logp, ref_logp_BGT=torch.zeros(1, 2, 2, dtype=dtype)
    )
    loss, metrics = dpo(batch, ObjectiveSettings(beta=10.0, label_smoothing=0.1, nll_weight=1.0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert logp.grad is not None
    assert bool(torch.isfinite(logp.grad).all())
    assert all(math.isfinite(value.item()) for value in metrics.values())


def test_dpo_is_grpo_with_groups_of_two_at_the_reference() -> None:
    """Cosine 1 and ratio beta against GRPO (population std, summed over tokens), through the parameters of a softmax policy."""
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(4, 11, generator=generator, dtype=F64, requires_grad=True)
    tokens_BGT = torch.randint(0, 11, (6, 2, 5), generator=generator)
    mask_BGT = torch.rand(6, 2, 5, generator=generator) < 0.7
    context_BGT = torch.randint(0, 4, (6, 2, 5), generator=generator)
    reward_BG = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 3, dtype=F64)
    logp_BGT = torch.log_softmax(theta, -1)[context_BGT, tokens_BGT]
    old_BGT = logp_BGT.detach()

    beta = 0.1
    weight_B = torch.ones(6, dtype=F64)
    loss, _ = dpo(Batch(logp_BGT, old_BGT, mask_BGT, reward_BG, weight_B), ObjectiveSettings(beta=beta))
    (of_dpo,) = torch.autograd.grad(loss, theta, retain_graph=True)

    std_B1 = reward_BG.std(1, correction=0, keepdim=True)
    advantage_BG = (reward_BG - reward_BG.mean(1, keepdim=True)) / std_B1
    ratio_BGT = torch.exp(logp_BGT - old_BGT)
    surrogate_BG = (ratio_BGT * advantage_BG[..., None] * mask_BGT).sum(-1)
    (of_grpo,) = torch.autograd.grad(-surrogate_BG.mean(), theta)

    cosine = (of_dpo * of_grpo).sum() / (of_dpo.norm() * of_grpo.norm())
    assert 1 - cosine.item() < 1e-12
    assert (of_dpo.norm() / of_grpo.norm()).item() == pytest.approx(beta, rel=1e-9)


def test_swapped_sides_are_found_out() -> None:
    """A planted fault: exchanging chosen and rejected turns the gradient round and the margin negative."""
    right = two_pairs()
    swapped = replace(right, reward_BG=1 - right.reward_BG)
    settings = ObjectiveSettings()
    _, of_right = dpo(right, settings)
    _, of_swapped = dpo(swapped, settings)
    assert of_swapped["margin"].item() == pytest.approx(-of_right["margin"].item())
    assert of_swapped["d_chosen"].item() == pytest.approx(of_right["d_rejected"].item())
    assert (gradient(right, settings) * gradient(swapped, settings)).sum().item() < 0


def test_the_rewards_and_not_the_places_say_which_is_chosen() -> None:
    right = two_pairs()
    flipped = Batch(
        right.logp_BGT.flip(1), right.ref_logp_BGT.flip(1), right.mask_BGT.flip(1), right.reward_BG.flip(1), right.weight_B
    )
    settings = ObjectiveSettings(nll_weight=0.3)
    for name, objective in OBJECTIVES.items():
        one, other = objective(right, settings)[1], objective(flipped, settings)[1]
        assert {k: v.item() for k, v in one.items()} == pytest.approx({k: v.item() for k, v in other.items()}, rel=1e-12), name


def test_weights_count_pairs() -> None:
    pairs = two_pairs()
    weighted, metrics = dpo(replace(pairs, weight_B=torch.tensor([3.0, 1.0], dtype=F64)), ObjectiveSettings(beta=1.0))
    assert weighted.item() == pytest.approx(-(3 * math.log(sigmoid(0.8)) + math.log(sigmoid(-0.3))) / 4, rel=1e-12)
    assert metrics["accuracy"].item() == pytest.approx(0.75)


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


@pytest.mark.parametrize(
    ("reward", "words"), [([[1.0, 1.0], [1.0, 0.0]], "equal rewards"), ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], "groups of 3")]
)
def test_what_is_no_pair_is_refused(reward: list[list[float]], words: str) -> None:
    zeros = torch.zeros(2, len(reward[0]), 3).tolist()
    with pytest.raises(ValueError, match=words):
        dpo(batch_of(zeros, zeros, reward=reward), ObjectiveSettings())
