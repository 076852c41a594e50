"""Requests of one version, or of adapters on one base: waiting rows join the running batch between steps, ended ones leave it.

A request for n completions is n rows. Rows of one prompt that are admitted together share one reading of it.
"""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from pairloop.policy.constrained import Constraint
from pairloop.policy.decoding import Batch, draw, likeliest, open_batch
from pairloop.policy.mixed import Adapters
from pairloop.policy.protocols import SampleRequest, TokenEvent, TopToken
from pairloop.policy.scoring import Traits
from pairloop.policy.slots import SlotBatch, compact
from pairloop.policy.text import TextStream
from pairloop.types import Completion, FinishReason

PREFILL_TOKENS = 16_384
"""Padded prompt tokens read by one forward pass, at most (one row always goes)."""

Supervisor = Callable[[Callable[[], None], Callable[[Exception], None]], None]


class Ticket:
    """One request with its future and its completions as they finish. Used by the engine's thread only."""

    def __init__(self, request: SampleRequest) -> None:
        self.request = request
        self.future: Future[tuple[Completion, ...]] = Future()
        self.is_over = False
        """True once the request was cancelled or failed: its rows leave the batch at the next step."""
        self._done: list[Completion | None] = [None] * request.n
        self.future.add_done_callback(self._ended)

    def finish(self, index: int, completion: Completion) -> None:
        self._done[index] = completion
        done = tuple(c for c in self._done if c is not None)
        if len(done) == len(self._done) and self._claim():
            self.future.set_result(done)

    def fail(self, error: Exception) -> None:
        if self._claim():
            self.future.set_exception(error)

    def _claim(self) -> bool:
        """True once, and only where nobody cancelled: from then on the future cannot be cancelled."""
        if self.is_over:
            return False
        self.is_over = True
        return self.future.set_running_or_notify_cancel()

    def _ended(self, _: Future[tuple[Completion, ...]]) -> None:
        self.is_over = True


@dataclass(slots=True, eq=False)
class Row:
    """One completion in the making; ``uniform`` gives the number that decides its next token."""

    ticket: Ticket
    index: int
    limit: int
    uniform: Callable[[], float]
    stream: TextStream | None
    constraint: Constraint | None = None
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)

    @property
    def version(self) -> int:
        return self.ticket.request.version

    @classmethod
    def of(
        cls,
        ticket: Ticket,
        index: int,
        limit: int,
        rng: random.Random,
        decode: Callable[[Sequence[int]], str],
        constraint: Constraint | None = None,
    ) -> Row:
        params = ticket.request.params
        if params.seed is not None:
            rng = random.Random(repr((params.seed, index, ticket.request.prompt_token_ids)))
        watched = params.stop or ticket.request.on_token is not None
        stream = TextStream(decode, params.stop) if watched else None
        return cls(ticket, index, limit, rng.random, stream, constraint.copy() if constraint is not None else None)


class Lane:
    """The waiting and running rows of the versions that share its batch: one, or any number of mixed ``adapters``.

    `serve`, `leave` and `add` may be called from any thread that holds the engine's lock; the rest is the engine's.
    """

    def __init__(
        self,
        traits: Traits,
        eos: frozenset[int],
        decode: Callable[[Sequence[int]], str],
        *,
        max_batch: int,
        max_context: int,
        supervisor: Supervisor,
        adapters: Adapters | None = None,
    ) -> None:
        self._waiting: dict[int, deque[Row]] = {}
        self._rows: list[Row] = []
        self._batch: SlotBatch | Batch | None = None
        self._logits_BV: Tensor | None = None
        self._traits = traits
        self._eos = eos
        self._decode = decode
        self._max_batch = max_batch
        self._max_context = max_context
        self._supervisor = supervisor
        self._adapters = adapters

    @property
    def is_idle(self) -> bool:
        return not self._rows and not any(self._waiting.values())

    def is_done_with(self, version: int) -> bool:
        """True where no row of the version waits or runs."""
        return not self._waiting[version] and all(row.version != version for row in self._rows)

    def serve(self, version: int) -> None:
        """Take requests of this version too."""
        # A new table, as the engine's thread may be reading the old one.
        self._waiting = {**self._waiting, version: deque()}

    def leave(self, version: int) -> None:
        self._waiting = {number: queue for number, queue in self._waiting.items() if number != version}

    def add(self, version: int, rows: Sequence[Row]) -> None:
        self._waiting[version].extend(rows)

    def run(self, model: nn.Module, seconds: float) -> None:
        """Admit what waits, then step until ``seconds`` have passed or nothing runs (at least one step)."""
        with torch.inference_mode():
            end = time.monotonic() + seconds
            self._admit(model)
            while self._rows:
                self._step()
                if time.monotonic() >= end:
                    break

    def fail(self, error: Exception, *, waiting: bool = False) -> None:
        """End all running requests with ``error``; the waiting ones too where asked, or where it was not a row that failed."""
        lost = list(self._rows)
        for queue in self._waiting.values():
            while queue and (waiting or not self._rows):
                lost.append(queue.popleft())
        self._rows, self._batch, self._logits_BV = [], None, None
        for row in lost:
            row.ticket.fail(error)

    def _admit(self, model: nn.Module) -> None:
        if self._batch is not None and not self._batch.is_joinable:
            return
        taken = self._take()
        if not taken:
            return
        self._rows += taken
        if self._batch is None:
            self._batch = open_batch(model, self._traits, self._max_context, self._adapters)
        prompts = [row.ticket.request.prompt_token_ids for row in taken]
        logits_BV = self._batch.admit(prompts, [row.version for row in taken])
        self._logits_BV = logits_BV if self._logits_BV is None else torch.cat([self._logits_BV, logits_BV])

    def _take(self) -> list[Row]:
        """The next rows that fit, of the version with the fewest; of one prompt length where the model obeys no mask."""
        taken: list[Row] = []
        later: list[Row] = []
        width = 0
        rows_of = Counter(row.version for row in self._rows)
        while len(self._rows) + len(taken) < self._max_batch:
            version = min((number for number, queue in self._waiting.items() if queue), key=rows_of.__getitem__, default=None)
            if version is None:
                break
            row = self._waiting[version].popleft()
            if row.ticket.is_over:
                continue
            size = len(row.ticket.request.prompt_token_ids)
            if taken and (max(width, size) * (len(taken) + 1) > PREFILL_TOKENS or (not self._traits.masked and size != width)):
                later.append(row)
                if self._traits.masked:
                    break
                continue
            width = max(width, size)
            rows_of[version] += 1
            taken.append(row)
        for row in reversed(later):
            self._waiting[row.version].appendleft(row)
        return taken

    def _step(self) -> None:
        assert self._batch is not None
        assert self._logits_BV is not None
        params = [row.ticket.request.params for row in self._rows]
        tokens_B, logps_B = draw(
            self._logits_BV,
            [row.uniform() for row in self._rows],
            [p.temperature for p in params],
            [p.top_p for p in params],
            self._allowed(self._logits_BV),
        )
        top = self._likeliest(self._logits_BV)
        drawn = zip(self._rows, tokens_B.tolist(), logps_B.tolist(), strict=True)
        stay = [i for i, (row, token, logp) in enumerate(drawn) if self._record(row, token, logp, top.get(i, ()))]
        if not stay:
            self._rows, self._batch, self._logits_BV = [], None, None
            return
        if len(stay) < len(self._rows):
            stay = compact(stay)
            self._rows = [self._rows[i] for i in stay]
            self._batch.keep(stay)
            tokens_B = tokens_B[stay]
        self._logits_BV = self._batch.step(tokens_B)

    def _allowed(self, logits_BV: Tensor) -> Tensor | None:
        """[B, V] the tokens that may come, where a row is held to a format."""
        held = {i: row.constraint for i, row in enumerate(self._rows) if row.constraint is not None}
        if not held:
            return None
        allowed_BV = torch.ones_like(logits_BV, dtype=torch.bool)
        for i, constraint in held.items():
            row = self._rows[i]
            if not row.ticket.is_over:
                # A format that leads nowhere ends its own request, not the batch.
                self._supervisor(partial(_restrict, allowed_BV, i, constraint), row.ticket.fail)
        return allowed_BV

    def _likeliest(self, logits_BV: Tensor) -> dict[int, Sequence[tuple[int, float]]]:
        """The likeliest tokens, with their log-probs, of the rows that ask for them."""
        wanted = {i: row.ticket.request.top_logprobs for i, row in enumerate(self._rows) if row.ticket.request.top_logprobs}
        if not wanted:
            return {}
        tokens, logps = likeliest(logits_BV[list(wanted)], max(wanted.values()))
        pairs = zip(wanted.items(), tokens.tolist(), logps.tolist(), strict=True)
        return {i: list(zip(ids[:n], values[:n], strict=True)) for (i, n), ids, values in pairs}

    def _record(self, row: Row, token: int, logp: float, top: Sequence[tuple[int, float]]) -> bool:
        """Note a drawn token; True while the row goes on."""
        if row.ticket.is_over:
            return False
        row.token_ids.append(token)
        row.logps.append(logp)
        reason = FinishReason.STOP if token in self._eos else None
        if row.constraint is not None and row.constraint.take(token):
            reason = FinishReason.STOP
        if reason is None and len(row.token_ids) >= row.limit:
            reason = FinishReason.LENGTH
        if row.stream is not None:
            named = tuple(TopToken(other, value, row.stream.would_add(other)) for other, value in top)
            piece = row.stream.add(token, last=reason is not None)
            reason = FinishReason.STOP if row.stream.stopped else reason
            self._tell(row, TokenEvent(row.index, token, logp, piece, named))
        if reason is None:
            return True
        text = row.stream.text if row.stream is not None else self._decode(row.token_ids)
        row.ticket.finish(row.index, Completion(text, tuple(row.token_ids), tuple(row.logps), row.version, reason))
        return False

    def _tell(self, row: Row, event: TokenEvent) -> None:
        listener = row.ticket.request.on_token
        if listener is not None:
            # A listener that raises ends its own request, not the batch.
            self._supervisor(lambda: listener(event), row.ticket.fail)


def _restrict(allowed_BV: Tensor, row: int, constraint: Constraint) -> None:
    allowed_BV[row] = constraint.allowed(allowed_BV.shape[1], allowed_BV.device)
