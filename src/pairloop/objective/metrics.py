"""What is always reported of a batch, whichever objective trains: scalars without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from pairloop.objective.batch import (
    MAX_LOG_RATIO,
    Batch,
    ObjectiveSettings,
    is_tied,
    log_ratio,
    log_weights,
    mean_nll,
    per,
    summed,
    totals_of,
)

Metrics = dict[str, Tensor]


@torch.no_grad()
def group_metrics(batch: Batch, settings: ObjectiveSettings, loss: Tensor) -> Metrics:
    """Weighted sums over the batch's groups, over the optimizer batch's totals: those of micro batches add up, save ``ess``.

    Chosen and rejected are a pair's two, and in general the completions with a reward above and below their group's mean, each
    averaged within the group; a lone completion is chosen where its reward is above 0, else rejected. A group without such a
    completion counts as 0, so divide by ``usable``, the share of groups that have both, to speak of these alone.

    loss · reward_chosen, reward_rejected: implicit rewards beta d · margin: beta h · accuracy: share with h > 0, ties half ·
    d_chosen, d_rejected: nats per completion, apart, because DPO cannot see a shift common to both · d_chosen_per_token ·
    nll_chosen: nats per token · kl: see ``kl_from_sampler`` · clip_fraction: share of tokens on which clipping stops, or in
    GRPO would stop, the gradient · ess: see ``effective_sample_size``, of this batch alone.
    """
    totals = batch.totals or totals_of(batch)
    chosen_BG, rejected_BG = _sides(batch)
    log_w_BGT = log_weights(batch)
    d_BG = log_ratio(batch.logp_BGT, batch.ref_logp_BGT, batch.mask_BGT).sum(-1)
    d_chosen_B, d_rejected_B = _mean_of(d_BG, chosen_BG), _mean_of(d_BG, rejected_BG)
    is_usable_B = chosen_BG.any(1) & rejected_BG.any(1)
    h_B = torch.where(is_usable_B, d_chosen_B - d_rejected_B, torch.zeros_like(d_chosen_B))
    of_groups = {
        "reward_chosen": settings.beta * d_chosen_B,
        "reward_rejected": settings.beta * d_rejected_B,
        "margin": settings.beta * h_B,
        "accuracy": 0.5 * (1 + torch.sign(h_B)) * is_usable_B,
        "usable": is_usable_B.to(h_B.dtype),
        "d_chosen": d_chosen_B,
        "d_rejected": d_rejected_B,
        "d_chosen_per_token": _mean_of(d_BG / batch.length_BG, chosen_BG),
        "nll_chosen": _mean_of(mean_nll(batch), chosen_BG),
    }
    metrics = {name: per((value_B * batch.weight_B).sum(), totals.weight) for name, value_B in of_groups.items()}
    kl_B = _k3(log_w_BGT, batch.mask_BGT).sum(1)
    metrics["kl"] = per((kl_B * batch.weight_B).sum(), totals.completions)
    stopped_B = _stopped_by_clipping(log_w_BGT, chosen_BG, rejected_BG, settings).sum((1, 2))
    metrics["clip_fraction"] = per((stopped_B * batch.weight_B).sum(), totals.tokens)
    metrics["ess"] = effective_sample_size(log_w_BGT.sum(-1)[batch.present_BG])
    return {"loss": loss.detach(), **metrics}


def effective_sample_size(log_w: Tensor) -> Tensor:
    """ESS = (sum w)^2 / (N sum w^2) of importance weights w = policy / sampler of whole completions; any shape, in [1/N, 1].

    Kong 1992. DPO on fixed pairs follows the policy gradient only while this stays above about .8. Parts of a batch do not add
    up to the whole's: take it of all their log-weights. Of none it is 1.
    """
    log_w_N = log_w.flatten().double()
    if not log_w_N.numel():
        return torch.ones_like(log_w_N.sum())
    log_ess = 2 * torch.logsumexp(log_w_N, 0) - torch.logsumexp(2 * log_w_N, 0)
    return torch.exp(log_ess) / log_w_N.numel()


def kl_from_sampler(log_w_BGT: Tensor, mask_BGT: Tensor) -> Tensor:
    """An estimate of KL(sampler || policy) in nats per completion from the sampler's own tokens, never negative.

    The k3 estimator (Schulman 2020), per token and summed: (w - 1) - log w with w = policy / sampler.
    """
    return per(_k3(log_w_BGT, mask_BGT).sum(), float(mask_BGT.any(-1).sum()))


def _k3(log_w_BGT: Tensor, mask_BGT: Tensor) -> Tensor:
    bounded_BGT = log_w_BGT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return summed(torch.expm1(bounded_BGT) - log_w_BGT, mask_BGT)


def _sides(batch: Batch) -> tuple[Tensor, Tensor]:
    """Which completions are chosen and which rejected, [B, G] each; neither of a tied group."""
    present_BG = batch.present_BG
    reward_BG = torch.where(present_BG, batch.reward_BG, torch.zeros_like(batch.reward_BG))
    size_B1 = present_BG.sum(1, keepdim=True)
    mean_B1 = reward_BG.sum(1, keepdim=True) / size_B1.clamp(min=1)
    is_tied_B1 = is_tied(batch)[:, None] & (size_B1 > 1)
    is_lone_B1 = size_B1 == 1
    threshold_B1 = torch.where(is_lone_B1, torch.zeros_like(mean_B1), mean_B1)
    chosen_BG = present_BG & ~is_tied_B1 & (reward_BG > threshold_B1)
    rejected_BG = present_BG & ~is_tied_B1 & torch.where(is_lone_B1, reward_BG <= threshold_B1, reward_BG < threshold_B1)
    return chosen_BG, rejected_BG


def _mean_of(value_BG: Tensor, select_BG: Tensor) -> Tensor:
    """Mean over a group's selected completions, 0 where it has none, [B]."""
    return torch.where(select_BG, value_BG, torch.zeros_like(value_BG)).sum(1) / select_BG.sum(1).clamp(min=1)


def _stopped_by_clipping(log_w_BGT: Tensor, chosen_BG: Tensor, rejected_BG: Tensor, settings: ObjectiveSettings) -> Tensor:
    """Tokens whose ratio has left the clip range on the side to which the reward pushes it, [B, G, T]."""
    ratio_BGT = torch.exp(log_w_BGT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    too_high_BGT = chosen_BG[..., None] & (ratio_BGT > 1 + settings.clip_high)
    return too_high_BGT | (rejected_BG[..., None] & (ratio_BGT < 1 - settings.clip_low))
