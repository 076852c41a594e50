"""Rollouts without requests: groups of completions of many prompts at once, with the log-probs under what sampled them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import nn

from pairloop.policy.decoding import draw, open_batch
from pairloop.policy.linear import laid_out
from pairloop.policy.protocols import TokenCompletion
from pairloop.policy.scoring import Traits
from pairloop.policy.slots import compact

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
    traits, per_pass = Traits.of(model), max(1, ROWS // group_size)
    found: list[list[TokenCompletion]] = []
    for start in range(0, len(prompts), per_pass):
        rows = [tuple(prompt) for prompt in prompts[start : start + per_pass] for _ in range(group_size)]
        with laid_out(model):
            drawn = _decode(model, traits, rows, max_tokens, eos, rng, 0.0 if greedy else 1.0)
        found += [drawn[i : i + group_size] for i in range(0, len(drawn), group_size)]
    return found


def _decode(
    model: nn.Module,
    traits: Traits,
    prompts: Sequence[tuple[int, ...]],
    max_tokens: int,
    eos: int,
    rng: random.Random,
    temperature: float,
) -> list[TokenCompletion]:
    batch = open_batch(model, traits, max(map(len, prompts)) + max_tokens)
    logits_BV = batch.admit(prompts)
    tokens: list[list[int]] = [[] for _ in prompts]
    logps: list[list[float]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    for t in range(max_tokens):
        # One number per row of the batch, also of those that ended: a draw does not depend on who ended before.
        uniforms = [rng.random() for _ in prompts]
        n = len(running)
        token_B, logp_B = draw(logits_BV, [uniforms[row] for row in running], [temperature] * n, [1.0] * n)
        drawn = token_B.tolist()
        for row, token, logp in zip(running, drawn, logp_B.tolist(), strict=True):
            tokens[row].append(token)
            logps[row].append(logp)
        going = [b for b, token in enumerate(drawn) if token != eos]
        if not going or t + 1 == max_tokens:
            break
        if len(going) < n:
            going = compact(going)
            batch.keep(going)
            running = [running[b] for b in going]
            token_B = token_B[going]
        logits_BV = batch.step(token_B)
    return [TokenCompletion(tuple(ids), tuple(values)) for ids, values in zip(tokens, logps, strict=True)]
