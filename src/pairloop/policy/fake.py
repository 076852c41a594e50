"""A policy without a model: it answers ``answer NN``, where NN rises with its version's skill, and knows its log-probs.

A version is a folder with ``fake.json`` = ``{"skill": int}``; the base has skill 0. Tokens are the UTF-8 bytes of the text
and one end-of-sequence token. The rule, byte by byte: ``answer `` is certain, the tens digit d is drawn with probability
proportional to exp(skill * d / 4), the units digit is uniform, the end is certain.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pairloop.errors import EngineError, InvalidRequestError, ModelError
from pairloop.policy.protocols import TOP_LOGPROBS, Fetch, ReplicaStatus, SampleRequest, TokenEvent, TokenSequence, TopToken
from pairloop.types import BASE_VERSION, Completion, FinishReason, Message, Prompt, SamplingParams, Version, VersionKind

EOS = 256
FILE = "fake.json"
OFF_RULE_LOGP = -12.0
"""The log-prob of a token that the rule never writes: unlikely, but finite, so that imported answers can be scored."""

_HEAD = b"answer "
_DIGITS = b"0123456789"
_TILT = 0.25


class FakeTokens:
    """UTF-8 bytes and one end-of-sequence token; the template is ``role: content`` lines."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset({EOS})

    @property
    def hash(self) -> str:
        return "fake-bytes-1"

    @property
    def has_tools(self) -> bool:
        return True

    def render(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        lines = (f"{message.role}: {message.content}" for message in (*prompt, Message("assistant", "")))
        return "\n".join(lines) if prompt else ""

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        text = self.render(prompt)
        if not text:
            raise InvalidRequestError("the conversation is empty; send at least one message", param="messages")
        return tuple(text.encode())

    def encode_completion(self, prompt: Prompt, text: str) -> tuple[int, ...]:  # noqa: ARG002 - the answer's bytes are its own
        return (*text.encode(), EOS)

    @property
    def tool_template(self) -> None:
        return None

    @property
    def response_template(self) -> None:
        return None

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:  # noqa: ARG002 - the end has no text
        return bytes(token for token in token_ids if token != EOS).decode(errors="replace")


class FakePolicy:
    """Implements `Policy` in plain Python. Unseeded answers follow from ``seed`` and the order of the requests.

    With ``release``, the sampler's thread waits for that event before each request: full queues and clients that go away
    can be tested without a race.
    """

    def __init__(
        self, seed: int = 0, *, max_context: int = 4_096, release: threading.Event | None = None, fetch: Fetch = Path
    ) -> None:
        self._tokens = FakeTokens()
        self._max_context = max_context
        self._release = release
        self._fetch = fetch
        self._rng = random.Random(seed)
        self._skills = {BASE_VERSION: 0}
        self._queued = 0
        self._closed = False
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fake-sampler")

    @property
    def tokens(self) -> FakeTokens:
        return self._tokens

    @property
    def abilities(self) -> frozenset[str]:
        return frozenset({TOP_LOGPROBS})

    @property
    def max_context(self) -> int:
        return self._max_context

    def sample(self, request: SampleRequest) -> Future[tuple[Completion, ...]]:
        if len(request.prompt_token_ids) >= self._max_context:
            size = len(request.prompt_token_ids)
            raise InvalidRequestError(f"the prompt has {size} tokens; the context holds {self._max_context}", param="messages")
        future: Future[tuple[Completion, ...]] = Future()
        with self._lock:
            if self._closed or request.version not in self._skills:
                what = "the engine is closed" if self._closed else f"version {request.version} is not loaded"
                future.set_exception(EngineError(what))
                return future
            self._queued += 1
            rng = self._rng if request.params.seed is None else None
            self._thread.submit(self._answer, request, self._skills[request.version], rng, future)
        return future

    def load(self, version: Version) -> None:
        if version.kind is VersionKind.BASE:
            return
        skill = read_skill(self._fetch(version.path))
        with self._lock:
            self._skills[version.number] = skill

    def unload(self, number: int) -> None:
        with self._lock:
            if number != BASE_VERSION:
                self._skills.pop(number, None)

    def loaded(self) -> frozenset[int]:
        with self._lock:
            return frozenset(self._skills)

    def queued(self) -> int:
        with self._lock:
            return self._queued

    def replicas(self) -> tuple[ReplicaStatus, ...]:
        return ()

    def close(self) -> None:
        with self._lock:
            self._closed = True
        if self._release is not None:
            self._release.set()
        self._thread.shutdown(wait=True)

    def logps(self, version: int, sequences: Sequence[TokenSequence]) -> list[tuple[float, ...]]:
        with self._lock:
            if version not in self._skills:
                raise EngineError(f"version {version} is not loaded")
            skill = self._skills[version]
        return [token_logps(sequence.completion_token_ids, skill) for sequence in sequences]

    def _answer(
        self,
        request: SampleRequest,
        skill: int,
        rng: random.Random | None,
        future: Future[tuple[Completion, ...]],
    ) -> None:
        if self._release is not None:
            self._release.wait()
        done: list[Completion] = []
        for index in range(request.n):
            if future.cancelled():
                break
            done.append(self._complete(request, skill, rng or _seeded(request, index), index))
        with self._lock:
            self._queued -= 1
        if future.set_running_or_notify_cancel():
            future.set_result(tuple(done))

    def _complete(self, request: SampleRequest, skill: int, rng: random.Random, index: int) -> Completion:
        params = request.params
        tens = 9 * (skill > 0) if params.is_greedy else rng.choices(range(10), _tens_weights(skill))[0]
        units = 0 if params.is_greedy else rng.randrange(10)
        whole = (*_HEAD, *f"{tens}{units}".encode(), EOS)
        limit = max(1, min(params.max_tokens, self._max_context - len(request.prompt_token_ids)))
        tops = [_top(place, request.top_logprobs) for place in _rule(skill)]
        return _finish(request, whole[:limit], token_logps(whole, skill)[:limit], index, params, tops, cut=len(whole) > limit)


def read_skill(path: Path) -> int:
    """The skill in ``path / fake.json``; ModelError where it is missing or broken."""
    try:
        skill = json.loads((path / FILE).read_text(encoding="utf-8"))["skill"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a fake version: {error}") from error
    if not isinstance(skill, int):
        raise ModelError(f"{path / FILE}: skill must be an integer, not {skill!r}")
    return skill


def write_skill(path: Path, skill: int) -> None:
    (path / FILE).write_text(json.dumps({"skill": skill}), encoding="utf-8")


def quality(text: str) -> int:
    """NN of ``answer NN``; -1 for any other text."""
    digits = text.removeprefix(_HEAD.decode())
    return int(digits) if text != digits and digits.isascii() and digits.isdigit() else -1


def token_logps(token_ids: Sequence[int], skill: int) -> tuple[float, ...]:
    """One log-prob per token of a completion, under the rule of this module."""
    rule = _rule(skill)
    inside = [rule[i].get(token, OFF_RULE_LOGP) if i < len(rule) else OFF_RULE_LOGP for i, token in enumerate(token_ids)]
    return tuple(inside)


def _rule(skill: int) -> list[dict[int, float]]:
    """The log-probs of the tokens that may stand at each place."""
    weights = _tens_weights(skill)
    tens = {digit: math.log(weight / sum(weights)) for digit, weight in zip(_DIGITS, weights, strict=True)}
    units = dict.fromkeys(_DIGITS, -math.log(10))
    return [*({byte: 0.0} for byte in _HEAD), tens, units, {EOS: 0.0}]


def _top(place: dict[int, float], n: int) -> tuple[TopToken, ...]:
    likeliest = sorted(place.items(), key=lambda item: -item[1])[:n]
    return tuple(TopToken(token, logp, bytes([token]).decode() if token != EOS else "") for token, logp in likeliest)


def _tens_weights(skill: int) -> list[float]:
    return [math.exp(_TILT * skill * digit) for digit in range(10)]


def _seeded(request: SampleRequest, index: int) -> random.Random:
    key = repr((request.params.seed, index, request.prompt_token_ids)).encode()
    return random.Random(hashlib.sha256(key).digest())


def _finish(
    request: SampleRequest,
    token_ids: tuple[int, ...],
    logps: tuple[float, ...],
    index: int,
    params: SamplingParams,
    tops: Sequence[tuple[TopToken, ...]],
    *,
    cut: bool,
) -> Completion:
    """The completion, trimmed at the first stop string, with its token events sent."""
    text = bytes(token for token in token_ids if token != EOS).decode()
    stops = [text.find(stop) for stop in params.stop if stop in text]
    if stops:
        # Every token up to the one that completed the stop string was sampled and stays; the text ends before it.
        at, ends = min(stops), min(text.find(s) + len(s) for s in params.stop if s in text)
        token_ids, logps, text, cut = token_ids[:ends], logps[:ends], text[:at], False
    if request.on_token is not None:
        for i, (token, logp) in enumerate(zip(token_ids, logps, strict=True)):
            request.on_token(TokenEvent(index, token, logp, text[i : i + 1], tops[i]))
    reason = FinishReason.LENGTH if cut else FinishReason.STOP
    return Completion(text, token_ids, logps, request.version, reason)
