"""Packed rows through a transformers model: its attention over the blocks of a `Packing`, and which models can take one.

The attention function stands in transformers' table under a name that the model's configuration carries from the first packed
pass on. Which row it meets it reads from the forward's keyword arguments, never from a global: gradient checkpointing calls it
again in the backward pass. Calls without a packing go to transformers' own sdpa function, unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pairloop.policy.flex import attend_row
from pairloop.policy.flex import row_mask as mask_of
from pairloop.policy.packing import Block, Packing
from pairloop.policy.strips import strip_attention

LOG = logging.getLogger(__name__)

NAME = "pairloop_packed"
FLEX = "pairloop_packed_flex"
"""The same by FlexAttention (see `flex`)."""

PACKABLE = frozenset(
    {
        "cohere",
        "cohere2",
        "ernie4_5",
        "gemma",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_neox",
        "granite",
        "helium",
        "llama",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "starcoder2",
    }
)
"""Model types whose packed pass tests/test_packing.py finds equal to the plain one; all others go the plain way.

What these share: tokens meet in attention alone, places are told by position ids, and keyword arguments reach the attention.
"""


def refusal(model: nn.Module, longest: int) -> str | None:
    """Why a transformers model cannot take packed rows whose longest sequence has so many tokens; None where it can."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in PACKABLE:
        return f"models of type {kind} are not known to take packed rows"
    if config._attn_implementation not in ("sdpa", NAME, FLEX):
        return f"its attention is {config._attn_implementation}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention logits are capped"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return "it is not causal"
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    window = getattr(config, "sliding_window", None)
    # A window that no sequence outgrows is none.
    if "sliding_attention" in kinds and window is not None and longest > window:
        return f"its attention sees {window} tokens, and there are sequences of more"
    return None


def takes_packed(model: nn.Module, longest: int) -> bool:
    """True where the model can take packed rows (see `refusal`), and is switched to them; a refusal is said once in the log."""
    reason = refusal(model, longest)
    if reason is not None:
        _say_once(reason)
        return False
    inner: Any = model
    if inner.config._attn_implementation not in (NAME, FLEX):
        _switch(model, NAME)
    return True


def use_flex(model: nn.Module) -> None:
    """Have packed rows attend by FlexAttention from here on, where the model takes packed rows."""
    if refusal(model, longest=0) is None:
        _switch(model, FLEX)


def _switch(model: nn.Module, name: str) -> None:
    AttentionInterface.register(name, packed_attention)
    # Of plain rows, which decoding goes on to feed; packed ones come with a mask of their own that is handed through.
    AttentionMaskInterface.register(name, sdpa_mask)
    inner: Any = model
    inner.set_attn_implementation(name)


@cache
def _say_once(reason: str) -> None:
    LOG.info("prompts are not shared by the completions that follow them: %s", reason)


def hidden_states(model: nn.Module, packing: Packing) -> Tensor:
    """What the model's head would read at each predicted token, [M, hidden]; ``model`` was found to take packed rows."""
    inner: Any = model
    mask = mask_of(packing) if inner.config._attn_implementation == FLEX else None
    hidden = run(model, packing.ids_T[None], packing.positions_T[None], packing=packing, row_mask=mask)
    return hidden[0].index_select(0, packing.predicts_M)


def run(model: nn.Module, ids: Tensor, positions: Tensor, **attention: Any) -> Tensor:
    """The hidden states, [rows, tokens, hidden]; ``attention`` goes to `packed_attention`, which needs one of the two."""
    inner: Any = model
    output = inner.base_model(
        input_ids=ids,
        position_ids=positions,
        # Of four dimensions, so that transformers makes no mask; of no size, so that no other attention can use it.
        attention_mask=torch.empty(1, 1, 0, 0, dtype=torch.bool, device=ids.device),
        use_cache=False,
        **attention,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    row_mask: BlockMask | None = None,
    attend: Callable[[int, Tensor, Tensor, Tensor, float | None], Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As every attention function of transformers: [1, heads, T, D] queries, keys and values to [1, T, heads, D].

    ``attend`` is called instead where it is given, with the number of the layer and its scale.
    """
    if attend is not None:
        return attend(int(module.layer_idx), query, key, value, options.get("scaling")), None  # type: ignore[arg-type]
    if packing is None:
        plain: Any = sdpa_attention_forward
        output: tuple[Tensor, None] = plain(module, query, key, value, attention_mask, **options)
        return output
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    if row_mask is not None:
        return attend_row(*rows, mask=row_mask, scale=options.get("scaling"))[None], None
    return attend_blocks(packing, *rows, scale=options.get("scaling"), dropout=options.get("dropout", 0.0))[None], None


def attend_blocks(
    packing: Packing, query_THD: Tensor, key_THD: Tensor, value_THD: Tensor, *, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """The row's tokens after attention, [T, heads, D]."""
    rows = (query_THD, key_THD, value_THD)
    is_cast = query_THD.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if is_cast else query_THD.dtype
    if takes_strips(query_THD.device, dtype, dropout):
        scale = query_THD.shape[-1] ** -0.5 if scale is None else scale
        return strip_attention(query_THD.to(dtype), key_THD.to(dtype), value_THD.to(dtype), packing, scale)
    attended = [_attend(block, *rows, scale=scale, dropout=dropout) for block in packing.blocks]
    return torch.cat([*attended, torch.zeros_like(query_THD[packing.n_tokens :])])


def takes_strips(device: torch.device, dtype: torch.dtype, dropout: float) -> bool:
    """True where `strip_attention` is faster than torch's fused one: in bfloat16 on the CPU, by far."""
    return device.type == "cpu" and dtype is torch.bfloat16 and not dropout


def _attend(
    block: Block, query_THD: Tensor, key_THD: Tensor, value_THD: Tensor, *, scale: float | None, dropout: float
) -> Tensor:
    """The block's tokens after attention, [stop - start, heads, D]."""
    query = block.rows(query_THD, block.query_NQ).transpose(1, 2)
    key, value = (block.rows(of, block.key_NK).transpose(1, 2) for of in (key_THD, value_THD))
    shared_by = query.shape[1] // key.shape[1]
    if shared_by > 1 and query.is_cuda and block.mask_NQK is not None:
        # There no fast kernel takes both a mask and fewer heads of keys.
        key, value = (tensor.repeat_interleave(shared_by, dim=1) for tensor in (key, value))
    attended = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if block.mask_NQK is None else block.mask_NQK[:, None],
        dropout_p=dropout,
        is_causal=block.mask_NQK is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    flat = attended.transpose(1, 2).flatten(0, 1)
    return flat if block.real is None else flat.index_select(0, block.real)
