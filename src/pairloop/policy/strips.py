"""Attention over a packed row on the CPU in bfloat16: plain matrix products in strips of queries.

That takes a third of the time of torch's own fused attention, which in this type is slow on the CPU: matrix products are not,
and a strip's scores stay in the cache. Scores are rounded to bfloat16, as they are in transformers' plain attention, and their
softmax is taken in float32. Kept are the row's queries, keys and values; the backward pass computes the scores again.

Axis letters beside those of `packing`: H heads, J heads of keys, G = H / J that share one, D their size, B = N x J.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pairloop.policy.packing import Block, Packing

STRIP = 128
"""Queries of a strip; it reads no key behind its last query."""
MAX_SCORES = 2**19
"""Scores held at once, as far as one pair of heads has no more."""


def strip_attention(query_THD: Tensor, key_TJD: Tensor, value_TJD: Tensor, packing: Packing, scale: float) -> Tensor:
    """The row after attention, [T, H, D], differentiable once."""
    attended: Any = _StripAttention.apply(query_THD, key_TJD, value_TJD, packing, scale)  # type: ignore[no-untyped-call]
    result: Tensor = attended
    return result


class _StripAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_THD: Tensor, key_TJD: Tensor, value_TJD: Tensor, packing: Packing, scale: float) -> Tensor:
        ctx.save_for_backward(query_THD, key_TJD, value_TJD)
        ctx.packing, ctx.scale = packing, scale
        attended_THD = query_THD.new_empty(query_THD.shape)
        with torch.autocast("cpu", enabled=False):
            for block in packing.blocks:
                rows = _Rows.of(block, query_THD, key_TJD, value_TJD)
                out_BGQD = torch.empty_like(rows.query_BGQD)
                for strip in _strips(block, rows):
                    weights = strip.weights(rows, scale)
                    attended = torch.bmm(weights, rows.value_BKD[strip.b, : strip.n_keys])
                    out_BGQD[strip.b, :, strip.q] = strip.unfolded(attended)
                attended_THD[block.start : block.stop] = rows.flat(out_BGQD)
        attended_THD[packing.n_tokens :] = 0
        return attended_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        query_THD, key_TJD, value_TJD = ctx.saved_tensors
        grad_query = query_THD.new_empty(query_THD.shape)
        exact = torch.promote_types(query_THD.dtype, torch.float32)
        grad_key, grad_value = (torch.zeros(key_TJD.shape, dtype=exact) for _ in range(2))
        with torch.autocast("cpu", enabled=False):
            for block in ctx.packing.blocks:
                rows = _Rows.of(block, query_THD, key_TJD, value_TJD)
                grad_BGQD = rows.filled(grad_THD[block.start : block.stop])
                to_query = torch.empty_like(rows.query_BGQD)
                to_key, to_value = (torch.zeros(rows.key_BKD.shape, dtype=exact) for _ in range(2))
                for strip in _strips(block, rows):
                    key, value = (of[strip.b, : strip.n_keys] for of in (rows.key_BKD, rows.value_BKD))
                    query, grad = (strip.folded(of) for of in (rows.query_BGQD, grad_BGQD))
                    weights = strip.weights(rows, ctx.scale)
                    to_value[strip.b, : strip.n_keys] += torch.bmm(weights.mT, grad)
                    to_weights = torch.bmm(grad, value.mT)
                    to_scores = torch.ops.aten._softmax_backward_data(to_weights, weights, -1, weights.dtype)
                    to_key[strip.b, : strip.n_keys] += torch.bmm(to_scores.mT, query)
                    to_query[strip.b, :, strip.q] = strip.unfolded(torch.bmm(to_scores, key))
                grad_query[block.start : block.stop] = rows.flat(to_query)
                rows.add_to_keys(grad_key, to_key)
                rows.add_to_keys(grad_value, to_value)
        grad_query[ctx.packing.n_tokens :] = 0
        return (
            grad_query.mul_(ctx.scale),
            grad_key.mul_(ctx.scale).to(key_TJD.dtype),
            grad_value.to(value_TJD.dtype),
            None,
            None,
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """A block's queries, keys and values by pairs of segment and key head."""

    block: Block
    query_BGQD: Tensor
    key_BKD: Tensor
    value_BKD: Tensor

    @classmethod
    def of(cls, block: Block, query_THD: Tensor, key_TJD: Tensor, value_TJD: Tensor) -> _Rows:
        n_shared = key_TJD.shape[1]
        query = block.rows(query_THD, block.query_NQ)
        query = query.view(*query.shape[:2], n_shared, -1, query.shape[-1]).permute(0, 2, 3, 1, 4).flatten(0, 1)
        key, value = (block.rows(of, block.key_NK).transpose(1, 2).flatten(0, 1) for of in (key_TJD, value_TJD))
        return cls(block, query, key, value)

    def flat(self, of_BGQD: Tensor) -> Tensor:
        """The block's tokens without what fills up, [stop - start, H, D]."""
        n_queries, size = of_BGQD.shape[-2:]
        flat = of_BGQD.view(self.block.n, -1, n_queries, size).transpose(1, 2).flatten(0, 1)
        return flat if self.block.real is None else flat.index_select(0, self.block.real)

    def filled(self, grad_THD: Tensor) -> Tensor:
        """The other way round, zero where it fills up, [B, G, Q, D]."""
        _, n_heads_shared, n_queries, size = self.query_BGQD.shape
        if self.block.real is not None:
            whole = grad_THD.new_zeros(self.block.n * n_queries, *grad_THD.shape[1:])
            grad_THD = whole.index_copy_(0, self.block.real, grad_THD)
        grad = grad_THD.reshape(self.block.n, n_queries, -1, n_heads_shared, size)
        return grad.permute(0, 2, 3, 1, 4).flatten(0, 1)

    def add_to_keys(self, sum_TJD: Tensor, of_BKD: Tensor) -> None:
        block, shape = self.block, sum_TJD.shape[1:]
        flat = of_BKD.view(block.n, -1, *of_BKD.shape[1:]).transpose(1, 2).reshape(-1, shape.numel())
        if block.key_NK is None:
            sum_TJD[block.start : block.stop] += flat.view(-1, *shape)
        else:
            sum_TJD.view(-1, shape.numel()).scatter_add_(0, block.key_NK.view(-1, 1).expand_as(flat), flat)


@dataclass(frozen=True, slots=True)
class _Strip:
    """Queries ``q`` of the pairs ``b``, and what their scores start from: 0 where a query sees a key, else minus infinity."""

    b: slice
    q: slice
    n_keys: int
    bias: Tensor

    def weights(self, rows: _Rows, scale: float) -> Tensor:
        """Attention weights, [b, G x q, n_keys]."""
        key = rows.key_BKD[self.b, : self.n_keys]
        return torch.softmax(torch.baddbmm(self.bias, self.folded(rows.query_BGQD), key.mT, alpha=scale), -1)

    def folded(self, of_BGQD: Tensor) -> Tensor:
        return of_BGQD[self.b, :, self.q].flatten(1, 2)

    def unfolded(self, of_BRD: Tensor) -> Tensor:
        return of_BRD.view(len(of_BRD), -1, self.q.stop - self.q.start, of_BRD.shape[-1])


def _strips(block: Block, rows: _Rows) -> Iterator[_Strip]:
    n_pairs, n_shared_by, n_queries, _ = rows.query_BGQD.shape
    for start in range(0, n_queries, STRIP):
        q = slice(start, min(start + STRIP, n_queries))
        n_keys = min(block.depth + q.stop, rows.key_BKD.shape[1])
        bias_NQK = _bias(block, q, n_keys, rows.query_BGQD.dtype)
        size = max(1, MAX_SCORES // (n_shared_by * (q.stop - q.start) * n_keys))
        for first in range(0, n_pairs, size):
            b = slice(first, min(first + size, n_pairs))
            segments = torch.arange(b.start, b.stop) // (n_pairs // block.n)
            bias = bias_NQK if len(bias_NQK) == 1 else bias_NQK[segments]
            yield _Strip(b, q, n_keys, bias.repeat(1, n_shared_by, 1).expand(b.stop - b.start, -1, -1))


def _bias(block: Block, q: slice, n_keys: int, dtype: torch.dtype) -> Tensor:
    if block.mask_NQK is None:
        mask_NQK = (torch.arange(n_keys) <= torch.arange(q.start, q.stop)[:, None])[None]
    else:
        mask_NQK = block.mask_NQK[:, q, :n_keys]
    return torch.zeros(mask_NQK.shape, dtype=dtype).masked_fill_(~mask_NQK, -math.inf)
