"""The objectives once more, in plain Python on lists of floats, one group after another; and batches to compare on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pairloop.objective import Batch, ObjectiveSettings

F64 = torch.float64


@dataclass(frozen=True)
class Completion:
    logp: list[float]
    ref: list[float]
    sampler: list[float]
    reward: float

    @property
    def length(self) -> int:
        return len(self.logp)

    @property
    def log_w(self) -> float:
        return sum(self.logp) - sum(self.sampler)

    @property
    def nll(self) -> float:
        return -sum(self.logp) / self.length

    def d(self, s: ObjectiveSettings, upto: int | None = None) -> float:
        """Log-ratio to the reference; tokens from ``upto`` on count ld_alpha."""
        total = 0.0
        for t, (logp, ref) in enumerate(zip(self.logp, self.ref, strict=True)):
            delta = logp - ref
            if s.token_clip:
                delta = max(-s.token_clip, min(s.token_clip, delta))
            total += delta if upto is None or t < upto else s.ld_alpha * delta
        return total / self.length if s.length_normalized else total


@dataclass(frozen=True)
class GroupByHand:
    completions: list[Completion]
    weight: float

    @property
    def rewards(self) -> list[float]:
        return [completion.reward for completion in self.completions]


def read(batch: Batch) -> list[GroupByHand]:
    """The batch's groups without any padding."""
    sampler_BGT = batch.ref_logp_BGT if batch.sampler_logp_BGT is None else batch.sampler_logp_BGT
    groups = []
    for b in range(batch.logp_BGT.shape[0]):
        completions = []
        for g in range(batch.logp_BGT.shape[1]):
            keep = batch.mask_BGT[b, g]
            if keep.any():
                logp, ref, sampler = (
                    rows_BGT[b, g][keep].tolist() for rows_BGT in (batch.logp_BGT, batch.ref_logp_BGT, sampler_BGT)
                )
                completions.append(Completion(logp, ref, sampler, batch.reward_BG[b, g].item()))
        groups.append(GroupByHand(completions, batch.weight_B[b].item()))
    return groups


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def bounded(log_w: float, s: ObjectiveSettings) -> float:
    return 1.0 if s.importance == "none" else min(math.exp(log_w), s.max_importance)


def smoothed(z: float, s: ObjectiveSettings) -> float:
    return -(1 - s.label_smoothing) * log_sigmoid(z) - s.label_smoothing * log_sigmoid(-z)


def of_pair(name: str, chosen: Completion, rejected: Completion, s: ObjectiveSettings) -> float:
    if name in ("cdpo", "rdpo") and not s.label_smoothing:
        s = replace(s, label_smoothing=0.1)
    if name == "dpo_norm":
        s = replace(s, length_normalized=True)
    if name == "dpo_nll" and not s.nll_weight:
        s = replace(s, nll_weight=1.0)
    h, e = chosen.d(s) - rejected.d(s), s.label_smoothing
    extra = s.nll_weight * chosen.nll
    if name == "rdpo":
        return (-(1 - e) * log_sigmoid(s.beta * h) + e * log_sigmoid(-s.beta * h)) / (1 - 2 * e) + extra
    if name == "ipo":
        return (h - 0.5 / s.beta) ** 2 + extra
    if name == "ld_dpo":
        shorter = min(chosen.length, rejected.length)
        return smoothed(s.beta * (chosen.d(s, shorter) - rejected.d(s, shorter)), s) + extra
    if name == "dpop":
        return smoothed(s.beta * (h - s.dpop_weight * max(0.0, -chosen.d(s))), s) + extra
    if name == "simpo":
        return smoothed(s.beta * (rejected.nll - chosen.nll) - s.simpo_margin, s) + extra
    if name == "orpo":
        p, q = math.exp(-chosen.nll), math.exp(-rejected.nll)
        return chosen.nll - s.beta * log_sigmoid(math.log(p / (1 - p)) - math.log(q / (1 - q)))
    return smoothed(s.beta * h, s) + extra


def preference_loss(name: str, groups: Sequence[GroupByHand], s: ObjectiveSettings) -> float:
    total = 0.0
    for group in groups:
        chosen, rejected = sorted(group.completions, key=lambda completion: -completion.reward)
        if chosen.reward != rejected.reward:
            total += group.weight * bounded(chosen.log_w + rejected.log_w, s) * of_pair(name, chosen, rejected, s)
    return total / sum(group.weight for group in groups)


def kto_loss(groups: Sequence[GroupByHand], s: ObjectiveSettings, z0: float = 0.0) -> float:
    total = count = 0.0
    for group in groups:
        for completion in group.completions:
            count += group.weight
            r = s.beta * (completion.d(s) - max(z0, 0.0))
            value = sigmoid(r) if completion.reward > 0 else sigmoid(-r)
            scale = s.desirable_weight if completion.reward > 0 else s.undesirable_weight
            total += group.weight * bounded(completion.log_w, s) * scale * (1 - value)
    return total / count


def advantages(rewards: Sequence[float], std: str) -> list[float]:
    mean = sum(rewards) / len(rewards)
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    squares = sum((reward - mean) ** 2 for reward in rewards)
    scale = {"none": 1.0, "population": squares / len(rewards), "sample": squares / (len(rewards) - 1)}[std] ** 0.5
    return [(reward - mean) / scale for reward in rewards]


def token_kl(completion: Completion, t: int, s: ObjectiveSettings) -> float:
    x = completion.ref[t] - completion.logp[t]
    return s.kl_weight * (math.exp(x) - x - 1)


def clipped_terms(completion: Completion, advantage: float, s: ObjectiveSettings) -> list[float]:
    """What GRPO's mean is over: one loss per token."""
    terms = []
    for t in range(completion.length):
        if s.importance == "sequence":
            term = bounded(completion.log_w, s) * advantage
        else:
            w = math.exp(completion.logp[t] - completion.sampler[t])
            term = min(w * advantage, max(1 - s.clip_low, min(1 + s.clip_high, w)) * advantage)
        terms.append(-term + token_kl(completion, t, s))
    return terms


def grpo_loss(groups: Sequence[GroupByHand], s: ObjectiveSettings) -> float:
    total = 0.0
    for group in groups:
        for completion, advantage in zip(group.completions, advantages(group.rewards, s.advantage_std), strict=True):
            terms = clipped_terms(completion, advantage, s)
            if s.loss_mean == "tokens":
                total += group.weight * sum(terms)
            else:
                length = completion.length if s.loss_mean == "sequence" else 1
                total += group.weight * sum(terms) / length / len(group.completions)
    if s.loss_mean == "tokens":
        return total / sum(group.weight * completion.length for group in groups for completion in group.completions)
    return total / sum(group.weight for group in groups)


def rloo_loss(groups: Sequence[GroupByHand], s: ObjectiveSettings) -> float:
    total = 0.0
    for group in groups:
        for i, completion in enumerate(group.completions):
            others = [reward for j, reward in enumerate(group.rewards) if j != i]
            advantage = completion.reward - sum(others) / len(others) if others else 0.0
            loss = -bounded(completion.log_w, s) * advantage * sum(completion.logp)
            loss += sum(token_kl(completion, t, s) for t in range(completion.length))
            total += group.weight * loss / len(group.completions)
    return total / sum(group.weight for group in groups)


def sft_loss(groups: Sequence[GroupByHand], s: ObjectiveSettings) -> float:
    total = 0.0
    for group in groups:
        good = [bounded(completion.log_w, s) * completion.nll for completion in group.completions if completion.reward > 0]
        total += group.weight * sum(good) / len(good) if good else 0.0
    return total / sum(group.weight for group in groups)


def loss_by_hand(name: str, batch: Batch, s: ObjectiveSettings) -> float:
    groups = read(batch)
    of_group: dict[str, Callable[[], float]] = {
        "kto": lambda: kto_loss(groups, s, 0.0 if batch.kl_reference is None else batch.kl_reference.item()),
        "grpo": lambda: grpo_loss(groups, s),
        "dr_grpo": lambda: grpo_loss(groups, replace(s, advantage_std="none", loss_mean="sum")),
        "dapo": lambda: grpo_loss(groups, replace(s, clip_high=0.28, loss_mean="tokens", kl_weight=0.0)),
        "rloo": lambda: rloo_loss(groups, s),
        "sft": lambda: sft_loss(groups, s),
    }
    return of_group[name]() if name in of_group else preference_loss(name, groups, s)


def random_batch(seed: int, sizes: Sequence[int], *, tokens: int = 5, drift: float = 0.3, ties: bool = True) -> Batch:
    """Groups of these sizes, G padded to the largest: a policy, a reference and a sampler ``drift`` nats per token apart.

    Masks have holes and completions differ in length; rewards are 0, 1 or (where there are more than two) 1/2.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(sizes), max(sizes), tokens)
    logp_BGT = -0.1 - 2 * torch.rand(shape, generator=generator, dtype=F64)
    ref_BGT, sampler_BGT = (logp_BGT + drift * torch.randn(shape, generator=generator, dtype=F64) for _ in range(2))
    mask_BGT = torch.rand(shape, generator=generator) < 0.6
    mask_BGT[..., 0] |= ~mask_BGT.any(-1)
    reward_BG = torch.randint(0, 3, shape[:2], generator=generator).to(F64) / 2
    for b, size in enumerate(sizes):
        mask_BGT[b, size:] = False
        if size <= 2:
            reward_BG[b] = (reward_BG[b] > 0.6).to(F64)
        if size == 2 and not ties:
            reward_BG[b, 1] = 1 - reward_BG[b, 0]
    weight_B = 0.5 + torch.rand(shape[0], generator=generator, dtype=F64)
    return Batch(logp_BGT.requires_grad_(), ref_BGT, mask_BGT, reward_BG, weight_B, sampler_logp_BGT=sampler_BGT)


def gradient(loss: Tensor, batch: Batch) -> Tensor:
    (grad,) = torch.autograd.grad(loss, batch.logp_BGT, retain_graph=True)
    return grad
