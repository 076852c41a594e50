"""Floating-point operations that a packed training step needs, and what the machine can do at most."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from pairloop.bench.cells import Pair, Shape

CEILING_SIZE = {"cpu": 1_024, "cuda": 8_192}
CEILING_RUNS = 8


def step_flops(shape: Shape, pairs: Sequence[Pair], mode: str) -> float:
    """Operations of a forward and a backward pass over ``pairs``, each distinct beginning read once; 2 per multiply-add.

    The backward pass costs twice the forward pass, once under LoRA, whose frozen weights want no gradient; the adapters' own
    part is left out, so the figure is a lower bound there.
    """
    predicted = 0
    tokens = shared = _shared([pair.prompt for pair in pairs])
    products = _seen(shared, 0)
    for pair in pairs:
        own = len(pair.prompt) - shared
        tokens += own
        products += _seen(own, shared)
        for answer in (pair.chosen, pair.rejected):
            tokens += len(answer) - 1
            products += _seen(len(answer) - 1, len(pair.prompt))
            predicted += len(answer)
    attention = 4 * shape.layers * shape.heads * shape.head_dim * products
    forward = 2 * shape.layer_weights * tokens + 2 * shape.hidden * shape.vocab * predicted + attention
    return forward * (3 if mode == "full" else 2)


def ceiling(device: torch.device) -> float:
    """Operations per second of a large bfloat16 matrix product, the best of several."""
    size = CEILING_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(CEILING_RUNS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started_s = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started_s)
    return float(2 * size**3 / best)


def _seen(n: int, before: int) -> float:
    """Query-key products of ``n`` tokens that follow ``before`` others."""
    return n * before + n * (n + 1) / 2


def _shared(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all prompts begin with; none where there is one prompt only."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)
    n = 0
    while n < min(len(first), len(last)) and first[n] == last[n]:
        n += 1
    return n
