"""Rollouts of the lab: groups of completions of many prompts at once, with the log-probs under the policy that sampled."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pairloop.learner.data import TokenCompletion
from pairloop.policy.decoding import Batch, draw
from pairloop.policy.scoring import Traits

ROWS = 256
"""Completions that decode together: more do not fit the caches of a small CPU."""


@torch.inference_mode()
def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_tokens: int,
    eos: int,
    rng: random.Random,
    greedy: bool = False,
) -> list[list[TokenCompletion]]:
    """``group_size`` completions of each prompt at T = 1 (or greedy), in the prompts' order.

    A completion that ended holds its EOS token; one that reached ``max_tokens`` does not.
    """
    traits = Traits.of(model)
    per_pass = max(1, ROWS // group_size)
    found: list[list[TokenCompletion]] = []
    for start in range(0, len(prompts), per_pass):
        part = prompts[start : start + per_pass]
        copies = torch.arange(len(part)).repeat_interleave(group_size)
        rows = _decode(model, traits, part, copies, max_tokens, eos, rng, 0.0 if greedy else 1.0)
        found += [rows[i : i + group_size] for i in range(0, len(rows), group_size)]
    return found


def _decode(
    model: nn.Module,
    traits: Traits,
    prompts: Sequence[Sequence[int]],
    copies: Tensor,
    max_tokens: int,
    eos: int,
    rng: random.Random,
    temperature: float,
) -> list[TokenCompletion]:
    batch, logits_BV = Batch.prefill(model, traits, prompts, copies)
    tokens: list[list[int]] = [[] for _ in copies]
    logps: list[list[float]] = [[] for _ in copies]
    running = list(range(len(copies)))
    for t in range(max_tokens):
        # One number per row of the batch, also of those that ended: a draw does not depend on who ended before.
        uniforms = [rng.random() for _ in copies]
        n = len(running)
        token_B, logp_B = draw(logits_BV, [uniforms[row] for row in running], [temperature] * n, [1.0] * n)
        for row, token, logp in zip(running, token_B.tolist(), logp_B.tolist(), strict=True):
            tokens[row].append(token)
            logps[row].append(logp)
        going = (token_B != eos).nonzero()[:, 0]
        if len(going) == 0 or t + 1 == max_tokens:
            break
        if len(going) < n:
            batch.keep(going)
            running = [running[i] for i in going.tolist()]
            token_B = token_B[going]
        logits_BV = batch.step(token_B)
    return [TokenCompletion(tuple(ids), tuple(values)) for ids, values in zip(tokens, logps, strict=True)]
