"""The group family: rewards compared within a group of any size; and filtered fine-tuning, the control beside every claim.

Every function returns the loss alone, a sum over the batch over the optimizer batch's totals.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, assert_never

import torch
from torch import Tensor

from pairloop.objective.batch import (
    MAX_LOG_RATIO,
    Batch,
    ObjectiveSettings,
    bounded_weight,
    is_tied,
    log_ratio,
    log_weights,
    mean_nll,
    per,
    sampler_logp,
    summed,
    totals_of,
)

DAPO_CLIP_HIGH = 0.28


def grpo(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """Group relative policy optimisation (2402.03300, eq. 3): the clipped ratio times the advantage, and the k3 KL.

    Reads advantage_std, loss_mean, clip_low, clip_high, kl_weight, importance. The paper's own: population, sequence, .2, .2.
    With importance "sequence" each token is weighed by its whole completion's w in the place of its own clipped ratio.
    """
    advantage_BG1 = centred_rewards(batch, settings.advantage_std)[..., None]
    if settings.importance == "sequence":
        term_BGT = _sequence_weighted(batch, settings) * advantage_BG1
    else:
        ratio_BGT = torch.exp(
            log_ratio(batch.logp_BGT, sampler_logp(batch), batch.mask_BGT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        )
        # min(w A, clip(w, 1 - low, 1 + high) A)
        clipped_BGT = ratio_BGT.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        term_BGT = torch.minimum(ratio_BGT * advantage_BG1, clipped_BGT * advantage_BG1)
    return _mean_over_tokens(_with_kl(-term_BGT, batch, settings), batch, settings.loss_mean)


def dr_grpo(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """Dr. GRPO (2503.20783): `grpo` without the standard deviation and without 1 / |o|."""
    return grpo(batch, replace(settings, advantage_std="none", loss_mean="sum"))


def dapo(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """DAPO (2503.14476, eq. 8): `grpo` with a higher upper clip, the mean over the batch's tokens and no KL.

    Its dynamic sampling, which drops tied groups, is the sampler's business.
    """
    return grpo(batch, replace(settings, clip_high=DAPO_CLIP_HIGH, loss_mean="tokens", kl_weight=0.0))


def rloo(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """REINFORCE leave-one-out (2402.14740): whole completions, each against the mean reward of the others.

    Reads importance and kl_weight.
    """
    size_B1 = batch.present_BG.sum(1, keepdim=True)
    # r_i - mean_{j != i} r_j = G / (G - 1) (r_i - mean r)
    advantage_BG = centred_rewards(batch, "none") * size_B1 / (size_B1 - 1).clamp(min=1)
    weight_BG = bounded_weight(log_weights(batch).sum(-1), settings)
    term_BGT = (weight_BG * advantage_BG)[..., None] * torch.where(
        batch.mask_BGT, batch.logp_BGT, torch.zeros_like(batch.logp_BGT)
    )
    return _mean_over_tokens(_with_kl(-term_BGT, batch, settings), batch, "sum")


def sft(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """Rejection-sampling fine-tuning (2304.06767): likelihood of the completions with a reward above 0, the others ignored.

    L = -s / L of each, the mean within a group; a group without any counts as 0. On a pair that is the chosen one.
    Reads importance.
    """
    is_good_BG = (batch.reward_BG > 0) & batch.present_BG
    loss_BG = mean_nll(batch) * bounded_weight(log_weights(batch).sum(-1), settings)
    loss_B = torch.where(is_good_BG, loss_BG, torch.zeros_like(loss_BG)).sum(1) / is_good_BG.sum(1).clamp(min=1)
    return per((loss_B * batch.weight_B).sum(), (batch.totals or totals_of(batch)).weight)


def centred_rewards(batch: Batch, std: Literal["population", "sample", "none"]) -> Tensor:
    """Advantages: each reward minus its group's mean, over its group's standard deviation, [B, G].

    Exactly 0 where all the group's rewards are equal, where it has one completion and where a completion is absent. Nothing is
    added to the standard deviation: rewards (1, 0) give +-1 (population), +-1/sqrt 2 (sample) and +-1/2 (none).
    """
    present_BG = batch.present_BG
    size_B1 = present_BG.sum(1, keepdim=True)
    zeros_BG = torch.zeros_like(batch.reward_BG)
    reward_BG = torch.where(present_BG, batch.reward_BG, zeros_BG)
    mean_B1 = reward_BG.sum(1, keepdim=True) / size_B1.clamp(min=1)
    # Equal rewards are told by comparing them: their mean is rounded, so their deviations need not be 0.
    has_signal_BG = present_BG & ~is_tied(batch)[:, None]
    centred_BG = torch.where(has_signal_BG, reward_BG - mean_B1, zeros_BG)
    if std == "none":
        return centred_BG
    # In units of the largest deviation first, so that squares of tiny rewards cannot vanish.
    largest_B1 = centred_BG.abs().amax(1, keepdim=True)
    unit_BG = centred_BG / torch.where(largest_B1 > 0, largest_B1, torch.ones_like(largest_B1))
    if std == "population":
        count_B1 = size_B1
    elif std == "sample":
        count_B1 = size_B1 - 1
    else:
        assert_never(std)
    std_B1 = torch.sqrt((unit_BG**2).sum(1, keepdim=True) / count_B1.clamp(min=1))
    return unit_BG / torch.where(std_B1 > 0, std_B1, torch.ones_like(std_B1))


def _sequence_weighted(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """w of the whole completion as a value, w grad log pi of each token as its gradient, [B, G, T]."""
    weight_BG = bounded_weight(log_weights(batch).sum(-1), settings)
    return weight_BG[..., None] * torch.exp(log_ratio(batch.logp_BGT, batch.logp_BGT.detach(), batch.mask_BGT))


def _with_kl(loss_BGT: Tensor, batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """Adds kl_weight times the k3 estimate of KL(policy || reference) of each token (Schulman 2020)."""
    if not settings.kl_weight:
        return loss_BGT
    # x = log(reference / policy); k3 = exp(x) - x - 1
    x_BGT = log_ratio(batch.ref_logp_BGT, batch.logp_BGT, batch.mask_BGT).clamp(max=MAX_LOG_RATIO)
    return loss_BGT + settings.kl_weight * (torch.expm1(x_BGT) - x_BGT)


def _mean_over_tokens(loss_BGT: Tensor, batch: Batch, mean: Literal["sequence", "sum", "tokens"]) -> Tensor:
    """sequence: 1/G sum_i 1/|o_i| sum_t; sum: 1/G sum_i sum_t; both then the mean over groups. tokens: over all the batch's."""
    totals = batch.totals or totals_of(batch)
    sum_BG = summed(loss_BGT, batch.mask_BGT)
    if mean == "tokens":
        return per((sum_BG.sum(1) * batch.weight_B).sum(), totals.tokens)
    if mean == "sequence":
        sum_BG = sum_BG / batch.length_BG
    size_B = batch.present_BG.sum(1).clamp(min=1)
    return per((sum_BG.sum(1) / size_B * batch.weight_B).sum(), totals.weight)
