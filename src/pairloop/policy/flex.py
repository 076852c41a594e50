"""Attention over a packed row as one fused kernel on CUDA: FlexAttention under a mask that is computed, not stored.

A token sees those of the segments above its own, and its own up to itself. Numbered in depth-first order, a segment and all
below it are an interval, so whether one stands above another is two comparisons. On the CPU FlexAttention has no backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from pairloop.policy.packing import Packing, Segment


def row_mask(packing: Packing) -> BlockMask:
    """The packing's mask for `attend_row`: made once, read by every layer."""
    device = packing.ids_T.device
    interval_2N = torch.tensor(_intervals(packing.segments))
    lengths = torch.tensor([len(segment.tokens) for segment in packing.segments])
    first_T, last_T = interval_2N.repeat_interleave(lengths, dim=1).to(device)
    position_T = packing.positions_T

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del b, h
        above = (first_T[k] <= first_T[q]) & (first_T[q] <= last_T[k])
        visible: Tensor = above & (position_T[k] <= position_T[q])
        return visible

    n = len(position_T)
    return create_block_mask(sees, None, None, n, n, device=device.type)


def attend_row(query_THD: Tensor, key_TJD: Tensor, value_TJD: Tensor, *, mask: BlockMask, scale: float | None) -> Tensor:
    """The row after attention, [T, heads, D]; differentiable on CUDA."""
    query, key, value = (of.transpose(0, 1)[None] for of in (query_THD, key_TJD, value_TJD))
    attend: Any = _compiled() if query.is_cuda else flex_attention
    attended = attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    result: Tensor = attended[0].transpose(0, 1)
    return result


@cache
def _compiled() -> Callable[..., Any]:
    """One kernel for rows of all lengths."""
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


def _intervals(segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """Of each segment its number in depth-first order, and the largest number at or below it."""
    below: dict[int | None, list[int]] = {}
    index = {id(segment): i for i, segment in enumerate(segments)}
    for i, segment in enumerate(segments):
        below.setdefault(index[id(segment.above[-1])] if segment.above else None, []).append(i)
    first, last = [0] * len(segments), [0] * len(segments)
    number = 0
    # A segment is met twice: before those below it, and after them.
    todo = [(i, False) for i in below.get(None, ())]
    while todo:
        i, is_done = todo.pop()
        if is_done:
            last[i] = number - 1
            continue
        first[i] = number
        number += 1
        todo.append((i, True))
        todo += [(child, False) for child in below.get(i, ())]
    return first, last
