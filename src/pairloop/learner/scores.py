"""Pairs through the model: log-probs as [B, G, T] tensors, with gradient for training and without for scoring."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pairloop.learner.data import TokenPair, micro_batches
from pairloop.objective import Batch
from pairloop.policy.scoring import completion_logps

SCORING_PAIRS = 32
"""Pairs scored by one forward pass where the configuration sets no micro batch; without gradient, memory is no concern."""


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probs of the chosen and of the rejected completion's tokens, float32 on the CPU, one dimension each."""

    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True, slots=True)
class References:
    """By pair id: log-probs under the reference, and under the sampler where it was another version than the reference."""

    reference: dict[str, PairLogps]
    sampler: dict[str, PairLogps]


def precision(device: torch.device, dtype: str, method: str) -> AbstractContextManager[object]:
    """bfloat16 products over float32 weights for full fine-tuning, whose small updates bfloat16 weights would lose.

    With LoRA the base is loaded in bfloat16 and the adapter in float32, so nothing is to be done.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16" and method == "full")


def pair_logps(model: nn.Module, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
    """(``logp_BGT`` with gradient, ``mask_BGT``) of the pairs; G = 2, the chosen completion first."""
    prompts = [pair.prompt for pair in pairs]
    sides = [pair.chosen.token_ids for pair in pairs] + [pair.rejected.token_ids for pair in pairs]
    logp_NT, mask_NT = completion_logps(model, prompts + prompts, sides)
    shape = (2, len(pairs), logp_NT.shape[1])
    return logp_NT.view(shape).transpose(0, 1), mask_NT.view(shape).transpose(0, 1)


@torch.no_grad()
def score(model: nn.Module, pairs: Sequence[TokenPair], *, micro_batch_size: int) -> list[PairLogps]:
    """The pairs' log-probs under the model as it is, in their order; like lengths are scored together."""
    found: dict[int, PairLogps] = {}
    for part in micro_batches(pairs, micro_batch_size or SCORING_PAIRS):
        logp_BGT, _ = pair_logps(model, part)
        for pair, logp_GT in zip(part, logp_BGT.float().cpu(), strict=True):
            chosen, rejected = (
                logp_GT[i, : len(side.token_ids)].clone() for i, side in enumerate((pair.chosen, pair.rejected))
            )
            found[id(pair)] = PairLogps(chosen, rejected)
    return [found[id(pair)] for pair in pairs]


def batch_of(pairs: Sequence[TokenPair], logp_BGT: Tensor, mask_BGT: Tensor, references: References) -> Batch:
    """The objective's view of the pairs: chosen first, so that the rewards are (1, 0)."""
    device = logp_BGT.device
    reference = [references.reference[pair.pair_id] for pair in pairs]
    sampler = [references.sampler.get(pair.pair_id, other) for pair, other in zip(pairs, reference, strict=True)]
    width = logp_BGT.shape[-1]
    return Batch(
        logp_BGT=logp_BGT,
        ref_logp_BGT=padded(reference, width).to(device),
        sampler_logp_BGT=padded(sampler, width).to(device) if references.sampler else None,
        mask_BGT=mask_BGT,
        reward_BG=torch.tensor([[1.0, 0.0]], device=device).expand(len(pairs), 2),
        weight_B=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32, device=device),
    )


def padded(logps: Sequence[PairLogps], width: int) -> Tensor:
    """[B, 2, width] on the CPU, zeros behind the completions."""
    out_BGT = torch.zeros(len(logps), 2, width)
    for b, pair in enumerate(logps):
        out_BGT[b, 0, : len(pair.chosen)] = pair.chosen
        out_BGT[b, 1, : len(pair.rejected)] = pair.rejected
    return out_BGT
