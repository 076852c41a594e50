"""What an objective sees and what every objective is made of: sums over tokens, means over the optimizer batch, both masked.

Notation, here and in the modules beside this one: s = summed log-prob of a completion, d = s - s_ref, L = its length in
tokens, h = d_chosen - d_rejected, w = policy / sampler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 30.0
"""Log-ratios are held below 30 nats before ``exp``: a ratio of 1e13 stands for every larger one and nothing overflows."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What means divide by, summed over the whole optimizer batch, of which a `Batch` may be one micro batch.

    weight: of all groups. tokens: weight x completion tokens. completions: weight x completions present.
    """

    weight: float
    tokens: float
    completions: float


@dataclass(frozen=True, slots=True)
class Batch:
    """B groups of at most G completions of at most T tokens; a preference pair is a group of two with rewards (1, 0).

    logp_BGT: log-probs under the policy, with gradient. ref_logp_BGT: under the reference. mask_BGT: True on completion tokens;
    other positions may hold anything and get no gradient. A completion is present where its mask has a True, so groups of
    different sizes share a batch by padding G. reward_BG: see each objective. weight_B: how much each group counts.
    sampler_logp_BGT: under what sampled (None: the reference did). totals: see `Totals` (None: this batch is the whole).
    kl_reference: an estimate of KL(policy || reference), nats per completion, a scalar without gradient, KTO's z0 (None: 0).
    """

    logp_BGT: Tensor
    ref_logp_BGT: Tensor
    mask_BGT: Tensor
    reward_BG: Tensor
    weight_B: Tensor
    sampler_logp_BGT: Tensor | None = None
    totals: Totals | None = None
    kl_reference: Tensor | None = None

    @property
    def present_BG(self) -> Tensor:
        return self.mask_BGT.any(-1)

    @property
    def length_BG(self) -> Tensor:
        """Tokens of each completion; 1 where there is none, so that it can be divided by."""
        return self.mask_BGT.sum(-1).clamp(min=1)


@dataclass(frozen=True, slots=True)
class ObjectiveSettings:
    """Every objective's settings; each reads those that its docstring or its equation names. Log-ratios are in nats."""

    beta: float = 0.1  # strength of the pull to the reference; IPO's tau, ORPO's lambda
    label_smoothing: float = 0.0  # assumed share of flipped picks
    nll_weight: float = 0.0  # DPO and its kin: of the chosen's negative log-likelihood per token (2404.19733, eq. 1)
    length_normalized: bool = False  # d / L in the place of d
    token_clip: float = 0.0  # bound on each token's log-ratio to the reference before the loss; 0: none
    importance: Literal["none", "sequence"] = "none"  # sequence: what stale samples say is weighed by w, without gradient
    max_importance: float = 2.0  # bound on w
    ld_alpha: float = 0.5  # LD-DPO: what a token beyond the shorter completion's length counts
    dpop_weight: float = 5.0  # lambda of DPOP
    simpo_margin: float = 0.5  # gamma of SimPO
    desirable_weight: float = 1.0  # lambda_D of KTO
    undesirable_weight: float = 1.0  # lambda_U of KTO
    clip_low: float = 0.2  # group family: a token's w stays above 1 - clip_low
    clip_high: float = 0.2  # and below 1 + clip_high
    kl_weight: float = 0.0  # group family: of the k3 estimate of KL(policy || reference)
    advantage_std: Literal["population", "sample", "none"] = "population"  # what a group's centred rewards are divided by
    loss_mean: Literal["sequence", "sum", "tokens"] = "sequence"  # over a completion's tokens, none, over the batch's tokens


def totals_of(batch: Batch) -> Totals:
    """The batch's own totals: what it divides by when it is the whole optimizer batch."""
    weight_B = batch.weight_B
    return Totals(
        weight=float(weight_B.sum()),
        tokens=float((weight_B * batch.mask_BGT.sum((1, 2))).sum()),
        completions=float((weight_B * batch.present_BG.sum(1)).sum()),
    )


def per(total: Tensor, count: float) -> Tensor:
    """total / count; where nothing counts the total is 0 and stays so, with its graph."""
    return total / (count or 1.0)


def summed(value_BGT: Tensor, mask_BGT: Tensor) -> Tensor:
    """Sum over the completion's tokens, [B, G]; ``where`` keeps garbage in padding out of value and gradient."""
    return torch.where(mask_BGT, value_BGT, torch.zeros_like(value_BGT)).sum(-1)


def pick(value_BG: Tensor, index_B: Tensor) -> Tensor:
    """The value of one completion of each group, [B]."""
    return value_BG.gather(1, index_B[:, None]).squeeze(1)


def log_ratio(logp_BGT: Tensor, other_BGT: Tensor, mask_BGT: Tensor) -> Tensor:
    """log(policy / other) of every token, [B, G, T], 0 outside the completions."""
    delta_BGT = logp_BGT - other_BGT
    return torch.where(mask_BGT, delta_BGT, torch.zeros_like(delta_BGT))


def sampler_logp(batch: Batch) -> Tensor:
    return batch.ref_logp_BGT if batch.sampler_logp_BGT is None else batch.sampler_logp_BGT


def mean_nll(batch: Batch) -> Tensor:
    """Negative log-likelihood of each completion per token, [B, G]."""
    return -summed(batch.logp_BGT, batch.mask_BGT) / batch.length_BG


def log_weights(batch: Batch) -> Tensor:
    """log(policy / sampler) of every token, [B, G, T], without gradient, 0 outside the completions."""
    return log_ratio(batch.logp_BGT.detach(), sampler_logp(batch), batch.mask_BGT)


def bounded_weight(log_w: Tensor, settings: ObjectiveSettings) -> Tensor:
    """min(exp(log_w), max_importance) without gradient, and 1 where ``importance`` is "none"; any shape.

    Truncated importance sampling (Ionides 2008): the bound costs bias and caps the variance.
    """
    if settings.importance == "none":
        return torch.ones_like(log_w)
    return torch.exp(log_w.detach().clamp(max=math.log(settings.max_importance)))


def is_tied(batch: Batch) -> Tensor:
    """Where all rewards of a group's completions are equal, [B]; a group of one is."""
    present_BG = batch.present_BG
    highest_B = batch.reward_BG.masked_fill(~present_BG, -math.inf).amax(1)
    lowest_B = batch.reward_BG.masked_fill(~present_BG, math.inf).amin(1)
    return highest_B <= lowest_B


def chosen_rejected(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the best and of the worst completion of each pair, and whether it is decided (rewards differ), [B] each.

    ValueError unless every group has two completions. Of a tied pair both indices are the same completion.
    """
    present_BG = batch.present_BG
    size_B = present_BG.sum(1)
    if bool((size_B != 2).any()):
        found = sorted({int(size) for size in size_B.tolist()} - {2})
        sizes = ", ".join(map(str, found))
        raise ValueError(f"this objective needs preference pairs, groups of two completions; this batch has groups of {sizes}")
    chosen_B = batch.reward_BG.masked_fill(~present_BG, -math.inf).argmax(1)
    rejected_B = batch.reward_BG.masked_fill(~present_BG, math.inf).argmin(1)
    return chosen_B, rejected_B, pick(batch.reward_BG, chosen_B) > pick(batch.reward_BG, rejected_B)
