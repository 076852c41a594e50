"""Micro batches: the groups of a batch in parts of at most so many tokens, each one forward pass."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from pairloop.learner.data import TokenGroup
from pairloop.learner.sharding import undivided
from pairloop.policy.packed import takes_packed
from pairloop.policy.packing import MIN_SHARED, common_length
from pairloop.policy.scoring import bare


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Groups of one forward pass, and the tokens that it reads."""

    groups: list[TokenGroup]
    tokens: int


@dataclass(slots=True)
class _Part:
    """Groups ``start`` to ``stop`` of the ordered ones; a padded part has ``rows`` of the last one's length."""

    start: int
    stop: int
    tokens: int
    rows: int


def micro_batches(groups: Sequence[TokenGroup], max_tokens: int, *, packed: bool) -> list[MicroBatch]:
    """The groups in as few parts of at most ``max_tokens`` as their order allows, the largest as small as it can be.

    A group that is larger stands alone; 0 takes all at once. ``packed``: each distinct prompt counts once, and prompts that
    begin alike stand together (tokens are counted a little high: beginnings count as shared only where packing is sure to
    share them). Otherwise rows are padded: like lengths stand together, and a part counts its rows times its longest.
    """
    if not groups:
        return []
    ordered = sorted(groups, key=(lambda group: group.prompt) if packed else (lambda group: (group.length,)))
    grown = (_packed if packed else _padded)(ordered)
    parts = _parts(len(ordered), grown, max_tokens)
    if len(parts) > 1:
        fewest = len(parts)
        smallest = bisect_left(
            range(max_tokens), True, lo=1, key=lambda bound: len(_parts(len(ordered), grown, bound)) <= fewest
        )
        parts = _parts(len(ordered), grown, smallest)
    return [MicroBatch(ordered[part.start : part.stop], part.tokens) for part in parts]


def is_packed(model: nn.Module, groups: Sequence[TokenGroup]) -> bool:
    """True where the model reads the groups as a packed row."""
    return takes_packed(bare(undivided(model)), max((group.length for group in groups), default=0))


_Grown = Callable[[_Part | None, int], _Part]
"""The part with one more group, given by its index; a new part of this group alone where there is none."""


def _parts(n: int, grown: _Grown, max_tokens: int) -> list[_Part]:
    parts = [grown(None, 0)]
    for i in range(1, n):
        part = grown(parts[-1], i)
        if max_tokens and part.tokens > max_tokens:
            parts.append(grown(None, i))
        else:
            parts[-1] = part
    return parts


def _packed(ordered: Sequence[TokenGroup]) -> _Grown:
    answers = [sum(max(0, len(completion.token_ids) - 1) for completion in group.completions) for group in ordered]
    shared = [0, *(_shared(one.prompt, other.prompt) for one, other in pairwise(ordered))]

    def grown(part: _Part | None, i: int) -> _Part:
        own = len(ordered[i].prompt) + answers[i]
        if part is None:
            return _Part(i, i + 1, own, 0)
        return _Part(part.start, i + 1, part.tokens + own - shared[i], 0)

    return grown


def _shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Tokens of the later prompt that packing is sure not to read again (see `packing.tree`)."""
    length = common_length(one, other)
    return length if length == len(one) == len(other) else max(0, length - MIN_SHARED + 1)


def _padded(ordered: Sequence[TokenGroup]) -> _Grown:
    def grown(part: _Part | None, i: int) -> _Part:
        start, before = (i, 0) if part is None else (part.start, part.rows)
        rows = before + len(ordered[i].completions)
        return _Part(start, i + 1, rows * ordered[i].length, rows)

    return grown
