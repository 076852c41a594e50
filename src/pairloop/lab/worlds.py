"""Worlds small enough to enumerate: a tiny transformer, a vocabulary of four, every completion, and a random verifier.

Expectations over completions are exact sums here, in float64: no sampling noise hides or fakes an equality.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pairloop.lab.probes import Tokens, tiny_llama
from pairloop.objective import Batch
from pairloop.policy.scoring import completion_logps

EOS = 0
VOCAB = 4
LONGEST = 3


@dataclass(frozen=True, slots=True)
class World:
    """P prompts, their Y completions each (all there are), and a verifier: ``reward_PY`` is 0 or 1."""

    model: nn.Module
    prompts: tuple[Tokens, ...]
    completions: tuple[Tokens, ...]
    reward_PY: Tensor


def make_world(seed: int, *, n_prompts: int = 3, success_share: float = 0.3, gain: float = 8.0) -> World:
    """A seeded world; every prompt has at least one right and one wrong completion."""
    rng = random.Random(seed)
    completions = all_completions()
    prompts = tuple(itertools.islice(itertools.permutations(range(VOCAB), 3), n_prompts))
    rewards = []
    for _ in prompts:
        row = [float(rng.random() < success_share) for _ in completions]
        if len(set(row)) == 1:
            row[0] = 1.0 - row[0]
        rewards.append(row)
    model = tiny_llama(seed=seed, vocab_size=VOCAB, gain=gain)
    return World(model, prompts, completions, torch.tensor(rewards, dtype=torch.float64))


def all_completions() -> tuple[Tokens, ...]:
    """Every sequence that ends with EOS or has LONGEST tokens: their probabilities sum to 1."""
    letters = [token for token in range(VOCAB) if token != EOS]
    ended = [(*body, EOS) for n in range(LONGEST) for body in itertools.product(letters, repeat=n)]
    return (*ended, *itertools.product(letters, repeat=LONGEST))


def world_logps(world: World, model: nn.Module) -> tuple[Tensor, Tensor]:
    """``logp_PYT`` of every completion under ``model``, with gradient, and its mask."""
    rows = [(p, c) for p in world.prompts for c in world.completions]
    logp_NT, mask_NT = completion_logps(model, [p for p, _ in rows], [c for _, c in rows])
    shape = (len(world.prompts), len(world.completions), -1)
    return logp_NT.view(shape), mask_NT.view(shape)


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups of G completions: ``prompt_B``, ``index_BG`` into the prompt's completions, ``reward_BG``."""

    prompt_B: Tensor
    index_BG: Tensor
    reward_BG: Tensor

    @property
    def is_usable_B(self) -> Tensor:
        """Where the rewards are not all equal."""
        return self.reward_BG.amin(-1) != self.reward_BG.amax(-1)

    def usable(self) -> Groups:
        keep_B = self.is_usable_B
        return Groups(self.prompt_B[keep_B], self.index_BG[keep_B], self.reward_BG[keep_B])

    def probability_B(self, logp_PY: Tensor) -> Tensor:
        """Of each group, in this order, as independent draws for its prompt; constants, without gradient."""
        return logp_PY.detach()[self.prompt_B[:, None], self.index_BG].sum(-1).exp()


def every_group(world: World, size: int) -> Groups:
    """All ordered groups of ``size`` completions of every prompt: each prompt's probabilities sum to 1."""
    index_MG = torch.tensor(list(itertools.product(range(len(world.completions)), repeat=size)))
    n_prompts = len(world.prompts)
    prompt_B = torch.arange(n_prompts).repeat_interleave(len(index_MG))
    index_BG = index_MG.repeat(n_prompts, 1)
    return Groups(prompt_B, index_BG, world.reward_PY[prompt_B[:, None], index_BG])


def batch_of(groups: Groups, logp_PYT: Tensor, ref_PYT: Tensor, mask_PYT: Tensor, weight_B: Tensor) -> Batch:
    """The groups as an objective sees them; the reference sampled."""
    at = (groups.prompt_B[:, None], groups.index_BG)
    return Batch(logp_PYT[at], ref_PYT[at], mask_PYT[at], groups.reward_BG, weight_B)


def success(reward_PY: Tensor, logp_PY: Tensor) -> Tensor:
    """p of every prompt, E over its completions of the reward, with gradient, [P]."""
    return (logp_PY.exp() * reward_PY).sum(-1)
