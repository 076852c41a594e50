"""A LoRA adapter folded into its base: one plain model directory, which answers as base and adapter do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pairloop.errors import ModelError
from pairloop.learner.export import copy_tokenizer
from pairloop.policy.quantization import Quantization
from pairloop.policy.scoring import load_adapter, load_causal_lm, load_full, vocab_size
from pairloop.types import VersionKind

PROBE_TOKENS = 32
MAX_KL = {"float32": 1e-6, "bfloat16": 1e-2}
"""Nats per token between the model before and after, on random tokens: what rounding does, with room; a layer that was folded
in wrongly goes far beyond."""


def merge(base_dir: Path, adapter_dir: Path, folder: Path, *, dtype: str, quantization: Quantization = "none") -> None:
    """Write the base in ``base_dir`` with the adapter folded in to ``folder``: weights in ``dtype``, configuration, tokenizer.

    A base that was kept in 4 bits is rounded as it was served, and written in ``dtype``. On the CPU, so that a server's device
    is left alone. ModelError where the merged model does not answer as the two parts do.
    """
    cpu = torch.device("cpu")
    model: Any = load_causal_lm(base_dir, adapter_dir, VersionKind.ADAPTER, dtype=dtype, device=cpu, quantization=quantization)
    probe = torch.randint(vocab_size(model), (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    before_TV = _logps(model, probe)
    if quantization != "none":
        base: Any = load_full(base_dir, dtype=dtype, device=cpu, quantization=quantization)
        model = load_adapter(base.dequantize(getattr(torch, dtype)), adapter_dir, "default", device=cpu)
    merged = model.merge_and_unload()
    check(before_TV, _logps(merged, probe), dtype)
    merged.save_pretrained(folder)
    copy_tokenizer(base_dir, folder)


def check(before_TV: Tensor, after_TV: Tensor, dtype: str) -> None:
    """ModelError where the two give other next tokens, by the mean KL over T tokens of log-probs over V words."""
    kl = float((before_TV.exp() * (before_TV - after_TV)).sum(-1).mean())
    if not kl <= MAX_KL[dtype]:
        raise ModelError(
            f"the merged model is not base and adapter: {kl:.2g} nats per token apart, {MAX_KL[dtype]:g} allowed. An adapter "
            "on tied embeddings cannot be folded in; export it without --merged"
        )


@torch.no_grad()
def _logps(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probs of every next token, [T, V] in float64."""
    logits_TV: Tensor = model(input_ids=ids).logits[0]
    return logits_TV.double().log_softmax(-1)
