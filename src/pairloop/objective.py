"""Objectives: pure functions of log-probs, in the papers' words, the equation beside the line.

A batch holds B groups of G completions of at most T tokens each: ``logp_BGT``. A preference pair is a group of two with
rewards (1, 0); which of the two is the chosen one is read from the rewards alone. Notation: s = summed log-prob of a
completion, d = s - s_ref, h = d_chosen - d_rejected.

A new objective is one function and one line in OBJECTIVES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

MAX_LOG_RATIO = 30.0
"""Log-ratios are clamped to +-30 nats before ``exp`` in diagnostics (never in a loss), so that these stay finite."""

Metrics = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Batch:
    """What an objective sees.

    logp_BGT: log-probs under the policy, with gradient. ref_logp_BGT: under the reference. sampler_logp_BGT: under what sampled
    (None: the reference did). mask_BGT: True on completion tokens; other positions may hold anything and get no gradient.
    reward_BG: for a pair, 1 for the chosen and 0 for the rejected. weight_B: how much each group counts.
    """

    logp_BGT: Tensor
    ref_logp_BGT: Tensor
    mask_BGT: Tensor
    reward_BG: Tensor
    weight_B: Tensor
    sampler_logp_BGT: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ObjectiveSettings:
    """beta: strength of the pull to the reference; label_smoothing: assumed share of flipped picks; nll_weight: see ``dpo``."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_weight: float = 0.0


Objective = Callable[[Batch, ObjectiveSettings], tuple[Tensor, Metrics]]


def dpo(batch: Batch, settings: ObjectiveSettings) -> tuple[Tensor, Metrics]:
    """Direct preference optimisation on summed log-probs, with label smoothing and a likelihood term on the chosen answers.

    DPO: Rafailov et al. 2023 (2305.18290), eq. 7. Label smoothing is conservative DPO (Mitchell 2023, cDPO). The likelihood
    term is that of Pang et al. 2024 (2404.19733), eq. 1: each chosen answer's negative log-likelihood divided by its length.
    Returns the weighted mean over the pairs, and ``pair_metrics``.
    """
    chosen_B, rejected_B = _chosen_rejected(batch.reward_BG)
    d_BG = _summed(batch.logp_BGT - batch.ref_logp_BGT, batch.mask_BGT)
    h_B = _pick(d_BG, chosen_B) - _pick(d_BG, rejected_B)
    eps = settings.label_smoothing
    # L = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)
    loss_B = -(1 - eps) * logsigmoid(settings.beta * h_B)
    if eps:
        loss_B = loss_B - eps * logsigmoid(-settings.beta * h_B)
    if settings.nll_weight:
        # + nll_weight * -log pi(chosen | prompt) / |chosen|
        loss_B = loss_B + settings.nll_weight * _pick(_mean_nll(batch), chosen_B)
    loss = _mean(loss_B, batch.weight_B)
    return loss, pair_metrics(batch, settings, loss)


def sft(batch: Batch, settings: ObjectiveSettings) -> tuple[Tensor, Metrics]:
    """Chosen-only fine-tuning, the control that stands beside every claim: the rejected answers get no gradient.

    L = -log pi(chosen | prompt) / |chosen|, the weighted mean over the pairs.
    """
    chosen_B, _ = _chosen_rejected(batch.reward_BG)
    loss = _mean(_pick(_mean_nll(batch), chosen_B), batch.weight_B)
    return loss, pair_metrics(batch, settings, loss)


OBJECTIVES: Mapping[str, Objective] = {"dpo": dpo, "sft": sft}


def pair_metrics(batch: Batch, settings: ObjectiveSettings, loss: Tensor) -> Metrics:
    """What is always reported of a batch of pairs; scalars without gradient, weighted means over pairs unless said otherwise.

    loss · reward_chosen, reward_rejected: implicit rewards beta d · margin: beta h · accuracy: share with h > 0, ties half ·
    d_chosen, d_rejected: nats per completion, apart, because DPO cannot see a shift common to both · d_chosen_per_token ·
    nll_chosen: nats per token · ess: see ``effective_sample_size`` · kl: see ``kl_from_sampler``.
    """
    chosen_B, rejected_B = _chosen_rejected(batch.reward_BG)
    with torch.no_grad():
        d_BG = _summed(batch.logp_BGT - batch.ref_logp_BGT, batch.mask_BGT)
        d_chosen_B, d_rejected_B = _pick(d_BG, chosen_B), _pick(d_BG, rejected_B)
        length_B = _pick(batch.mask_BGT.sum(-1), chosen_B)
        h_B = d_chosen_B - d_rejected_B
        of_pairs = {
            "reward_chosen": settings.beta * d_chosen_B,
            "reward_rejected": settings.beta * d_rejected_B,
            "margin": settings.beta * h_B,
            "accuracy": 0.5 * (1 + torch.sign(h_B)),
            "d_chosen": d_chosen_B,
            "d_rejected": d_rejected_B,
            "d_chosen_per_token": d_chosen_B / length_B.clamp(min=1),
            "nll_chosen": _pick(_mean_nll(batch), chosen_B),
        }
        metrics = {name: _mean(value_B, batch.weight_B) for name, value_B in of_pairs.items()}
        log_w_BGT = log_weights(batch)
        metrics["ess"] = effective_sample_size(_summed(log_w_BGT, batch.mask_BGT))
        metrics["kl"] = kl_from_sampler(log_w_BGT, batch.mask_BGT)
    return {"loss": loss.detach(), **metrics}


def log_weights(batch: Batch) -> Tensor:
    """log(policy / sampler) of every token, [B, G, T], without gradient, 0 outside the completions."""
    sampler_BGT = batch.ref_logp_BGT if batch.sampler_logp_BGT is None else batch.sampler_logp_BGT
    delta_BGT = batch.logp_BGT.detach() - sampler_BGT
    return torch.where(batch.mask_BGT, delta_BGT, torch.zeros_like(delta_BGT))


def effective_sample_size(log_w: Tensor) -> Tensor:
    """ESS = (sum w)^2 / (N sum w^2) of importance weights w = policy / sampler of whole completions; any shape, in [1/N, 1].

    Kong 1992. DPO on fixed pairs follows the policy gradient only while this stays above about .8.
    """
    log_w_N = log_w.flatten().double()
    log_ess = 2 * torch.logsumexp(log_w_N, 0) - torch.logsumexp(2 * log_w_N, 0)
    return torch.exp(log_ess) / log_w_N.numel()


def kl_from_sampler(log_w_BGT: Tensor, mask_BGT: Tensor) -> Tensor:
    """An estimate of KL(sampler || policy) in nats per completion from the sampler's own tokens, never negative.

    The k3 estimator (Schulman 2020), per token and summed: (w - 1) - log w with w = policy / sampler.
    """
    bounded_BGT = log_w_BGT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return _summed(torch.expm1(bounded_BGT) - log_w_BGT, mask_BGT).mean()


def _chosen_rejected(reward_BG: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the chosen and of the rejected completion of each pair, [B] each; ValueError unless groups are decided pairs."""
    if reward_BG.shape[1] != 2:
        raise ValueError(f"a preference pair is a group of two completions, this batch has groups of {reward_BG.shape[1]}")
    if bool((reward_BG[:, 0] == reward_BG[:, 1]).any()):
        raise ValueError("a pair with equal rewards has no chosen side; ties make no preference pair")
    chosen_B = reward_BG.argmax(dim=1)
    return chosen_B, 1 - chosen_B


def _summed(value_BGT: Tensor, mask_BGT: Tensor) -> Tensor:
    """Sum over the completion's tokens, [B, G]; ``where`` keeps garbage in padding out of value and gradient."""
    return torch.where(mask_BGT, value_BGT, torch.zeros_like(value_BGT)).sum(-1)


def _mean_nll(batch: Batch) -> Tensor:
    """Negative log-likelihood of each completion per token, [B, G]."""
    return -_summed(batch.logp_BGT, batch.mask_BGT) / batch.mask_BGT.sum(-1).clamp(min=1)


def _pick(value_BG: Tensor, index_B: Tensor) -> Tensor:
    return value_BG.gather(1, index_B[:, None]).squeeze(1)


def _mean(value_B: Tensor, weight_B: Tensor) -> Tensor:
    return (value_B * weight_B).sum() / weight_B.sum()
