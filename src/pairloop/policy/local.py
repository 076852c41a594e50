"""The engine in this process: transformers models and PEFT adapters, sampled and scored by one thread.

Callers queue requests from any thread. The engine's thread turns to each lane with work for a short burst of steps, and
does loading and scoring jobs in between, so nothing ever runs beside a switch of adapters. Rows of different requests share
forward passes (`lane`), and so do those of the base and its adapters where the model can take it (`mixed`); full weights have
a lane of their own. What a row draws depends on its own numbers only, never on its neighbours.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from pairloop.config import PolicySection
from pairloop.errors import EngineError, InvalidRequestError, ModelError, PairloopError
from pairloop.policy.checks import check_tokens, room
from pairloop.policy.constrained import Formats, is_available
from pairloop.policy.lane import Lane, Row, Ticket
from pairloop.policy.mixed import Adapters
from pairloop.policy.packed import takes_packed
from pairloop.policy.protocols import RESPONSE_FORMAT, TOP_LOGPROBS, Fetch, ReplicaStatus, SampleRequest, TokenSequence
from pairloop.policy.scoring import Traits, completion_logps, max_context, resolve_device, vocab_size
from pairloop.policy.shelf import Shelf
from pairloop.template import ChatTemplate
from pairloop.types import BASE_VERSION, Completion, Version, VersionKind

BURST_S = 0.02
"""How long one lane decodes before waiting rows, other lanes and jobs get their turn."""
SCORE_TOKENS = 4_096
"""Padded tokens scored by one job, so that scoring never holds up serving for long."""
SCORE_LOGITS = 1 << 26
"""And their float32 logits, for large vocabularies (256 MiB)."""
DEFAULT_CONTEXT = 4_096
"""For models whose configuration states no limit."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class LocalPolicy:
    """Implements `Policy`. The base is loaded at once and stays; ``max_context`` = 0 takes the model's own limit.

    ModelError where the directory cannot be used.
    """

    def __init__(self, base_dir: Path, section: PolicySection, *, max_context: int = 0, fetch: Fetch = Path) -> None:
        torch.set_num_threads(section.threads)
        self._section = section
        self._fetch = fetch
        self._tokens = ChatTemplate.load(base_dir)
        self._formats = Formats(self._tokens)
        self._shelf = Shelf(base_dir, section, resolve_device(section.device))
        self._traits = Traits.of(self._shelf.base)
        if self._traits.cache is None:
            raise ModelError(f"{base_dir}: the model keeps no cache between tokens; it cannot be served")
        self._vocab_size = vocab_size(self._shelf.base)
        self._model_context = _context_of(self._shelf)
        self._max_context = min(max_context, self._model_context) if max_context else self._model_context
        self._rng = random.Random()
        self._changed = threading.Condition()
        self._loading = threading.Lock()
        self._lanes: dict[int, Lane] = {BASE_VERSION: self._new_lane(self._shelf.mixed)}
        self._lanes[BASE_VERSION].serve(BASE_VERSION)
        self._retired: set[int] = set()
        self._jobs: deque[tuple[Callable[[], None], Callable[[Exception], None]]] = deque()
        self._scoring: Counter[int] = Counter()
        self._queued = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="pairloop-sampler", daemon=True)
        self._thread.start()

    @property
    def tokens(self) -> ChatTemplate:
        return self._tokens

    @property
    def abilities(self) -> frozenset[str]:
        return frozenset({TOP_LOGPROBS, RESPONSE_FORMAT}) if is_available() else frozenset({TOP_LOGPROBS})

    @property
    def max_context(self) -> int:
        return self._max_context

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def sample(self, request: SampleRequest) -> Future[tuple[Completion, ...]]:
        """See `Sampler.sample`. Raises InvalidRequestError at once for what can never be sampled."""
        left = room(request, max_context=self._max_context, vocab_size=self._vocab_size)
        ticket = Ticket(request)
        limit = min(request.params.max_tokens, left)
        held_to = self._formats.constraint(request.response_format) if request.response_format is not None else None
        rows = [Row.of(ticket, i, limit, self._rng, self._tokens.decode, held_to) for i in range(request.n)]
        with self._changed:
            problem = self._refusal(request.version)
            if problem is None:
                self._queued += 1
                self._lanes[request.version].add(request.version, rows)
                self._changed.notify()
        if problem is not None:
            ticket.fail(EngineError(problem))
        else:
            ticket.future.add_done_callback(self._one_less)
        return ticket.future

    def load(self, version: Version) -> None:
        """See `Sampler.load`. ModelError where the version's folder is broken; what was loaded stays as it was."""
        with self._loading:
            number = version.number
            with self._changed:
                self._retired.discard(number)
                if number in self._lanes or version.kind is VersionKind.BASE:
                    return
            version = replace(version, path=str(self._fetch(version.path)))
            if version.kind is VersionKind.FULL:
                module = self._shelf.read_full(version)
                if vocab_size(module) != self._vocab_size:
                    raise ModelError(f"{version.path}: {vocab_size(module)} token rows, the base model has {self._vocab_size}")
                self._submit(partial(self._shelf.put_full, number, module)).result()
                lane = self._new_lane()
            else:
                lane = self._submit(partial(self._put_adapter, version)).result()
            with self._changed:
                lane.serve(number)
                self._lanes[number] = lane

    def unload(self, number: int) -> None:
        """See `Sampler.unload`: requests already queued are still answered, then the weights are freed. The base stays."""
        with self._changed:
            if number in self._lanes and number != BASE_VERSION:
                self._retired.add(number)
                self._changed.notify()

    def loaded(self) -> frozenset[int]:
        with self._changed:
            return frozenset(self._lanes.keys() - self._retired)

    def queued(self) -> int:
        with self._changed:
            return self._queued

    def replicas(self) -> tuple[ReplicaStatus, ...]:
        return ()

    def close(self) -> None:
        """End all requests with EngineError and free the thread; further requests get the same error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def logps(self, version: int, sequences: Sequence[TokenSequence]) -> list[tuple[float, ...]]:
        """See `Scorer.logps`. Scores in jobs of limited size between the bursts of sampling."""
        for sequence in sequences:
            self._check_tokens(sequence.prompt_token_ids + sequence.completion_token_ids)
        with self._changed:
            problem = self._refusal(version)
            if problem is not None:
                raise EngineError(problem)
            self._scoring[version] += 1
        try:
            chunks = _chunks(sequences, min(SCORE_TOKENS, SCORE_LOGITS // self._vocab_size))
            jobs = [self._submit(partial(self._score, version, [sequences[i] for i in chunk])) for chunk in chunks]
            scored = [job.result() for job in jobs]
        finally:
            with self._changed:
                self._scoring[version] -= 1
                self._changed.notify()
        result: list[tuple[float, ...]] = [()] * len(sequences)
        for chunk, values in zip(chunks, scored, strict=True):
            for i, value in zip(chunk, values, strict=True):
                result[i] = value
        return result

    def _check_tokens(self, token_ids: tuple[int, ...]) -> None:
        check_tokens(token_ids, self._vocab_size)
        if len(token_ids) > self._model_context:
            raise InvalidRequestError(
                f"{len(token_ids)} tokens; the model's context holds {self._model_context}",
                param="messages",
                code="context_length_exceeded",
            )

    def _refusal(self, version: int) -> str | None:
        if self._closed:
            return "the engine is closed"
        if version not in self._lanes or version in self._retired:
            return f"version {version} is not loaded"
        return None

    def _one_less(self, _: Future[tuple[Completion, ...]]) -> None:
        with self._changed:
            self._queued -= 1

    def _new_lane(self, adapters: Adapters | None = None) -> Lane:
        eos, decode = self._tokens.eos_token_ids, self._tokens.decode
        limits = {"max_batch": self._section.max_batch, "max_context": self._max_context}
        return Lane(self._traits, eos, decode, **limits, supervisor=_supervised, adapters=adapters)

    def _put_adapter(self, version: Version) -> Lane:
        """Load it; the base's lane where its rows can be mixed with the base's."""
        is_mixed = self._shelf.put_adapter(version) and takes_packed(self._shelf.base, self._max_context)
        return self._lanes[BASE_VERSION] if is_mixed else self._new_lane()

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        """Have the engine's thread do ``work`` between two bursts."""
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                future.set_exception(EngineError("the engine is closed"))
                return future
            self._jobs.append((lambda: future.set_result(work()), future.set_exception))
            self._changed.notify()
        return future

    def _score(self, version: int, sequences: Sequence[TokenSequence]) -> list[tuple[float, ...]]:
        model = self._shelf.activate(version)
        with torch.inference_mode():
            logp_NT, _ = completion_logps(
                model,
                [sequence.prompt_token_ids for sequence in sequences],
                [sequence.completion_token_ids for sequence in sequences],
            )
        rows = logp_NT.tolist()
        return [tuple(row[: len(s.completion_token_ids)]) for row, s in zip(rows, sequences, strict=True)]

    def _run(self) -> None:
        torch.set_num_threads(self._section.threads)
        while self._wait():
            if self._jobs:
                _supervised(*self._jobs.popleft())
            for number, lane in self._busy():
                _supervised(partial(self._burst, number, lane), lane.fail)
            self._free_retired()
        self._end()

    def _wait(self) -> bool:
        """Sleep until there is work; False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._jobs or self._free_now() or any(self._busy()))
            return not self._closed

    def _busy(self) -> list[tuple[int, Lane]]:
        """The lanes with work, and what to activate for each: the base where adapters are mixed."""
        with self._changed:
            base = self._lanes[BASE_VERSION]
            own = {number: lane for number, lane in self._lanes.items() if number == BASE_VERSION or lane is not base}
            return [(number, lane) for number, lane in own.items() if not lane.is_idle]

    def _burst(self, number: int, lane: Lane) -> None:
        lane.run(self._shelf.activate(number), BURST_S)

    def _free_now(self) -> list[int]:
        return [n for n in self._retired if self._lanes[n].is_done_with(n) and not self._scoring[n]]

    def _free_retired(self) -> None:
        with self._changed:
            free = self._free_now()
            for number in free:
                self._lanes.pop(number).leave(number)
                self._retired.discard(number)
        for number in free:
            _supervised(partial(self._shelf.drop, number), lambda _: None)

    def _end(self) -> None:
        error = EngineError("the engine is closed")
        with self._changed:
            jobs, lanes = list(self._jobs), list(self._lanes.values())
            self._jobs.clear()
        for _, failed in jobs:
            failed(error)
        for lane in lanes:
            lane.fail(error, waiting=True)


def _supervised(work: Callable[[], None], failed: Callable[[Exception], None]) -> None:
    """Do ``work``; whatever it raises is handed to ``failed``, and the engine's thread goes on."""
    try:
        work()
    except PairloopError as error:
        failed(error)
    except Exception as error:
        log.exception("the sampler's thread met an error; what it concerned was given up, the rest goes on")
        failed(EngineError(f"sampling failed: {type(error).__name__}: {error}"))


def _context_of(shelf: Shelf) -> int:
    return max_context(shelf.base) or DEFAULT_CONTEXT


def _chunks(sequences: Sequence[TokenSequence], budget: int) -> list[list[int]]:
    """Indices of the sequences with a completion, grouped by length into chunks of at most ``budget`` padded tokens."""

    def size(i: int) -> int:
        return len(sequences[i].prompt_token_ids) + len(sequences[i].completion_token_ids)

    order = sorted((i for i, sequence in enumerate(sequences) if sequence.completion_token_ids), key=size)
    chunks: list[list[int]] = []
    for i in order:
        if chunks and size(i) * (len(chunks[-1]) + 1) <= budget:
            chunks[-1].append(i)
        else:
            chunks.append([i])
    return chunks
