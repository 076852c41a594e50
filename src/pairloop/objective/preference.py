"""The preference family: what a pick says of two completions, as a loss on the pair; KTO also of one completion alone.

Every function returns the loss alone, a sum over the batch's groups over the optimizer batch's total weight. Tied pairs count
as 0 and stay in the denominator: only so is one online DPO step an unbiased step up the policy gradient.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pairloop.objective.batch import (
    Batch,
    ObjectiveSettings,
    bounded_weight,
    chosen_rejected,
    log_ratio,
    log_weights,
    mean_nll,
    per,
    pick,
    totals_of,
)

USUAL_FLIP_RATE = 0.1
"""Label smoothing of `cdpo` and `rdpo` where the settings have none, with which they would be plain DPO."""


def dpo(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """Direct preference optimisation (2305.18290, eq. 7), with label smoothing (cDPO) and likelihood of the chosen as options.

    Reads beta, label_smoothing, nll_weight, length_normalized, token_clip, importance.
    """
    return _of_pairs(batch, settings, _smoothed(_margin(batch, settings), settings.beta, settings.label_smoothing))


def cdpo(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """Conservative DPO (Mitchell 2023): `dpo` with label smoothing, `USUAL_FLIP_RATE` where the settings have none."""
    return dpo(batch, replace(settings, label_smoothing=settings.label_smoothing or USUAL_FLIP_RATE))


def rdpo(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """Robust DPO (2403.00409): unbiased under flips of share e = label_smoothing (`USUAL_FLIP_RATE` where 0).

    ValueError where e is not below one half: beyond it a pick says the opposite.
    """
    e = settings.label_smoothing or USUAL_FLIP_RATE
    if not 0 < e < 0.5:
        raise ValueError(f"rdpo needs label_smoothing below 0.5, not {e}: at one half a pick says nothing")
    z_B = settings.beta * _margin(batch, settings)
    # L = [-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2e)
    return _of_pairs(batch, settings, (-(1 - e) * logsigmoid(z_B) + e * logsigmoid(-z_B)) / (1 - 2 * e))


def ipo(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """Identity preference optimisation (2310.12036, eq. 17), tau = beta: a margin to reach and not to pass.

    On summed log-probs as in the paper; elsewhere often on means over tokens, which here is length_normalized.
    """
    # L = (h - 1 / (2 tau))^2
    return _of_pairs(batch, settings, (_margin(batch, settings) - 1 / (2 * settings.beta)) ** 2)


def dpo_norm(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """Length-normalised DPO (2411.15124): `dpo` with d / L in the place of d."""
    return dpo(batch, replace(settings, length_normalized=True))


def ld_dpo(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """Length-desensitised DPO (2409.06411): tokens beyond the shorter completion's length count ld_alpha."""
    chosen_B, rejected_B, _ = chosen_rejected(batch)
    length_BG = batch.mask_BGT.sum(-1)
    shared_B = torch.minimum(pick(length_BG, chosen_B), pick(length_BG, rejected_B))
    # d = sum_{t <= l} delta_t + alpha sum_{t > l} delta_t, l = the shorter length; the n-th token is the n-th True of the mask
    is_shared_BGT = batch.mask_BGT.cumsum(-1) <= shared_B[:, None, None]
    delta_BGT = _token_log_ratio(batch, settings)
    d_BG = _over_length(torch.where(is_shared_BGT, delta_BGT, settings.ld_alpha * delta_BGT).sum(-1), batch, settings)
    h_B = pick(d_BG, chosen_B) - pick(d_BG, rejected_B)
    return _of_pairs(batch, settings, _smoothed(h_B, settings.beta, settings.label_smoothing))


def dpop(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """DPO-positive (2402.13228): a chosen completion that lost likelihood is paid for, dpop_weight times."""
    chosen_B, rejected_B, _ = chosen_rejected(batch)
    d_BG = _reference_log_ratio(batch, settings)
    d_chosen_B = pick(d_BG, chosen_B)
    # L = -log sigmoid(beta (h - lambda max(0, -d_chosen)))
    h_B = d_chosen_B - pick(d_BG, rejected_B) - settings.dpop_weight * torch.relu(-d_chosen_B)
    return _of_pairs(batch, settings, _smoothed(h_B, settings.beta, settings.label_smoothing))


def dpo_nll(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """DPO and the chosen's likelihood (2404.19733, eq. 1): `dpo` with nll_weight, 1 where the settings have none."""
    return dpo(batch, replace(settings, nll_weight=settings.nll_weight or 1.0))


def simpo(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """SimPO (2405.14734, eq. 6): mean log-probs in the place of log-ratios, no reference; gamma = simpo_margin."""
    chosen_B, rejected_B, _ = chosen_rejected(batch)
    reward_BG = -settings.beta * mean_nll(batch)
    # L = -log sigmoid(beta s_chosen / L_chosen - beta s_rejected / L_rejected - gamma)
    z_B = pick(reward_BG, chosen_B) - pick(reward_BG, rejected_B) - settings.simpo_margin
    return _of_pairs(batch, settings, _smoothed(z_B, 1.0, settings.label_smoothing))


def orpo(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """ORPO (2403.07691, eq. 6): likelihood of the chosen, and the log odds ratio weighed by lambda = beta; no reference."""
    chosen_B, rejected_B, _ = chosen_rejected(batch)
    nll_BG = mean_nll(batch)
    # log odds = log p - log(1 - p), p = exp(s / L)
    log_p_BG = (-nll_BG).clamp(max=-torch.finfo(nll_BG.dtype).eps)
    log_odds_BG = log_p_BG - torch.log(-torch.expm1(log_p_BG))
    odds_ratio_B = pick(log_odds_BG, chosen_B) - pick(log_odds_BG, rejected_B)
    loss_B = pick(nll_BG, chosen_B) - settings.beta * logsigmoid(odds_ratio_B)
    return _of_pairs(batch, replace(settings, nll_weight=0.0), loss_B)


def kto(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """Kahneman-Tversky optimisation (2402.01306): of pairs and of lone thumbs, the mean over completions.

    A completion is desirable where its reward is above 0, whatever its group's others have. z0 = max(0, kl_reference).
    Reads beta, desirable_weight, undesirable_weight, length_normalized, token_clip, importance.
    """
    implicit_BG = settings.beta * _reference_log_ratio(batch, settings)
    z0 = 0.0 if batch.kl_reference is None else settings.beta * batch.kl_reference.clamp(min=0)
    is_desirable_BG = batch.reward_BG > 0
    # L = lambda_D (1 - sigmoid(beta d - beta z0)) where desirable, lambda_U (1 - sigmoid(beta z0 - beta d)) where not
    loss_BG = torch.where(
        is_desirable_BG,
        settings.desirable_weight * torch.sigmoid(z0 - implicit_BG),
        settings.undesirable_weight * torch.sigmoid(implicit_BG - z0),
    )
    loss_BG = loss_BG * bounded_weight(log_weights(batch).sum(-1), settings)
    loss_B = torch.where(batch.present_BG, loss_BG, torch.zeros_like(loss_BG)).sum(1)
    return per((loss_B * batch.weight_B).sum(), (batch.totals or totals_of(batch)).completions)


def _token_log_ratio(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """log(policy / reference) of every token, bounded by token_clip: beyond it a token has no more to say, nor a gradient."""
    delta_BGT = log_ratio(batch.logp_BGT, batch.ref_logp_BGT, batch.mask_BGT)
    return delta_BGT.clamp(-settings.token_clip, settings.token_clip) if settings.token_clip else delta_BGT


def _over_length(d_BG: Tensor, batch: Batch, settings: ObjectiveSettings) -> Tensor:
    return d_BG / batch.length_BG if settings.length_normalized else d_BG


def _reference_log_ratio(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """d of each completion, or d / L where length_normalized, [B, G]."""
    return _over_length(_token_log_ratio(batch, settings).sum(-1), batch, settings)


def _margin(batch: Batch, settings: ObjectiveSettings) -> Tensor:
    """h = d_chosen - d_rejected of each pair, [B]."""
    chosen_B, rejected_B, _ = chosen_rejected(batch)
    d_BG = _reference_log_ratio(batch, settings)
    return pick(d_BG, chosen_B) - pick(d_BG, rejected_B)


def _smoothed(h_B: Tensor, beta: float, e: float) -> Tensor:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)."""
    loss_B = -(1 - e) * logsigmoid(beta * h_B)
    return loss_B - e * logsigmoid(-beta * h_B) if e else loss_B


def _of_pairs(batch: Batch, settings: ObjectiveSettings, loss_B: Tensor) -> Tensor:
    """The weighted mean over pairs, ties counted as 0: with the chosen's likelihood, and weighed where the pairs are stale.

    A pair is drawn as two independent completions, so its weight is the product of theirs.
    """
    chosen_B, _, is_decided_B = chosen_rejected(batch)
    if settings.nll_weight:
        # + nll_weight * -s_chosen / L_chosen
        loss_B = loss_B + settings.nll_weight * pick(mean_nll(batch), chosen_B)
    loss_B = loss_B * bounded_weight(log_weights(batch).sum((1, 2)), settings)
    loss_B = torch.where(is_decided_B, loss_B, torch.zeros_like(loss_B))
    return per((loss_B * batch.weight_B).sum(), (batch.totals or totals_of(batch)).weight)
