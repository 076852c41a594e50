"""What a task of the lab is: problems, a corpus of mixed quality, a verifier, and the codec between text and tokens.

A task's base model is pre-trained on `demonstration`s, so that it is sound (greedy decoding is mostly right) and of mixed
quality (samples at temperature 1 carry the corpus's faults). One problem in ten is held out: it is in no corpus and in no
training prompt, and only such problems evaluate.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

HELD_OUT_ONE_IN = 10
BEGIN_ID, EOS_ID, FIRST_CHARACTER_ID = 0, 1, 2
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt, and whatever the verifier needs to know about it, as text."""

    prompt: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecipe:
    """How a task's base is pre-trained: a tenth of a million parameters, on `steps` batches of its corpus.

    `learning_rate` is Muon's peak on the matrices. `max_tokens` bounds what is sampled, the end token included.
    """

    alphabet: str
    steps: int
    max_tokens: int
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    mlp: int = 192
    batch_size: int = 32
    learning_rate: float = 0.02
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ShippedBase:
    """A base that is trained elsewhere: its folder (plain Hugging Face layout), and the longest answer to sample."""

    folder: Path
    max_tokens: int


class Tokens(Protocol):
    """Text to token ids and back. A completion's ids end with `eos_id`; `decode` reads up to the first one."""

    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    def encode_prompt(self, prompt: str) -> list[int]: ...
    def encode_completion(self, prompt: str, text: str) -> list[int]: ...
    def decode(self, token_ids: Iterable[int]) -> str: ...


class Task(Protocol):
    """One verifiable task."""

    @property
    def name(self) -> str: ...
    @property
    def recipe(self) -> BaseRecipe | ShippedBase: ...
    @property
    def tokens(self) -> Tokens: ...
    @property
    def learning_rate(self) -> float:
        """AdamW's, for the arms of a comparison: of those tried, the best for GRPO-8 at 4,096 rollouts (docs/LOG.md)."""

    def problem(self, rng: random.Random) -> Problem:
        """A problem of either side of the held-out split."""

    def is_heldout(self, problem: Problem) -> bool:
        """Whether the problem is for evaluation only."""

    def demonstration(self, problem: Problem, rng: random.Random) -> str:
        """One answer of the pre-training corpus, of its mixed quality."""

    def score(self, problem: Problem, answer: str) -> float:
        """The verifier, in [0, 1]: the reward, and the score that is reported."""


class Characters:
    """One token per character of `alphabet`; id 0 begins every prompt and pads, id 1 ends every completion."""

    eos_id = EOS_ID
    pad_id = BEGIN_ID

    def __init__(self, alphabet: str) -> None:
        if len(set(alphabet)) < len(alphabet):
            raise ValueError(f"an alphabet names each character once, not {alphabet!r}")
        self._character = dict(enumerate(alphabet, start=FIRST_CHARACTER_ID))
        self._id = {character: token_id for token_id, character in self._character.items()}

    @property
    def vocabulary(self) -> int:
        return len(self._id) + FIRST_CHARACTER_ID

    def encode_prompt(self, prompt: str) -> list[int]:
        return [BEGIN_ID, *self._encode(prompt)]

    def encode_completion(self, prompt: str, text: str) -> list[int]:
        del prompt  # one token per character: what stands before changes nothing
        return [*self._encode(text), EOS_ID]

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text before the first end token; a begin token inside shows as a character that no alphabet has."""
        characters = []
        for token_id in token_ids:
            if token_id == EOS_ID:
                break
            characters.append(self._character.get(token_id, UNKNOWN))
        return "".join(characters)

    def _encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - self._id.keys())
        if unknown:
            raise ValueError(f"{unknown} are not in the alphabet of this task")
        return [self._id[character] for character in text]


class CharacterTask:
    """What character-level tasks share: the codec of their recipe's alphabet, and the split by a hash of the prompt."""

    recipe: BaseRecipe
    learning_rate = 1e-3

    def __init__(self) -> None:
        self.tokens = Characters(self.recipe.alphabet)

    def is_heldout(self, problem: Problem) -> bool:
        return is_heldout(problem.prompt)


def is_heldout(prompt: str) -> bool:
    """Whether this prompt is on the held-out side, by a hash that is the same on every machine."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def training_problem(task: Task, rng: random.Random) -> Problem:
    """A problem that may be trained on."""
    while task.is_heldout(problem := task.problem(rng)):
        pass
    return problem


def heldout_problem(task: Task, rng: random.Random) -> Problem:
    """A problem that is for evaluation only."""
    while not task.is_heldout(problem := task.problem(rng)):
        pass
    return problem


def share_of_equal(target: Sequence[str], answer: Sequence[str]) -> float:
    """Share of the target's positions that the answer has right; what stands after them costs one position each."""
    right = sum(wanted == given for wanted, given in zip(target, answer, strict=False))
    return max(0, right - max(0, len(answer) - len(target))) / len(target)
