"""Groups as one row without padding: every prompt once, its completions behind it, none of them in sight of another.

The row is a tree of segments. A prompt is a segment, or a chain of them where prompts begin alike (a system prompt, a
conversation's history); a completion is a segment below its prompt, or a chain where siblings begin alike. A token sees the
segments above its own and its own up to itself, so siblings and strangers never meet, and its position counts from the root.
What comes out at a token is therefore what comes out where its sequence stands alone.

Attention runs in blocks: segments of like size in one call, the small ones filled up. Axis letters: T tokens of the row, M
predicted tokens, N segments of a block, Q and K their queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

MIN_SHARED = 16
"""A beginning that prompts, or a prompt's completions, share becomes a segment where that saves at least so many tokens."""
MAX_FILLING = 16_384
"""Query-key products that filling up may cost a block; about what one more attention call would."""
ROUNDED_FROM, ROUNDED_TO = 1_024, 64
"""On the CPU rows and predictions from so many tokens on are filled up: tensors of ever new sizes leave holes in the heap."""
MAX_PRODUCTS = 2**24
"""Query-key products of a block of several segments: bounds its mask."""

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """Segments whose attention is one call: the row's tokens ``start`` to ``stop``, as N segments of Q tokens.

    ``depth``: the most tokens that are above any of them.
    ``query_NQ``: which of these tokens stand where, and ``real``: where in [N x Q] they stand; None where nothing is filled up.
    ``key_NK``: the row's tokens that are keys; None where they are the queries. ``mask_NQK``: True where a query sees a key;
    None where that is all keys up to its own.
    """

    start: int
    stop: int
    n: int
    depth: int
    query_NQ: Tensor | None
    real: Tensor | None
    key_NK: Tensor | None
    mask_NQK: Tensor | None

    def rows(self, of_THD: Tensor, index: Tensor | None) -> Tensor:
        """The block's queries or keys, [N, Q or K, heads, D], by ``query_NQ`` or ``key_NK``."""
        rows = of_THD[self.start : self.stop] if index is None else of_THD.index_select(0, index.flatten())
        return rows.reshape(self.n, -1, *rows.shape[1:])


@dataclass(frozen=True, slots=True)
class Packing:
    """The row, and where in it each completion token is predicted (completion after completion, without padding)."""

    ids_T: Tensor
    positions_T: Tensor
    predicts_M: Tensor
    blocks: tuple[Block, ...]
    segments: tuple[Segment, ...]
    """In the row's order."""

    @property
    def n_tokens(self) -> int:
        """Tokens that the blocks have; what the row holds behind them only fills it up, and attends to nothing."""
        return self.blocks[-1].stop if self.blocks else 0


@dataclass(slots=True, eq=False)
class Segment:
    """Tokens that follow those of the segments in ``above``, which are ``depth`` in all; ``offset``: where the row has them."""

    tokens: Ids
    above: tuple[Segment, ...]
    depth: int
    offset: int = 0

    @property
    def n_keys(self) -> int:
        return self.depth + len(self.tokens)

    @property
    def last(self) -> int:
        """The row's index of the last token."""
        return self.offset + len(self.tokens) - 1

    def indices(self, since: Segment | None = None) -> list[int]:
        """The row's indices of the tokens from the root on, or from the end of a segment that this one is or follows."""
        chain = (*self.above, self)
        chain = chain[chain.index(since) + 1 :] if since else chain
        return [index for segment in chain for index in range(segment.offset, segment.offset + len(segment.tokens))]

    def below(self, tokens: Ids) -> Segment:
        return Segment(tokens, (*self.above, self), self.n_keys)


def pack(prompts: Sequence[Ids], completions: Sequence[Ids], device: torch.device) -> Packing:
    """The packing of N sequences, each a prompt of at least one token and a completion.

    A completion's last token predicts nothing that is asked for and is left out.
    """
    segments, ends = tree(prompts)
    bodies: dict[Ids, dict[Ids, Segment]] = {}
    read: dict[Ids, list[Ids]] = {}
    for prompt, completion in zip(prompts, completions, strict=True):
        read.setdefault(prompt, []).append(completion[:-1])
    for prompt, tokens in read.items():
        below, bodies[prompt] = tree(tokens, ends[prompt])
        segments += below
    blocks = _laid_out(segments)
    predicts = [
        index
        for prompt, completion in zip(prompts, completions, strict=True)
        if completion
        for index in (ends[prompt].last, *bodies[prompt][completion[:-1]].indices(since=ends[prompt]))
    ]
    packing = _packing(blocks, predicts, device)
    n_more = filling(packing.n_tokens, device)
    return replace(packing, ids_T=pad(packing.ids_T, (0, n_more)), positions_T=pad(packing.positions_T, (0, n_more)))


def filling(n: int, device: torch.device) -> int:
    """How many tokens are added to ``n``, see `ROUNDED_FROM`."""
    return -n % ROUNDED_TO if device.type == "cpu" and n >= ROUNDED_FROM else 0


def pack_prompts(prompts: Sequence[Ids], device: torch.device) -> tuple[Packing, list[Tensor]]:
    """The packing of different prompts alone, and where the row has the tokens of each; predicted is what follows each."""
    segments, ends = tree(prompts)
    blocks = _laid_out(segments)
    places = [torch.tensor(ends[prompt].indices(), device=device) for prompt in prompts]
    return _packing(blocks, [ends[prompt].last for prompt in prompts], device), places


def _laid_out(segments: Sequence[Segment]) -> list[list[Segment]]:
    """The segments in blocks, each told where it stands in the row."""
    blocks = list(_blocks(segments))
    row = [segment for block in blocks for segment in block]
    for segment, offset in zip(row, accumulate((len(segment.tokens) for segment in row), initial=0), strict=False):
        segment.offset = offset
    return blocks


def _packing(blocks: Sequence[Sequence[Segment]], predicts: Sequence[int], device: torch.device) -> Packing:
    row = [segment for block in blocks for segment in block]
    return Packing(
        ids_T=torch.tensor([token for segment in row for token in segment.tokens], device=device),
        positions_T=torch.tensor(
            [position for segment in row for position in range(segment.depth, segment.n_keys)], device=device
        ),
        predicts_M=torch.tensor(predicts, dtype=torch.int64, device=device),
        blocks=tuple(_block(block, device) for block in blocks),
        segments=tuple(row),
    )


def tree(sequences: Sequence[Ids], root: Segment | None = None) -> tuple[list[Segment], dict[Ids, Segment]]:
    """The segments of the distinct sequences, below ``root``, and the one in which each sequence ends."""
    segments: list[Segment] = []
    ends: dict[Ids, Segment] = {}

    def add(tokens: Ids, parent: Segment | None) -> Segment:
        segment = parent.below(tokens) if parent else Segment(tokens, (), 0)
        segments.append(segment)
        return segment

    # Sorted, sequences that begin alike stand together. A stack, as histories may nest deeper than Python calls.
    todo: list[tuple[list[Ids], int, Segment | None]] = [(sorted(set(sequences)), 0, root)]
    while todo:
        branch, start, parent = todo.pop()
        first = branch[0]
        shared = common_length(first, branch[-1], start)
        if len(branch) > 1 and (shared - start) * (len(branch) - 1) >= MIN_SHARED:
            start, parent = shared, add(first[start:shared], parent)
        if len(first) == start and parent:
            ends[first] = parent
            branch = branch[1:]
        elif len(first) == shared:
            ends[first] = add(first[start:], parent)
            branch = branch[1:]
        todo.extend((list(twigs), start, parent) for _, twigs in groupby(branch, key=lambda ids: ids[shared]))
    return segments, ends


def common_length(one: Ids, other: Ids, known: int = 0) -> int:
    """How many tokens two sequences share from the beginning on; the first ``known`` are the same."""
    n = known
    while n < min(len(one), len(other)) and one[n] == other[n]:
        n += 1
    return n


def _blocks(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Segments of like size together; those that see their own tokens alone apart, as they need no mask."""
    for is_root in (True, False):
        ordered = sorted(
            (segment for segment in segments if is_root is not bool(segment.above)),
            key=lambda segment: (len(segment.tokens), segment.n_keys),
        )
        block: list[Segment] = []
        asked = n_keys = 0
        for segment in ordered:
            products, n_queries = len(segment.tokens) * segment.n_keys, len(segment.tokens)
            widest = max(n_keys, segment.n_keys)
            area = (len(block) + 1) * n_queries * widest
            if block and (area - asked - products > MAX_FILLING or area > MAX_PRODUCTS):
                yield block
                block, asked, widest = [], 0, segment.n_keys
            block.append(segment)
            asked, n_keys = asked + products, widest
        if block:
            yield block


def _block(segments: Sequence[Segment], device: torch.device) -> Block:
    start, stop = segments[0].offset, segments[-1].last + 1
    length_N = torch.tensor([len(segment.tokens) for segment in segments])
    depth_N = torch.tensor([segment.depth for segment in segments])
    n, n_queries, n_keys = len(segments), int(length_N.max()), int((depth_N + length_N).max())
    query_Q = torch.arange(n_queries)
    real_NQ = query_Q < length_N[:, None]
    is_filled, is_root = not bool(real_NQ.all()), not bool(depth_N.any())
    offset_N = torch.tensor([segment.offset for segment in segments])
    # What fills up stands for a token that is there: what comes out is thrown away, and must be finite.
    query_NQ = torch.where(real_NQ, offset_N[:, None] + query_Q, start) if is_filled else None
    if is_root:
        key_NK, mask_NQK = query_NQ, None
    else:
        key_NK = torch.tensor([_keys(segment, n_keys) for segment in segments])
        same = bool((depth_N == depth_N[0]).all())
        seen_NQ = (depth_N[:1] if same else depth_N)[:, None] + query_Q
        mask_NQK = torch.arange(n_keys) <= seen_NQ[:, :, None]
    found = (query_NQ, real_NQ.flatten().nonzero()[:, 0] if is_filled else None, key_NK, mask_NQK)
    return Block(start, stop, n, int(depth_N.max()), *(None if tensor is None else tensor.to(device) for tensor in found))


def _keys(segment: Segment, n_keys: int) -> list[int]:
    keys = segment.indices()
    return keys + keys[:1] * (n_keys - len(keys))
