"""pairloop as a contestant: the product's own training step, and its sampler."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from pairloop.bench.cells import SAMPLE_CELLS, TRAIN_CELLS, Pair, TrainCell, pairs, prompts
from pairloop.bench.flops import ceiling, step_flops
from pairloop.bench.pacing import Pacer
from pairloop.config import TrainSection
from pairloop.learner.data import TokenGroup
from pairloop.learner.memory import TokenBudget
from pairloop.learner.scores import References, precision, score
from pairloop.learner.step import Trainer, optimizer_of
from pairloop.policy import rollout
from pairloop.policy.protocols import TokenCompletion
from pairloop.policy.scoring import LoraSettings, load_causal_lm

NO_TOKEN = -1
"""Ends no completion: every contestant samples the same number of tokens."""
TOKENS_SCORED_TOGETHER = 1_024
"""Few, as what the allocator keeps of the scoring would be counted as held before the first step."""


def train(spec: dict[str, Any], pacer: Pacer) -> None:
    """Optimizer steps on pairs whose log-probs were recorded, as in a round of the loop."""
    cell, device = TRAIN_CELLS[spec["cell"]], on(spec, pacer)
    found = pairs(cell, spec["pairs"])
    lora = LoraSettings() if spec["mode"] == "lora" else None
    model = load_causal_lm(
        Path(spec["model"]), dtype="float32" if lora is None else spec["dtype"], device=device, trainable=True, lora=lora
    )
    groups = [_group(index, pair) for index, pair in enumerate(found)]
    settings = TrainSection(batch_size=cell.batch_size, threads=spec["threads"])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with precision(model, spec["dtype"]):
        logps = score(model, groups, TokenBudget(TOKENS_SCORED_TOGETHER))
        references = References({group.group_id: values for group, values in zip(groups, logps, strict=True)})
        budget = TokenBudget(settings.max_tokens_per_batch)
        trainer = Trainer(model, optimizer_of(parameters, settings), parameters, references, settings, budget)
        facts = {
            "flops_per_pair": step_flops(cell.shape, found[: cell.batch_size], spec["mode"]) / cell.batch_size,
            "tokens_per_pair": sum(group.n_tokens for group in groups) / len(groups),
            "ceiling_flops": ceiling(device),
        }
        batches = cycle(_batches(cell, groups))
        more = pacer.ready(**facts)
        while more:
            trainer.step(next(batches), settings.learning_rate)
            more = pacer.step(cell.batch_size)


def sample(spec: dict[str, Any], pacer: Pacer) -> None:
    """Two completions of every prompt at temperature 1, with their log-probs."""
    cell, device = SAMPLE_CELLS[spec["cell"]], on(spec, pacer)
    model = load_causal_lm(Path(spec["model"]), dtype=spec["dtype"], device=device)
    rng, turns = random.Random(0), prompts(cell)
    more = pacer.ready()
    while more:
        groups = rollout.sample(model, next(turns), group_size=2, max_tokens=cell.new_tokens, eos=NO_TOKEN, rng=rng)
        more = pacer.step(sum(len(completion.token_ids) for group in groups for completion in group))


def on(spec: dict[str, Any], pacer: Pacer) -> torch.device:
    """The device and thread count of the race; on CUDA the pacer waits for it and asks it for its peak."""
    torch.set_num_threads(spec["threads"])
    device = torch.device(spec["device"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        pacer.synchronize = torch.cuda.synchronize
        pacer.rest = torch.cuda.empty_cache
        pacer.peak = torch.cuda.max_memory_allocated
    return device


def _group(index: int, pair: Pair) -> TokenGroup:
    completions = (TokenCompletion(pair.chosen), TokenCompletion(pair.rejected))
    return TokenGroup(str(index), pair.prompt, completions, (1.0, 0.0), is_fresh=True)


def _batches(cell: TrainCell, groups: Sequence[TokenGroup]) -> list[Sequence[TokenGroup]]:
    return [groups[start : start + cell.batch_size] for start in range(0, len(groups), cell.batch_size)]
