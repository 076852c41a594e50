"""Real transformers in float64 for the lab's exact checks: loading, sampling from them, and their gradients as one vector."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pairloop.errors import ModelError
from pairloop.objective import Batch
from pairloop.policy.scoring import completion_logps, load_causal_lm, max_context
from pairloop.starter import MODEL_DIR
from pairloop.starter.corpus import draw_held_out_case
from pairloop.template import ChatTemplate
from pairloop.types import Message

TINY, STARTER = "tiny", "starter"
Lengths = Literal["equal", "ragged"]
Tokens = tuple[int, ...]

N_GROUPS = 6
EQUAL_LENGTH = 8
LONGEST, SHORTEST = 20, 3
_TRIES = 200


@dataclass(frozen=True, slots=True)
class Probe:
    """A model under test, and prompts that it can read."""

    name: str
    model: nn.Module
    prompts: tuple[Tokens, ...]
    eos: frozenset[int]


@dataclass(frozen=True, slots=True)
class Sampled:
    """Pairs sampled from a model: N = 2 B completions, neighbours share their prompt, with the sampler's log-probs."""

    prompts: tuple[Tokens, ...]
    completions: tuple[Tokens, ...]
    logp_NT: Tensor


def load_probe(name: str, *, seed: int) -> Probe:
    """``tiny`` (a seeded random Llama), ``starter``, or a model directory; float64, evaluation mode, all weights trainable."""
    rng = random.Random(seed)
    if name == TINY:
        model = tiny_llama(seed=seed, vocab_size=24)
        prompts = tuple(tuple(rng.randrange(1, 24) for _ in range(rng.randint(2, 6))) for _ in range(N_GROUPS))
        return Probe(name, model, prompts, frozenset({0}))
    folder = MODEL_DIR if name == STARTER else Path(name)
    model = in_float64(load_causal_lm(folder, dtype="float64", trainable=True))
    template = ChatTemplate.load(folder)
    questions = [draw_held_out_case(rng).text for _ in range(N_GROUPS)]
    encoded = [template.encode_prompt((Message("user", q),) if template.has_template else q) for q in questions]
    room = max_context(model)
    needed = max(map(len, encoded)) + LONGEST
    if room and needed > room:
        raise ModelError(f"{folder}: its context is {room} tokens, and the check's prompts and completions take {needed}")
    return Probe(name, model, tuple(encoded), template.eos_token_ids)


def tiny_llama(*, seed: int, vocab_size: int, hidden: int = 16, gain: float = 8.0) -> nn.Module:
    """A random two-layer Llama in float64; ``gain`` scales its matrices, so that its distribution is far from uniform."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(gain)
    return in_float64(model)


def in_float64(model: nn.Module) -> nn.Module:
    """Replaces Llama's RMS norms, which compute in float32 whatever the model's dtype, by torch's, which do not."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            eps = getattr(child, "variance_epsilon", None)
            weight = getattr(child, "weight", None)
            # Other families' norms (1 + weight, with a bias) are another function and stay as they are.
            if type(child).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm") and eps is not None:
                assert isinstance(weight, nn.Parameter)
                exact = nn.RMSNorm(weight.shape[0], eps=eps, dtype=weight.dtype)
                exact.weight = weight
                setattr(parent, name, exact)
    return model.eval()


def sample_pairs(probe: Probe, lengths: Lengths, *, seed: int) -> Sampled:
    """Two completions for every prompt, drawn at temperature 1 from the whole vocabulary, and their log-probs on the way.

    ``equal``: all of EQUAL_LENGTH tokens (the end-of-sequence token is drawn like any other). ``ragged``: up to EOS or a
    random cap; the two of a pair differ in length.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    prompts: list[Tokens] = []
    drawn: list[tuple[Tokens, Tensor]] = []
    for prompt in probe.prompts:
        prompts += [prompt, prompt]
        if lengths == "equal":
            drawn += [_draw(probe.model, prompt, EQUAL_LENGTH, frozenset(), generator) for _ in range(2)]
        else:
            drawn += _draw_ragged(probe, prompt, rng, generator)
    logp_NT = nn.utils.rnn.pad_sequence([logp for _, logp in drawn], batch_first=True)
    return Sampled(tuple(prompts), tuple(tokens for tokens, _ in drawn), logp_NT)


def _draw_ragged(probe: Probe, prompt: Tokens, rng: random.Random, generator: torch.Generator) -> list[tuple[Tokens, Tensor]]:
    for _ in range(_TRIES):
        caps = rng.sample(range(SHORTEST, LONGEST + 1), 2)
        pair = [_draw(probe.model, prompt, cap, probe.eos, generator) for cap in caps]
        if len(pair[0][0]) != len(pair[1][0]):
            return pair
    raise ModelError(f"{probe.name}: every pair of its completions has one length, so unequal lengths cannot be checked")


@torch.no_grad()
def _draw(model: nn.Module, prompt: Tokens, cap: int, eos: frozenset[int], generator: torch.Generator) -> tuple[Tokens, Tensor]:
    ids = list(prompt)
    logps: list[Tensor] = []
    device = next(model.parameters()).device
    while len(logps) < cap and (len(ids) == len(prompt) or ids[-1] not in eos):
        logits: Tensor = model(input_ids=torch.tensor([ids], device=device)).logits[0, -1]
        logp_V = logits.log_softmax(-1).cpu()
        token = int(torch.multinomial(logp_V.exp(), 1, generator=generator))
        ids.append(token)
        logps.append(logp_V[token])
    return tuple(ids[len(prompt) :]), torch.stack(logps)


def pair_batch(model: nn.Module, sampled: Sampled) -> Batch:
    """The pairs under ``model``, with gradient; what sampled them is sampler and reference; the first of each is chosen.

    ``model`` may be the one that sampled, or one that has moved since.
    """
    logp_NT, mask_NT = completion_logps(model, sampled.prompts, sampled.completions)
    shape = (-1, 2, logp_NT.shape[1])
    logp_BGT, mask_BGT = logp_NT.view(shape), mask_NT.view(shape)
    recorded_BGT = sampled.logp_NT.to(logp_BGT.device).view_as(logp_BGT)
    ones_B = logp_BGT.new_ones(len(logp_BGT))
    reward_BG = torch.stack([ones_B, torch.zeros_like(ones_B)], 1)
    return Batch(logp_BGT, recorded_BGT, mask_BGT, reward_BG, ones_B, recorded_BGT)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a gradient is taken for, each once (tied weights are one)."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient(value: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """d value / d parameters as one flat vector; the graph is kept, so that many losses share one forward pass."""
    parts: Any = torch.autograd.grad(value, list(parameters), retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def cosine_distance(a: Tensor, b: Tensor) -> float:
    """1 - cos(a, b), as half the squared distance of the unit vectors: no cancellation near 0; NaN where one vanishes."""
    return 0.5 * float((a / a.norm() - b / b.norm()).square().sum())
