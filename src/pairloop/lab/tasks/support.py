"""The starter's support bot: customers of its world, its chat template, and the packaged model as the base.

The score is the customers' hidden utility, at most 4, scaled to [0, 1]; what is worth less than nothing scores 0.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from pairloop.lab.tasks.base import HELD_OUT_ONE_IN, Problem, ShippedBase
from pairloop.starter import MODEL_DIR, corpus, customers
from pairloop.starter.corpus import Case
from pairloop.template import ChatTemplate
from pairloop.types import Message

MAX_TOKENS = 80


class ChatTokens:
    """A model's own tokenizer, with the prompt as the only message of a chat."""

    def __init__(self, model_dir: Path) -> None:
        self._template = ChatTemplate.load(model_dir)
        (self.eos_id,) = self._template.eos_token_ids
        pad_id = self._template.tokenizer.token_to_id(self._template.special_tokens["pad_token"])
        assert pad_id is not None
        self.pad_id = pad_id

    def encode_prompt(self, prompt: str) -> list[int]:
        return list(self._template.encode_prompt((Message("user", prompt),)))

    def encode_completion(self, prompt: str, text: str) -> list[int]:
        return list(self._template.encode_completion((Message("user", prompt),), text))

    def decode(self, token_ids: Iterable[int]) -> str:
        ids = list(token_ids)
        return self._template.decode(ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids)


class Support:
    name = "support"
    learning_rate = 1e-3
    recipe = ShippedBase(MODEL_DIR, MAX_TOKENS)

    @cached_property
    def tokens(self) -> ChatTokens:
        return ChatTokens(MODEL_DIR)

    def problem(self, rng: random.Random) -> Problem:
        is_for_evaluation = rng.random() < 1 / HELD_OUT_ONE_IN
        case = corpus.draw_held_out_case(rng) if is_for_evaluation else corpus.draw_training_case(rng)
        return Problem(case.text, json.dumps(asdict(case)))

    def is_heldout(self, problem: Problem) -> bool:
        """The starter's own split, by name and order number: its corpus has none of the held-out customers."""
        case = _case(problem)
        return corpus.is_held_out(case.name, case.order_number)

    def demonstration(self, problem: Problem, rng: random.Random) -> str:
        """An answer in a style drawn as the starter's corpus draws it."""
        (style,) = rng.choices(list(corpus.STYLE_WEIGHTS), weights=list(corpus.STYLE_WEIGHTS.values()))
        return corpus.write_answer(_case(problem), style, rng)

    def score(self, problem: Problem, answer: str) -> float:
        return max(0.0, customers.utility(_case(problem), answer) / customers.MAX_UTILITY)


def _case(problem: Problem) -> Case:
    return Case(**json.loads(problem.target))
