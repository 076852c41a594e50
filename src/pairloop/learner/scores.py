"""Groups through the model: log-probs as [B, G, T] tensors, with gradient for training and without for scoring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pairloop.learner.batches import MicroBatch
from pairloop.learner.data import TokenGroup
from pairloop.learner.memory import TokenBudget
from pairloop.learner.sharding import Sharded, free
from pairloop.learner.workers import ALONE, Workers
from pairloop.objective import Batch, Totals
from pairloop.policy.scoring import completion_logps

SCORING_TOKENS = 16_384
"""Tokens that one scoring pass reads at most where the configuration sets no bound."""

GroupLogps = tuple[Tensor, ...]
"""Log-probs of each completion's tokens, float32 on the CPU, one dimension each."""


@dataclass(frozen=True, slots=True)
class References:
    """By group id: log-probs under the reference, and under the sampler where it was another version than the reference."""

    reference: Mapping[str, GroupLogps]
    sampler: Mapping[str, GroupLogps] = field(default_factory=dict)


@contextmanager
def precision(model: nn.Module, dtype: str) -> Iterator[None]:
    """While open, bfloat16 products over float32 weights where training is in bfloat16, whose own would lose small updates.

    With LoRA these are the adapter's weights, and its inputs stay in the base's bfloat16. Rounded weights are not cached: the
    cache lives as long as the context, which is the whole round, and steps would not see what others changed.
    """
    with ExitStack() as stack:
        if dtype == "bfloat16":
            stack.enter_context(torch.autocast(next(model.parameters()).device.type, torch.bfloat16, cache_enabled=False))
            if hasattr(model, "peft_config"):
                from peft.helpers import disable_input_dtype_casting

                stack.enter_context(disable_input_dtype_casting(model))
        yield


def group_logps(model: nn.Module, groups: Sequence[TokenGroup]) -> tuple[Tensor, Tensor]:
    """(``logp_BGT`` with gradient, ``mask_BGT``) of the groups; smaller groups are filled up with completions of no token."""
    if isinstance(model, Sharded):
        found: tuple[Tensor, Tensor] = model(groups)
        return found
    prompts = [group.prompt for group in groups for _ in group.completions]
    completions = [completion.token_ids for group in groups for completion in group.completions]
    logp_NT, mask_NT = completion_logps(model, prompts, completions)
    sizes = torch.tensor([len(group.completions) for group in groups])
    n_groups, largest, n_tokens = len(groups), int(sizes.max()), logp_NT.shape[1]
    if bool((sizes == largest).all()):
        shape = (n_groups, largest, n_tokens)
        return logp_NT.view(shape), mask_NT.view(shape)
    b, g = (torch.arange(largest) < sizes[:, None]).nonzero(as_tuple=True)
    row = (b * largest + g).to(logp_NT.device)
    logp_MT = logp_NT.new_zeros(n_groups * largest, n_tokens).index_copy(0, row, logp_NT)
    mask_MT = mask_NT.new_zeros(n_groups * largest, n_tokens).index_copy(0, row, mask_NT)
    return logp_MT.view(n_groups, largest, n_tokens), mask_MT.view(n_groups, largest, n_tokens)


@torch.no_grad()
def score(
    model: nn.Module, groups: Sequence[TokenGroup], budget: TokenBudget | None = None, workers: Workers = ALONE
) -> list[GroupLogps]:
    """The groups' log-probs under the model as it is, in their order, in micro batches within ``budget``.

    Each worker scores its share, and all of them get all.
    """

    def work(parts: list[MicroBatch]) -> dict[str, GroupLogps]:
        found: dict[str, GroupLogps] = {}
        idle = workers.idle_passes(len(parts))
        for part in parts:
            logp_BGT, _ = group_logps(model, part.groups)
            for group, logp_GT in zip(part.groups, logp_BGT.float().cpu(), strict=True):
                found[group.group_id] = tuple(
                    logp_GT[g, : len(completion.token_ids)].clone() for g, completion in enumerate(group.completions)
                )
        for _ in range(idle):
            group_logps(model, groups[:1])
        return found

    budget = budget or TokenBudget()
    found = budget.run(model, workers.share(groups), work, unbounded=SCORING_TOKENS)
    free(model)
    everywhere = {group_id: logps for part in workers.gather(found) for group_id, logps in part.items()}
    budget.agree(workers)
    return [everywhere[group.group_id] for group in groups]


def batch_of(
    groups: Sequence[TokenGroup],
    logp_BGT: Tensor,
    mask_BGT: Tensor,
    references: References,
    totals: Totals | None = None,
) -> Batch:
    """The objective's view of the groups; ``totals`` of the optimizer batch of which they are a part."""
    device = logp_BGT.device
    reference = [references.reference[group.group_id] for group in groups]
    sampler = [references.sampler.get(group.group_id, other) for group, other in zip(groups, reference, strict=True)]
    _, largest, width = logp_BGT.shape
    rewards = [[*group.rewards, *[0.0] * (largest - len(group.rewards))] for group in groups]
    return Batch(
        logp_BGT=logp_BGT,
        ref_logp_BGT=padded(reference, largest, width).to(device),
        sampler_logp_BGT=padded(sampler, largest, width).to(device) if references.sampler else None,
        mask_BGT=mask_BGT,
        reward_BG=torch.tensor(rewards, dtype=torch.float32, device=device),
        weight_B=torch.tensor([group.weight for group in groups], dtype=torch.float32, device=device),
        totals=totals,
    )


def totals_of(groups: Sequence[TokenGroup]) -> Totals:
    """What the means of an optimizer batch divide by."""
    return Totals(
        weight=sum(group.weight for group in groups),
        tokens=sum(group.weight * sum(len(c.token_ids) for c in group.completions) for group in groups),
        completions=sum(group.weight * len(group.completions) for group in groups),
    )


def padded(logps: Sequence[GroupLogps], largest: int, width: int) -> Tensor:
    """[B, largest, width] on the CPU, zeros behind the completions."""
    out_BGT = torch.zeros(len(logps), largest, width)
    for b, group in enumerate(logps):
        for g, logp_T in enumerate(group):
            out_BGT[b, g, : len(logp_T)] = logp_T
    return out_BGT
