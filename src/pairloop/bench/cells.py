"""What is measured: model shapes, prompt shapes, and the cells of the tables. No torch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from pairloop.errors import InvalidRequestError

ANSWER_TOKENS = (64, 128)
"""Shortest and longest answer of a training pair, EOS counted; lengths are uniform."""
EOS_ID = 0

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-shaped model with random weights, embeddings and head untied."""

    name: str
    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int = 64

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices, which every token meets once."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp)


M6 = Shape("M6", hidden=256, layers=4, mlp=1_024, heads=4, kv_heads=2, vocab=4_096)
M50 = Shape("M50", hidden=512, layers=6, mlp=1_408, heads=8, kv_heads=4, vocab=32_000)
B1 = Shape("B1", hidden=2_048, layers=16, mlp=8_192, heads=32, kv_heads=8, vocab=32_000)
"""A billion weights in the layers, for GPUs: full fine-tuning holds about 60 GB for all contestants, without activations."""


@dataclass(frozen=True, slots=True)
class TrainCell:
    """Preference pairs of one shape: ``shared`` tokens begin every prompt, ``prompt`` tokens are each prompt's own."""

    name: str
    shape: Shape
    shared: int
    prompt: int
    batch_size: int
    steps: int = 1
    """Optimizer steps per turn."""


@dataclass(frozen=True, slots=True)
class SampleCell:
    """Prompts that are answered together, twice each."""

    name: str
    shape: Shape
    prompt: int
    prompts: int
    new_tokens: int = 96


TRAIN_CELLS = {
    cell.name: cell
    for cell in (
        TrainCell("M6-S1", M6, shared=0, prompt=32, batch_size=8, steps=4),
        TrainCell("M6-S2", M6, shared=0, prompt=512, batch_size=8),
        TrainCell("M6-S3", M6, shared=384, prompt=128, batch_size=8),
        TrainCell("M50-S1", M50, shared=0, prompt=32, batch_size=4),
        TrainCell("M50-S2", M50, shared=0, prompt=512, batch_size=2),
        TrainCell("B1-S1", B1, shared=0, prompt=32, batch_size=16, steps=4),
        TrainCell("B1-S2", B1, shared=0, prompt=512, batch_size=8, steps=2),
    )
}
SAMPLE_CELLS = {
    cell.name: cell
    for cell in (
        SampleCell("M6-32", M6, prompt=32, prompts=8),
        SampleCell("M6-512", M6, prompt=512, prompts=8),
        SampleCell("M50-512", M50, prompt=512, prompts=4),
        SampleCell("B1-512", B1, prompt=512, prompts=16),
    )
}


def chosen(known: dict[str, C], names: str | None, device: str) -> list[C]:
    """The cells of a comma-separated list; by default those of the device. InvalidRequestError names what there is."""
    if not names:
        return [cell for name, cell in known.items() if name.startswith("B1") == (device == "cuda")]
    missing = [name for name in names.split(",") if name not in known]
    if missing:
        raise InvalidRequestError(f"no cell {missing[0]}: there are {', '.join(known)}", param="cells")
    return [known[name] for name in names.split(",")]


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of a prompt and of a chosen and a rejected answer, each of which ends with EOS."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def pairs(cell: TrainCell, n: int, *, seed: int = 0) -> list[Pair]:
    """``n`` pairs of random tokens, the same for every contestant."""
    rng = random.Random(f"{cell.name}:{seed}")
    system = _ids(rng, cell.shared, cell.shape.vocab)
    return [
        Pair(system + _ids(rng, cell.prompt, cell.shape.vocab), _answer(rng, cell.shape), _answer(rng, cell.shape))
        for _ in range(n)
    ]


def prompts(cell: SampleCell) -> Iterator[list[tuple[int, ...]]]:
    """The prompts of one turn after the other, the same for every contestant, without end."""
    rng = random.Random(cell.name)
    while True:
        yield [_ids(rng, cell.prompt, cell.shape.vocab) for _ in range(cell.prompts)]


def _answer(rng: random.Random, shape: Shape) -> tuple[int, ...]:
    return (*_ids(rng, rng.randint(*ANSWER_TOKENS) - 1, shape.vocab), EOS_ID)


def _ids(rng: random.Random, n: int, vocab: int) -> tuple[int, ...]:
    return tuple(rng.randrange(EOS_ID + 1, vocab) for _ in range(n))
