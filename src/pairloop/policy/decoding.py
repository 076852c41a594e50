"""The generation loop's tensors: a batch of rows that rows join and leave, and the draw of the next tokens.

Axis letters: B rows, P distinct prompts, L cached columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

from pairloop.policy.mixed import Adapters
from pairloop.policy.packed import takes_packed
from pairloop.policy.scoring import Traits, bare
from pairloop.policy.slots import SlotBatch
from pairloop.types import GREEDY_BELOW

BLOCK = 64
"""Probabilities that are first added up as one when a token is drawn."""


class Batch:
    """Rows that decode together, of any model: their prompts are padded on the left, and the cache is transformers' own."""

    def __init__(self, model: nn.Module, traits: Traits) -> None:
        self.model = model
        self.traits = traits
        self.mask_BL = torch.empty(0, 0, dtype=torch.int64)
        self.cache: Any = None

    def admit(self, prompts: Sequence[Sequence[int]], _: Sequence[int] = ()) -> Tensor:
        """Put one row behind each prompt, every distinct prompt read once; float32 logits_BV of these.

        All are of one version, whatever its number. Models that obey no attention mask need prompts of equal length.
        """
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        batch = self if self.cache is None else Batch(self.model, self.traits)
        logits_PV = batch._read(distinct)
        place = {prompt: p for p, prompt in enumerate(distinct)}
        copies = [place[tuple(prompt)] for prompt in prompts]
        if copies != list(range(len(distinct))):
            batch.keep(copies)
        if batch is not self:
            self._join(batch)
        return logits_PV[copies]

    def step(self, token_ids_B: Tensor) -> Tensor:
        """Append one token to each row; float32 logits_BV."""
        self.mask_BL = pad(self.mask_BL, (0, 1), value=1)
        return self._forward(token_ids_B[:, None])

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        chosen = torch.tensor(rows, device=self.mask_BL.device)
        if isinstance(self.cache, Cache):
            self.cache.reorder_cache(chosen)  # type: ignore[arg-type] # it says LongTensor, and takes any Tensor of int64
        else:
            self.cache = [state[chosen] for state in self.cache]
        self.mask_BL = self.mask_BL[chosen]
        self._trim()

    @property
    def is_joinable(self) -> bool:
        """True where another batch can be appended: a recurrent state, or plain attention whose pads are masked."""
        if not isinstance(self.cache, Cache):
            return True
        return self.traits.masked and all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def _read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, prompts))
        device = next(self.model.parameters()).device
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.mask_BL = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        return self._forward(ids)

    def _join(self, other: Batch) -> None:
        """Append the rows of ``other`` behind these."""
        width = max(self.mask_BL.shape[1], other.mask_BL.shape[1])
        if isinstance(self.cache, Cache):
            for mine, theirs in zip(_layers(self.cache), _layers(other.cache), strict=True):
                mine.keys = torch.cat([_widen(mine.keys, width), _widen(theirs.keys, width)])
                mine.values = torch.cat([_widen(mine.values, width), _widen(theirs.values, width)])
        else:
            self.cache = [torch.cat(pair) for pair in zip(self.cache, other.cache, strict=True)]
        masks = [pad(batch.mask_BL, (width - batch.mask_BL.shape[1], 0)) for batch in (self, other)]
        self.mask_BL = torch.cat(masks)

    def _forward(self, ids: Tensor) -> Tensor:
        if self.traits.cache == "state" and ids.shape[1] == 1 and len(ids) > 1:
            return self._row_by_row(ids)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": True}
        if self.cache is not None:
            inputs[str(self.traits.cache)] = self.cache
        if self.traits.masked:
            inputs["attention_mask"] = self.mask_BL
            if self.traits.positions:
                inputs["position_ids"] = (self.mask_BL.cumsum(-1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
        if self.traits.logits_to_keep:
            inputs["logits_to_keep"] = 1
        output = self.model(**inputs)
        self.cache = output[str(self.traits.cache)]
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _row_by_row(self, ids: Tensor) -> Tensor:
        """transformers' RWKV (5.23) mixes the rows of a one-token batch: a shift of shape [B, H] meets states [B, 1, H]."""
        batches = [Batch(self.model, self.traits) for _ in ids]
        for b, batch in enumerate(batches):
            batch.mask_BL = self.mask_BL[b : b + 1]
            batch.cache = [state[b : b + 1].clone() for state in self.cache] if self.cache is not None else None
        logits = [batch._forward(ids[b : b + 1]) for b, batch in enumerate(batches)]
        self.cache = [torch.cat(states) for states in zip(*(batch.cache for batch in batches), strict=True)]
        return torch.cat(logits)

    def _trim(self) -> None:
        """Drop the left columns that are padding in every row: what remains when the longest row left."""
        if not isinstance(self.cache, Cache) or not self.is_joinable:
            return
        empty = int(self.mask_BL.any(dim=0).long().argmax())
        if empty:
            for layer in _layers(self.cache):
                layer.keys, layer.values = layer.keys[:, :, empty:], layer.values[:, :, empty:]
            self.mask_BL = self.mask_BL[:, empty:]


def open_batch(model: nn.Module, traits: Traits, longest: int, adapters: Adapters | None = None) -> SlotBatch | Batch:
    """An empty batch for rows of at most ``longest`` tokens with their prompts; the fast one where the model can take it."""
    return SlotBatch(bare(model), adapters) if takes_packed(bare(model), longest) else Batch(model, traits)


def draw(
    logits_BV: Tensor,
    uniforms: Sequence[float],
    temperatures: Sequence[float],
    top_ps: Sequence[float],
    allowed_BV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The next token of each row and its raw log-prob (T = 1, whole vocabulary), from one uniform number per row.

    By the inverse of the cumulative distribution, in float64; a temperature below GREEDY_BELOW takes the most likely token. The
    row's number decides, so a seeded row draws the same whatever rows are beside it. ``allowed_BV`` False is never drawn.
    """
    probs_BV = logits_BV.softmax(-1)
    normaliser_B = _normaliser(logits_BV, probs_BV)
    device = logits_BV.device
    open_BV = logits_BV if allowed_BV is None else logits_BV.masked_fill(~allowed_BV, -torch.inf)
    if allowed_BV is not None or any(t != 1.0 for t in temperatures):
        probs_BV = _tempered(open_BV, temperatures)
    if any(p < 1.0 for p in top_ps):
        probs_BV = _nucleus(probs_BV, torch.tensor(top_ps, device=device))
    tokens_B = _at(probs_BV, torch.tensor(uniforms, dtype=torch.float64, device=device)[:, None])
    if any(t < GREEDY_BELOW for t in temperatures):
        greedy = torch.tensor([t < GREEDY_BELOW for t in temperatures], device=device)
        tokens_B = torch.where(greedy, open_BV.argmax(-1), tokens_B)
    return tokens_B, logits_BV.gather(1, tokens_B[:, None])[:, 0] - normaliser_B


def likeliest(logits_BV: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The ``n`` likeliest tokens of each row, the likeliest first, and their raw log-probs; [B, n] both."""
    top = logits_BV.topk(min(n, logits_BV.shape[-1]), dim=-1)
    return top.indices, top.values - _normaliser(logits_BV, logits_BV.softmax(-1))[:, None]


def _normaliser(logits_BV: Tensor, probs_BV: Tensor) -> Tensor:
    """The largest logit less its log-prob: exact where a small probability would be 0."""
    return logits_BV.amax(-1) - probs_BV.amax(-1).log()


def _at(mass_BV: Tensor, share_B1: Tensor) -> Tensor:
    """Where the running sum of each row's masses first exceeds this share of their total: in whole blocks, then inside one."""
    blocks_BNW = pad(mass_BV, (0, -mass_BV.shape[1] % BLOCK)).reshape(len(mass_BV), -1, BLOCK)
    sums_BN = blocks_BNW.sum(-1).double()
    ends_BN = sums_BN.cumsum(-1)
    points_B1 = share_B1 * ends_BN[:, -1:]
    block_B1 = _first_above(ends_BN, points_B1)
    inside_BW = blocks_BNW.gather(1, block_B1[:, :, None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    sum_B1 = sums_BN.gather(1, block_B1)
    # Below 1 whatever was rounded, so that the place found has a mass.
    share_B1 = ((points_B1 - ends_BN.gather(1, block_B1) + sum_B1) / sum_B1).clamp_(0.0, 1.0 - 1e-15)
    place_B1 = block_B1 * BLOCK + _first_above(inside_BW, share_B1 * inside_BW[:, -1:])
    return place_B1[:, 0].clamp_(max=mass_BV.shape[1] - 1)


def _first_above(sums_BN: Tensor, points_B1: Tensor) -> Tensor:
    return torch.searchsorted(sums_BN, points_B1, right=True).clamp_(max=sums_BN.shape[1] - 1)


def _tempered(logits_BV: Tensor, temperatures: Sequence[float]) -> Tensor:
    scale = torch.tensor([1.0 if t < GREEDY_BELOW else t for t in temperatures], device=logits_BV.device)
    return (logits_BV / scale[:, None]).softmax(-1)


def _nucleus(probs_BV: Tensor, top_ps: Tensor) -> Tensor:
    """The smallest set of most likely tokens whose mass reaches top-p; the first is always in it."""
    ordered, index = probs_BV.sort(dim=-1, descending=True)
    beyond = ordered.cumsum(-1) - ordered >= top_ps[:, None]
    # With top-p = 1 rounding must not cut the tail.
    beyond &= (top_ps < 1.0)[:, None]
    return probs_BV.masked_fill(beyond.scatter(1, index, beyond), 0.0)


def _layers(cache: Any) -> list[Any]:
    """The plain attention layers of a joinable cache: ``keys`` and ``values``, [B, heads, L, head_dim]."""
    return list(cache.layers)


def _widen(tensor: Tensor, width: int) -> Tensor:
    """Pad [B, heads, L, head_dim] on the left of L."""
    return pad(tensor, (0, 0, width - tensor.shape[2], 0))
