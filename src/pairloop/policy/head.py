"""The vocabulary head on chosen hidden states: log-probs of their targets, without all logits in memory at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**25
"""Logits held at once: 128 MiB in float32."""


def target_logps(model: nn.Module, hidden_MH: Tensor, targets_M: Tensor, *, max_logits: int = MAX_LOGITS) -> Tensor:
    """Log-probs of the targets under a transformers model's head, [M], float32 (float64 where the model is), differentiable.

    In chunks of at most ``max_logits`` logits; where there are several, each is computed again in the backward pass. The head
    is called as a module, so an adapter on it counts; what the model does to logits behind it is done here too.
    """
    inner: Any = model
    head = inner.get_output_embeddings()
    size = max(1, max_logits // inner.config.get_text_config().vocab_size)
    if len(hidden_MH) <= size:
        return _chunk(head, inner.config, hidden_MH, targets_M)
    parts = [
        checkpoint(_chunk, head, inner.config, hidden, targets, use_reentrant=False, preserve_rng_state=False)
        for hidden, targets in zip(torch.split(hidden_MH, size), torch.split(targets_M, size), strict=True)
    ]
    return torch.cat(parts)


def logits_of(model: nn.Module, hidden_MH: Tensor) -> Tensor:
    """Logits of a transformers model's head on hidden states, [M, vocab], as the model itself gives them."""
    inner: Any = model
    return _scaled(inner.get_output_embeddings()(hidden_MH[None])[0], inner.config)


def exact_logps(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Log-probs of the targets, [M]: the softmax in float32, in float64 where the logits are."""
    exact_MV = logits_MV if logits_MV.dtype is torch.float64 else logits_MV.float()
    return -cross_entropy(exact_MV, targets_M, reduction="none")


def _chunk(head: nn.Module, config: Any, hidden_MH: Tensor, targets_M: Tensor) -> Tensor:
    return exact_logps(_scaled(head(hidden_MH[None])[0], config), targets_M)


def _scaled(logits_MV: Tensor, config: Any) -> Tensor:
    """Cohere's ``logit_scale``, Granite's ``logits_scaling``, Gemma's ``final_logit_softcapping``."""
    if (factor := getattr(config, "logit_scale", None)) is not None:
        logits_MV = logits_MV * factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits_MV = logits_MV / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits_MV = torch.tanh(logits_MV / cap) * cap
    return logits_MV
