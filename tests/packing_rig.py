"""Tiny models of every family that takes packed rows, rows for them, and the definition to compare with."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from pairloop.policy.packed import NAME
from pairloop.policy.packing import MIN_SHARED, Ids
from pairloop.policy.scoring import bare, completion_logps

VOCAB = 61
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "sliding_window": 64,
    "query_pre_attn_scalar": 9,
    "attention_bias": True,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.25},
    "gemma3_text": {"final_logit_softcapping": 1.5},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.7},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        }
    },
}
"""What makes a family harder to pack than its default does."""


def tiny(kind: str = "llama", dtype: torch.dtype = torch.float64, gain: float = 8.0, **options: Any) -> Any:
    """A random model of a family, in evaluation mode, its distribution far from uniform."""
    torch.manual_seed(0)
    known = AutoConfig.for_model(kind)
    wanted = {name: value for name, value in SHAPE.items() if hasattr(known, name)} | OPTIONS.get(kind, {}) | options
    # Grouped matrix products are not made for float64.
    config = AutoConfig.for_model(kind, **wanted, experts_implementation="eager")
    maker: Any = AutoModelForCausalLM
    model = maker.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain)
    return model.to(dtype).eval()


def some_rows(sizes: Sequence[int] = (1, 3, 16, 2), seed: int = 0) -> tuple[list[Ids], list[Ids]]:
    """Groups of ``sizes``: a prompt of one token, completions of one, EOS inside, and prompts that begin alike."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> Ids:
        return tuple(rng.randrange(VOCAB) for _ in range(rng.randint(low, high)))

    system = tokens(MIN_SHARED, MIN_SHARED)
    prompts = [tokens(1, 1), *(tokens(1, 7) for _ in sizes[1:]), system, (*system, 5, 6), (*system, 5, 7), (*system, 9)]
    groups = [prompt for prompt, size in zip(prompts, [*sizes, 2, 2, 2, 2], strict=True) for _ in range(size)]
    completions = [tokens(1, 1) if i % 5 == 0 else (*tokens(0, 3), 0, *tokens(0, 4)) for i in range(len(groups))]
    return groups, completions


def by_the_definition(model: Any, prompts: Sequence[Ids], completions: Sequence[Ids]) -> Tensor:
    """Each sequence in a pass of its own, [M]: completion after completion."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        exact = logits if logits.dtype is torch.float64 else logits.float()
        found.append(-cross_entropy(exact, torch.tensor(completion), reduction="none"))
    return torch.cat(found)


def value_and_gradient(model: nn.Module, logps: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the gradient of a sum in which every token counts differently."""
    model.zero_grad()
    logp_M = logps()
    weight_M = torch.linspace(-0.5, 1.5, len(logp_M), dtype=logp_M.dtype)
    torch.autograd.backward((logp_M * weight_M).sum())
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return logp_M.detach(), grads


def packed_logps(model: nn.Module, prompts: Sequence[Ids], completions: Sequence[Ids]) -> Tensor:
    logp_NT, mask_NT = completion_logps(model, prompts, completions)
    inner: Any = bare(model)
    assert inner.config._attn_implementation == NAME
    return logp_NT[mask_NT]


def worst(one: tuple[Tensor, Mapping[str, Tensor]], other: tuple[Tensor, Mapping[str, Tensor]]) -> float:
    """The largest difference: of log-probs in nats, of a gradient relative to its norm or to 1e-3 of the largest one."""
    assert one[1].keys() == other[1].keys()
    scale = 1e-3 * max(float(value.norm()) for value in other[1].values())
    gaps = [float((one[1][name] - value).norm() / max(float(value.norm()), scale)) for name, value in other[1].items()]
    return max(float((one[0] - other[0]).abs().max()), *gaps)


def compare(model: Any, prompts: Sequence[Ids], completions: Sequence[Ids]) -> float:
    expected = value_and_gradient(model, lambda: by_the_definition(model, prompts, completions))
    return worst(value_and_gradient(model, lambda: packed_logps(model, prompts, completions)), expected)
