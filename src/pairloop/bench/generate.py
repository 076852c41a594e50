"""transformers as a contestant: `generate`, and its continuous batching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from pairloop.bench.cells import SAMPLE_CELLS, prompts
from pairloop.bench.ours import on
from pairloop.bench.pacing import Pacer
from pairloop.errors import SystemFailure
from pairloop.policy.scoring import load_causal_lm

PAGE = 16
"""Tokens of a page of continuous batching's cache."""


def sample(spec: dict[str, Any], pacer: Pacer) -> None:
    """Two completions of every prompt at temperature 1, without log-probs, all prompts in one batch."""
    cell, device = SAMPLE_CELLS[spec["cell"]], on(spec, pacer)
    model: Any = load_causal_lm(Path(spec["model"]), dtype=spec["dtype"], device=device)
    turns = prompts(cell)
    more = pacer.ready()
    while more:
        ids = torch.tensor(next(turns), device=device)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=_config(cell.new_tokens, 2))
        more = pacer.step(found[:, cell.prompt :].numel())


def sample_continuously(spec: dict[str, Any], pacer: Pacer) -> None:
    """The same by transformers' continuous batching; the two completions of a prompt are two requests."""
    cell, device = SAMPLE_CELLS[spec["cell"]], on(spec, pacer)
    model: Any = load_causal_lm(Path(spec["model"]), dtype=spec["dtype"], device=device)
    turns = prompts(cell)
    tokens = 2 * cell.prompts * (cell.prompt + cell.new_tokens)
    # By default it takes most of the machine's memory for its cache; twice what these requests need is enough.
    room = ContinuousBatchingConfig(page_size=PAGE, num_blocks=2 * tokens // PAGE, max_batch_tokens=tokens)
    more = pacer.ready()
    while more:
        twice = [list(prompt) for prompt in next(turns) for _ in range(2)]
        found = model.generate_batch(
            twice, generation_config=_config(cell.new_tokens, 1), continuous_batching_config=room, persistent_manager=True
        )
        made = sum(len(output.generated_tokens) for output in found.values())
        if made != cell.new_tokens * len(twice):
            raise SystemFailure(f"continuous batching made {made} tokens, {cell.new_tokens * len(twice)} were asked for")
        more = pacer.step(made)


def _config(new_tokens: int, copies: int) -> GenerationConfig:
    """Plain sampling of so many tokens: nothing ends an answer earlier."""
    make: Any = GenerationConfig
    config: GenerationConfig = make(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=copies,
        eos_token_id=-1,
        pad_token_id=0,
    )
    return config
