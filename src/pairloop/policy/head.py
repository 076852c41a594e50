"""The vocabulary head on chosen hidden states: log-probs of their targets, without all logits in memory at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax, pad, softmax
from torch.utils.checkpoint import checkpoint

from pairloop.policy.packing import filling

MAX_LOGITS = 2**25
"""Logits held at once: 128 MiB in float32."""
STRIP = 2**18
"""Logits that the CPU takes the softmax of at once: in float32 they fit its cache."""


def target_logps(model: nn.Module, hidden_MH: Tensor, targets_M: Tensor, *, max_logits: int = MAX_LOGITS) -> Tensor:
    """Log-probs of the targets under a transformers model's head, [M], float32 (float64 where the model is), differentiable.

    In chunks of at most ``max_logits`` logits; where there are several, each is computed again in the backward pass. The head
    is called as a module, so an adapter on it counts; what the model does to logits behind it is done here too.
    """
    n_more = filling(len(targets_M), targets_M.device)
    if n_more:
        filled = target_logps(model, pad(hidden_MH, (0, 0, 0, n_more)), pad(targets_M, (0, n_more)), max_logits=max_logits)
        return filled[: len(targets_M)]
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
    """Log-probs of the targets, [M], differentiable once: the softmax in float32, in float64 where the logits are.

    Kept for the backward pass are the logits as they came, and float32 is used in strips of rows: written as one expression,
    this would hold five copies of the logits, four of them in float32.
    """
    logps: Any = _TargetLogps.apply(logits_MV, targets_M)  # type: ignore[no-untyped-call]
    result: Tensor = logps
    return result


class _TargetLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, targets_M: Tensor) -> Tensor:
        ctx.save_for_backward(logits_MV, targets_M)
        parts = [
            log_softmax(logits_MV[rows], -1, dtype=_exact(logits_MV)).gather(1, targets_M[rows, None])[:, 0]
            for rows in _strips(logits_MV)
        ]
        return torch.cat(parts) if parts else logits_MV.new_empty(0, dtype=_exact(logits_MV))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None]:
        logits_MV, targets_M = ctx.saved_tensors
        grad_MV = torch.empty_like(logits_MV)
        for rows in _strips(logits_MV):
            # d log p(target) / d logits = [target] - p
            grad = softmax(logits_MV[rows], -1, dtype=_exact(logits_MV)).mul_(-grad_M[rows, None])
            grad_MV[rows] = grad.scatter_add_(1, targets_M[rows, None], grad_M[rows, None])
        return grad_MV, None


def _exact(logits_MV: Tensor) -> torch.dtype:
    return torch.promote_types(logits_MV.dtype, torch.float32)


def _strips(logits_MV: Tensor) -> Iterator[slice]:
    size = max(1, (STRIP if logits_MV.device.type == "cpu" else MAX_LOGITS) // logits_MV.shape[1])
    for start in range(0, len(logits_MV), size):
        yield slice(start, start + size)


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
