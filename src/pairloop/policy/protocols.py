"""The two protocols behind which every engine stands: Sampler draws completions, Scorer gives log-probs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from pairloop.types import Completion, Prompt, SamplingParams, Version


@dataclass(frozen=True, slots=True)
class TopToken:
    """One of the likeliest tokens at a place, with its raw log-prob and the text it would add alone."""

    token_id: int
    logp: float
    text: str


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One sampled token of completion ``index``: ``text`` is what it adds (may be empty inside a UTF-8 character).

    ``top``: the likeliest tokens at its place, the likeliest first, where a request asked for them.
    """

    index: int
    token_id: int
    logp: float
    text: str
    top: tuple[TopToken, ...] = ()


Fetch = Callable[[str], Path]
"""A version's folder on this machine, by the path that its row has: ``Path`` itself where artifacts lie in a folder."""

TOP_LOGPROBS = "top_logprobs"
RESPONSE_FORMAT = "response_format"
"""What not every sampler can do (`Sampler.abilities`), by the name of the request's field that asks for it."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Ask for ``n`` completions of one prompt from one version."""

    prompt_token_ids: tuple[int, ...]
    version: int
    n: int = 1
    params: SamplingParams = field(default_factory=SamplingParams)
    on_token: Callable[[TokenEvent], None] | None = None
    """Called from the sampler's thread for each token, in order within a completion."""
    top_logprobs: int = 0
    """How many of the likeliest tokens each event names; needs the ability `TOP_LOGPROBS`."""
    response_format: Mapping[str, Any] | None = None
    """``json_object`` or ``json_schema`` in the OpenAI shape; needs the ability `RESPONSE_FORMAT`."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt with one completion, as token ids, to be scored."""

    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenCompletion:
    """The tokens of one completion; ``logps`` are those recorded when exactly these tokens were sampled, or empty."""

    token_ids: tuple[int, ...]
    logps: tuple[float, ...] = ()


class ReplicaState(StrEnum):
    """Only a ready replica gets requests. ``joining``: being compared, given its adapters; ``refused``: computes wrongly."""

    READY = "ready"
    JOINING = "joining"
    DOWN = "down"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """What is known of one engine server; ``recorded``: its log-probs are the trainer's own and may serve as the reference.

    ``max_token_delta``: the largest difference to the trainer's, in nats, when it was last compared.
    """

    url: str
    state: ReplicaState
    circuit: str
    outstanding: int
    recorded: bool
    max_token_delta: float | None
    problem: str


class Tokens(Protocol):
    """What every policy knows about text: its own chat template and tokenizer."""

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def hash(self) -> str:
        """Changes whenever template or vocabulary change."""
        ...

    @property
    def has_tools(self) -> bool:
        """Whether a conversation may offer tools: whether the template writes them."""
        ...

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of the prompt with the generation prompt; InvalidRequestError where the template refuses it."""
        ...

    def encode_completion(self, prompt: Prompt, text: str) -> tuple[int, ...]:
        """Token ids of ``text`` as the answer to ``prompt``, with its end-of-sequence token."""
        ...

    @property
    def tool_template(self) -> str | None:
        """The source of the template that offers tools, where there is one."""
        ...

    @property
    def response_template(self) -> Mapping[str, Any] | None:
        """How the model's answers are read (transformers' response template), where the model says it itself."""
        ...

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """The text of completion tokens; special tokens are left out unless ``special``."""
        ...


class Sampler(Protocol):
    """Draws completions. All methods may be called from any thread."""

    @property
    def tokens(self) -> Tokens: ...

    @property
    def max_context(self) -> int: ...

    @property
    def abilities(self) -> frozenset[str]:
        """Which of `TOP_LOGPROBS` and `RESPONSE_FORMAT` a request may ask for; the others it must leave out."""
        ...

    def sample(self, request: SampleRequest) -> Future[tuple[Completion, ...]]:
        """Queue a request; the future gives its ``n`` completions. Cancelling the future stops the sampling.

        The future raises EngineError where the engine is closed or broke. ``request.version`` must have been loaded.
        """
        ...

    def load(self, version: Version) -> None:
        """Make ``version`` answerable, beside those already loaded; does nothing where it is."""
        ...

    def unload(self, number: int) -> None:
        """Free a version; does nothing where it is not loaded."""
        ...

    def loaded(self) -> frozenset[int]: ...

    def queued(self) -> int:
        """Requests waiting or running."""
        ...

    def replicas(self) -> tuple[ReplicaStatus, ...]:
        """The servers behind it; none where it samples in this process."""
        ...

    def close(self) -> None: ...


class Scorer(Protocol):
    """Gives per-token log-probs of given completions (raw, float32)."""

    def logps(self, version: int, sequences: Sequence[TokenSequence]) -> list[tuple[float, ...]]:
        """One tuple per sequence, one log-prob per completion token, under a loaded version."""
        ...


class Policy(Sampler, Scorer, Protocol):
    """An engine that samples and scores (local and fake ones do both)."""
