"""Answers held to a response format in this process: a grammar says at each place which tokens may come (llguidance, an extra).

Only the choice is constrained; the log-probs that are recorded stay the model's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pairloop.errors import EngineError, InvalidRequestError
from pairloop.template import ChatTemplate

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

EXTRA = "llguidance"
WHITESPACE: Any = {"whitespace_pattern": r"[ \n]{0,16}"}
"""Between the parts of a JSON text: enough to indent, and never without end."""
_BITS = torch.arange(8, dtype=torch.uint8)


def is_available() -> bool:
    return _is_installed(EXTRA)


@cache
def _is_installed(name: str) -> bool:
    return find_spec(name) is not None


class Formats:
    """Makes grammars of response formats, for the tokens of one model. May be called from any thread."""

    def __init__(self, tokens: ChatTemplate) -> None:
        self._tokens = tokens
        self._tokenizer: LLTokenizer | None = None
        self._lock = Lock()

    def constraint(self, form: Mapping[str, Any]) -> Constraint:
        """A fresh constraint; InvalidRequestError (``response_format``) where the schema is none or cannot be held to."""
        from llguidance import LLMatcher

        schema = (form.get("json_schema") or {}).get("schema") or {"type": "object"}
        tokenizer = self._ready()
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=WHITESPACE)
            problem = LLMatcher.validate_grammar(grammar, tokenizer)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise InvalidRequestError(f"the schema cannot be held to: {problem}", param="response_format")
        return Constraint(LLMatcher(tokenizer, grammar))

    def _ready(self) -> LLTokenizer:
        """Built once, with the first request: it reads the whole vocabulary."""
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                text = str(self._tokens.tokenizer.to_str())
                self._tokenizer = LLTokenizer(text, eos_token=sorted(self._tokens.eos_token_ids))
            return self._tokenizer


class Constraint:
    """What one answer may say next."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> Constraint:
        """The same, for another answer."""
        return Constraint(self._matcher.deep_copy())

    def allowed(self, width: int, device: torch.device) -> Tensor:
        """[V] True for the tokens that may come; tokens beyond the tokenizer's own never may. EngineError if none may."""
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = ((packed[:, None] >> _BITS) & 1).flatten()[:width].bool()
        if self._matcher.is_error() or not bits.any():
            raise EngineError(f"the response format allows no token here: {self._matcher.get_error()}")
        return torch.nn.functional.pad(bits, (0, width - len(bits))).to(device)

    def take(self, token_id: int) -> bool:
        """Note a drawn token; True where the answer is whole with it."""
        self._matcher.consume_token(token_id)
        return self._matcher.is_stopped()
