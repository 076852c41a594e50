"""What a client asks for, before anything is decided about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from pairloop.types import Message, SamplingParams

TELLING_BELOW = 0.5
"""A temperature or top-p below this repeats itself: of 40 prompts to a small model 39 at .001, 11 at .1 and none at .2 gave the
champion's side away. A sharper model does so at higher ones."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a client asks for; ``pair_allowed`` means it sent no n but takes two answers. ``max_tokens`` None: the default.

    ``caller``: who sent it, as a key or address. ``is_listed`` False keeps the answer out of the listing of stored completions,
    not out of the loop; ``one_call`` ends an answer with its first tool call. ``came_at``: on the clock of `perf_counter`.
    """

    model: str
    messages: tuple[Message, ...]
    n: int = 1
    params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    user: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    pair_allowed: bool = False
    caller: str | None = None
    is_listed: bool = True
    one_call: bool = False
    with_logprobs: bool = False
    top_logprobs: int = 0
    response_format: Mapping[str, Any] | None = None
    came_at: float = field(default_factory=perf_counter, compare=False)

    @property
    def is_telling(self) -> bool:
        """True where asking ``name@champion`` the same would tell which side of a duel is the champion's.

        A seeded or greedy answer comes again, one at a low temperature or in a small nucleus nearly so, and log-probs are the
        same whatever was drawn.
        """
        is_narrow = min(self.params.temperature, self.params.top_p) < TELLING_BELOW
        return is_narrow or self.params.is_repeatable or self.with_logprobs
