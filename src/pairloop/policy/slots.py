"""Decoding with keys and values kept in place: a prompt's once for all its completions, a completion's in a slot of its own.

The buffers are written, never joined: a row that ends hands its slot to the last one, a new one takes the next free slot, and
room grows in steps and is given back. A row's attention has two parts under one softmax: the completions of a prompt ask its
keys together, and each asks its own. Keys lie transposed, the way the products read them.

Axis letters: B rows, P prompts, W rows of one prompt, K key heads, R query heads of one key head, D head size, L columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

from pairloop.policy.head import logits_of
from pairloop.policy.packed import attend_blocks, run
from pairloop.policy.packing import Ids, pack_prompts

MAX_WIDTH = 8
"""Rows that share one copy of their prompt's keys: it bounds what is filled up where another prompt has fewer."""
MIN_SHARED = 128
"""Shorter prompts are copied into the slots of their rows: to ask them apart would cost more than it saves."""
FREE_ROWS, FREE_COLUMNS = 8, 128
"""Room that is kept though nothing needs it, beyond as much again as is needed."""


class Slots:
    """Keys and values of sequences, one slot each, for all layers: keys [slots, K, D, L], values [slots, K, L, D].

    What a slot does not use is finite: it is masked, and 0 times it must be 0.
    """

    def __init__(self, *, columns_more: int) -> None:
        self.room = (0, 0)
        """Slots and columns there are."""
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._columns_more = columns_more

    def reserve(self, slots: int, columns: int) -> None:
        """Make room for so much, or give back room that is far more; what the slots hold stays."""
        room = (_room(self.room[0], slots, 0, FREE_ROWS), _room(self.room[1], columns, self._columns_more, FREE_COLUMNS))
        if room != self.room:
            self.room = room
            # One after the other, so that no more than one buffer is there twice.
            for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
                self.keys[layer] = _moved(keys, (room[0], *keys.shape[1:3], room[1]))
                self.values[layer] = _moved(values, (room[0], values.shape[1], room[1], values.shape[3]))

    def layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's buffers; made on first sight of a key and a value, [..., K, D]."""
        if layer == len(self.keys):
            slots, columns = self.room
            # bfloat16 scores would be rounded before the softmax, and are no faster here.
            dtype = torch.float32 if key.device.type == "cpu" and key.dtype is not torch.float64 else key.dtype
            self.keys.append(key.new_zeros((slots, *key.shape[-2:], columns), dtype=dtype))
            self.values.append(value.new_zeros((slots, value.shape[-2], columns, value.shape[-1]), dtype=dtype))
        return self.keys[layer], self.values[layer]

    def write(self, layer: int, slots: Sequence[int], key_LKD: Tensor, value_LKD: Tensor) -> None:
        """Fill slots from their first column on, all with the same."""
        keys, values = self.layer(layer, key_LKD, value_LKD)
        columns = len(key_LKD)
        for slot in slots:
            keys[slot, ..., :columns] = key_LKD.permute(1, 2, 0)
            keys[slot, ..., columns:] = 0
            values[slot, :, :columns] = value_LKD.transpose(0, 1)
            values[slot, :, columns:] = 0

    def move(self, source: int, target: int) -> None:
        for buffer in (*self.keys, *self.values):
            buffer[target] = buffer[source]

    def clear(self, start: int, stop: int) -> None:
        for buffer in (*self.keys, *self.values):
            buffer[start:stop] = 0


@dataclass(slots=True)
class Prompt:
    """A prompt in a slot: its tokens, what the head said behind it, and how many rows follow it."""

    ids: Ids
    logits_V: Tensor
    width: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """Who asks which prompt: fixed until a row comes or goes.

    ``asks_PW``: the row that asks prompt p as its w-th, and ``asked_B``: where in [P x W] row b stands; None where the rows
    stand in this order already. ``length_B``: of the row's prompt, 0 for a row that asks none. ``mask_B11L``: -inf from there
    on; None where all are of one length. ``alone_B111``: the rows that ask none; None where all ask.
    """

    n_prompts: int
    columns: int
    asks_PW: Tensor | None
    asked_B: Tensor | None
    mask_B11L: Tensor | None
    alone_B111: Tensor | None
    length_B: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Prompt], slot_B: Sequence[int | None], device: torch.device) -> Layout:
        rows: list[list[int]] = [[] for _ in prompts]
        for row, slot in enumerate(slot_B):
            if slot is not None:
                rows[slot].append(row)
        width = max(map(len, rows), default=0)
        # What fills up asks for row 0; nobody looks at the answer.
        asks = [(*mine, *(0,) * (width - len(mine))) for mine in rows]
        asked = [0] * len(slot_B)
        for slot, mine in enumerate(rows):
            for w, row in enumerate(mine):
                asked[row] = slot * width + w
        in_order = asked == list(range(len(prompts) * width))
        lengths = [0 if slot is None else len(prompts[slot].ids) for slot in slot_B]
        length_B = torch.tensor(lengths, device=device)
        return cls(
            len(prompts),
            max(lengths),
            None if in_order else torch.tensor(asks, device=device).flatten(),
            None if in_order else torch.tensor(asked, device=device),
            None if len(set(lengths)) == 1 else _closed_from(length_B, max(lengths)),
            None if all(lengths) else (length_B == 0)[:, None, None, None],
            length_B,
        )


class SlotBatch:
    """Rows that decode together, of a model that takes packed rows (`packed.takes_packed`)."""

    is_joinable = True

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._prompts: list[Prompt] = []
        self._slot_B: list[int | None] = []
        """Where the row's prompt is; None where the row holds it itself."""
        self._age_B: list[int] = []
        """Columns of the row's own slot that are used."""
        self._shared = Slots(columns_more=16)
        self._own = Slots(columns_more=32)
        self._layout: Layout | None = None

    def admit(self, prompts: Sequence[Ids]) -> Tensor:
        """Put one row behind each prompt; float32 logits_BV of these. A long prompt that has rows already is not read again."""
        first = len(self._slot_B)
        self._slot_B += [None] * len(prompts)
        self._age_B += [0 if len(ids) >= MIN_SHARED else len(ids) for ids in prompts]
        self._own.reserve(len(self._age_B), max(self._age_B) + 1)
        self._own.clear(first, len(self._slot_B))
        rows: dict[Ids, list[int]] = {}
        for row, ids in enumerate(prompts, first):
            rows.setdefault(ids, []).append(row)
        known = {prompt.ids: prompt.logits_V for prompt in self._prompts}
        logits = known | self._read({ids: mine for ids, mine in rows.items() if ids not in known})
        for row, ids in enumerate(prompts, first):
            if len(ids) >= MIN_SHARED:
                self._slot_B[row] = self._follow(ids)
        self._layout = None
        return torch.stack([logits[ids] for ids in prompts])

    def step(self, token_ids_B: Tensor) -> Tensor:
        """Append one token to each row; float32 logits_BV."""
        if self._layout is None:
            self._layout = Layout.of(self._prompts, self._slot_B, self._device)
        self._own.reserve(len(self._age_B), max(self._age_B) + 1)
        step = Step(self._shared, self._own, self._layout, self._age_B)
        positions_B = self._layout.length_B + step.age_B
        hidden = run(self._model, token_ids_B[:, None], positions_B[:, None], attend=step)
        self._age_B = [age + 1 for age in self._age_B]
        return logits_of(self._model, hidden[:, 0]).float()

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in the order of `compact`: row b is ``rows[b]`` from now on."""
        for b, row in enumerate(rows):
            if row != b:
                self._own.move(row, b)
        self._slot_B = [self._slot_B[row] for row in rows]
        self._age_B = [self._age_B[row] for row in rows]
        for prompt in self._prompts:
            prompt.width = 0
        for slot in self._slot_B:
            if slot is not None:
                self._prompts[slot].width += 1
        self._forget()
        self._own.reserve(len(rows), max(self._age_B) + 1)
        self._layout = None

    def _read(self, fresh: Mapping[Ids, Sequence[int]]) -> dict[Ids, Tensor]:
        """Read new prompts, each once: a long one into the next free slot, a short one into its rows; logits_V behind each."""
        if not fresh:
            return {}
        packing, columns = pack_prompts(list(fresh), self._device)
        slots = dict(zip((ids for ids in fresh if len(ids) >= MIN_SHARED), count(len(self._prompts)), strict=False))
        self._reserve_prompts(*slots)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
            rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
            for (ids, followers), index in zip(fresh.items(), columns, strict=True):
                buffers, targets = (self._shared, [slots[ids]]) if ids in slots else (self._own, followers)
                buffers.write(layer, targets, rows[1][index], rows[2][index])
            return attend_blocks(packing, *rows, scale=scale)[None]

        hidden = run(self._model, packing.ids_T[None], packing.positions_T[None], attend=attend)
        logits_PV = logits_of(self._model, hidden[0].index_select(0, packing.predicts_M)).float()
        logits = dict(zip(fresh, logits_PV, strict=True))
        self._prompts += [Prompt(ids, logits[ids]) for ids in slots]
        return logits

    def _reserve_prompts(self, *more: Ids) -> None:
        known = [*(prompt.ids for prompt in self._prompts), *more]
        self._shared.reserve(len(known), max(map(len, known), default=0))

    def _follow(self, ids: Ids) -> int:
        """The slot of the prompt that one more row follows: a copy of it where all have their full width."""
        slots = [slot for slot, prompt in enumerate(self._prompts) if prompt.ids == ids]
        free = next((slot for slot in slots if self._prompts[slot].width < MAX_WIDTH), None)
        if free is None:
            free = len(self._prompts)
            self._reserve_prompts(ids)
            self._shared.move(slots[0], free)
            self._prompts.append(Prompt(ids, self._prompts[slots[0]].logits_V))
        self._prompts[free].width += 1
        return free

    def _forget(self) -> None:
        """Free the slots of the prompts that no row follows any more."""
        order = compact([slot for slot, prompt in enumerate(self._prompts) if prompt.width])
        for slot, old in enumerate(order):
            if old != slot:
                self._shared.move(old, slot)
        now_at = {old: slot for slot, old in enumerate(order)}
        self._slot_B = [None if slot is None else now_at[slot] for slot in self._slot_B]
        self._prompts = [self._prompts[old] for old in order]
        self._reserve_prompts()


class Step:
    """One token of every row: writes its key and value, and attends to the row's prompt and to the row."""

    def __init__(self, shared: Slots, own: Slots, layout: Layout, ages: Sequence[int]) -> None:
        self.shared, self.own, self.layout = shared, own, layout
        device = layout.length_B.device
        self.age_B = torch.tensor(ages, device=device)
        self.columns = max(ages) + 1
        self._one_age = ages[0] if len(set(ages)) == 1 else None
        self._row_B = torch.arange(len(ages), device=device)
        self._mask_B11L = None if self._one_age is not None else _closed_from(self.age_B + 1, self.columns)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[B, heads, 1, D] queries, keys and values to [B, 1, heads, D]."""
        n, n_heads, _, size = query.shape
        keys, values = self._write(layer, key[:, :, 0], value[:, :, 0])
        scaled = (query[:, :, 0] * (size**-0.5 if scale is None else scale)).to(keys.dtype)
        query_BKRD = scaled.reshape(n, key.shape[1], -1, size)
        own = query_BKRD @ keys
        if self._mask_B11L is not None:
            own += self._mask_B11L
        attended = self._with_prompts(layer, query_BKRD, own, values) if self.layout.n_prompts else _probs(own) @ values
        return attended.to(query.dtype).reshape(n, 1, n_heads, -1)

    def _with_prompts(self, layer: int, query_BKRD: Tensor, own: Tensor, values: Tensor) -> Tensor:
        share, columns = query_BKRD.shape[2], self.layout.columns
        keys = self.shared.keys[layer][: self.layout.n_prompts, ..., :columns]
        scores = torch.cat([self._told(self._asking(query_BKRD) @ keys, share), own], dim=-1)
        if self.layout.mask_B11L is not None:
            scores[..., :columns] += self.layout.mask_B11L
        probs = _probs(scores)
        shared = self._asking(probs[..., :columns]) @ self.shared.values[layer][: self.layout.n_prompts, :, :columns]
        told = self._told(shared, share)
        if self.layout.alone_B111 is not None:
            told = told.masked_fill(self.layout.alone_B111, 0)
        return (probs[..., columns:] @ values).add_(told)

    def _write(self, layer: int, key_BKD: Tensor, value_BKD: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's own keys and values, the new ones among them."""
        keys, values = self.own.layer(layer, key_BKD, value_BKD)
        n = len(key_BKD)
        if self._one_age is not None:
            keys[:n, :, :, self._one_age] = key_BKD
            values[:n, :, self._one_age] = value_BKD
        else:
            keys[self._row_B, :, :, self.age_B] = key_BKD.to(keys.dtype)
            values[self._row_B, :, self.age_B] = value_BKD.to(values.dtype)
        return keys[:n, ..., : self.columns], values[:n, :, : self.columns]

    def _asking(self, rows_BKRX: Tensor) -> Tensor:
        """What the rows ask, prompt after prompt: [B, K, R, X] to [P, K, W x R, X]."""
        if self.layout.asks_PW is not None:
            rows_BKRX = rows_BKRX.index_select(0, self.layout.asks_PW)
        _, n_keys, share, size = rows_BKRX.shape
        return rows_BKRX.view(self.layout.n_prompts, -1, n_keys, share, size).transpose(1, 2).flatten(2, 3)

    def _told(self, asked_PKQX: Tensor, share: int) -> Tensor:
        """What the rows were told: [P, K, W x R, X] to [B, K, R, X]."""
        n_prompts, n_keys, _, size = asked_PKQX.shape
        told = asked_PKQX.view(n_prompts, n_keys, -1, share, size).transpose(1, 2).flatten(0, 1)
        return told if self.layout.asked_B is None else told.index_select(0, self.layout.asked_B)


def _probs(scores: Tensor) -> Tensor:
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def compact(stay: Sequence[int]) -> list[int]:
    """The same places in an order in which few change: the first stay where they are, the last fill the gaps."""
    kept, n = set(stay), len(stay)
    last = iter(sorted((place for place in kept if place >= n), reverse=True))
    return [place if place in kept else next(last) for place in range(n)]


def _closed_from(length_B: Tensor, columns: int) -> Tensor:
    """[B, 1, 1, columns] to be added to scores: -inf from column ``length_B`` on."""
    closed = torch.arange(columns, device=length_B.device) >= length_B[:, None]
    return torch.zeros(closed.shape, device=length_B.device).masked_fill_(closed, -torch.inf)[:, None, None]


def _room(has: int, needs: int, more: int, free: int) -> int:
    return has if needs <= has <= 2 * needs + free else needs + more


def _moved(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A buffer of another shape that holds what fits."""
    fresh = buffer.new_zeros(shape)
    both = tuple(slice(min(old, new)) for old, new in zip(buffer.shape, shape, strict=True))
    fresh[both] = buffer[both]
    return fresh
