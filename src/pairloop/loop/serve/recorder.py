"""What each version's live answers are like: counted here as they end, kept in the store minute by minute."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence, Set
from concurrent.futures import Future
from datetime import UTC, datetime

from sqlalchemy import Connection

from pairloop.config import DeploySection
from pairloop.errors import InvalidRequestError, StoreError, log_failure
from pairloop.policy.protocols import ReplicaState, Sampler
from pairloop.store import Store, new_id, traffic
from pairloop.store.traffic import Counts
from pairloop.types import Completion, FinishReason

logger = logging.getLogger(__name__)

FLUSH_S = 2.0
"""Seconds between two writes of what was counted."""
MOST_OF_ONE = 20
"""Answers to one user that count in an hour: one who asks all day is one witness."""
HEARD = 10_000
"""Users kept in mind. The one not heard for longest goes first: who comes back after so many others is one among many."""
OPENING_CHARS = 300
"""Of an answer, so much is looked through for a refusal."""


class Recorder:
    """Counts answers and errors by version; for any thread. ``flush`` writes what is new."""

    def __init__(self, store: Store, sampler: Sampler, policy: str, section: DeploySection) -> None:
        self._store = store
        self._sampler = sampler
        self._policy = policy
        self._refusal = re.compile("|".join(f"(?:{pattern})" for pattern in section.refusals) or r"(?!)", re.IGNORECASE)
        self._process = f"{socket.gethostname()[:60]}:{os.getpid()}/{new_id('process')[-12:]}"
        self._lock = threading.Lock()
        self._counts: dict[tuple[int, datetime], Counts] = {}
        self._changed: set[tuple[int, datetime]] = set()
        self._heard: OrderedDict[tuple[int, str], int] = OrderedDict()  # the one heard last is the last
        self._hour = -1

    def follow(
        self,
        number: int,
        who: str,
        answer: Future[tuple[Completion, ...]],
        *,
        is_short: bool = False,
        has_stop: bool = False,
        is_unseen: bool = False,
    ) -> None:
        """Count an answer of version ``number`` to ``who`` when it has come, or failed; one that its client left counts not.

        ``is_short``: it has less room than the server gives by itself; ``has_stop``: the client named strings that end it;
        ``is_unseen``: it is in the shadow.
        """
        began = time.monotonic()
        ends = ((is_short, FinishReason.LENGTH), (has_stop, FinishReason.STOP))
        by_client = frozenset(reason for holds, reason in ends if holds)

        def ended(future: Future[tuple[Completion, ...]]) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if error is None:
                self._answered(number, who, future.result(), time.monotonic() - began, by_client, is_unseen=is_unseen)
            elif number in self._sampler.loaded() and not self._is_engine_down():  # unloaded in between, it is asked again
                self.failed(number, who, error, is_unseen=is_unseen)

        answer.add_done_callback(ended)

    def failed(self, number: int, who: str, error: BaseException, *, is_unseen: bool = False) -> None:
        """Count an error of version ``number``; a request that could not be answered is not the version's fault."""
        if not isinstance(error, InvalidRequestError):
            with self._lock:
                counts = self._of(number, who)
                if counts is not None:
                    counts.errors += 1
                    counts.unseen += is_unseen

    def _is_engine_down(self) -> bool:
        replicas = self._sampler.replicas()
        return bool(replicas) and not any(replica.state is ReplicaState.READY for replica in replicas)

    def flush(self) -> Future[None] | None:
        """Write what was counted since the last time; the future ends with the commit, None where there was nothing.

        What is not stored, because StoreBusyError is raised or the future fails, is written the next time.
        """
        now = datetime.now(UTC)
        with self._lock:
            for key in [key for key in self._counts.keys() - self._changed if key[1] < traffic.minute_of(now)]:
                del self._counts[key]
            rows = [(key, _copy(self._counts[key])) for key in self._changed]
            self._changed.clear()
        if not rows:
            return None

        def write(c: Connection) -> None:
            for (number, minute), counts in rows:
                traffic.put(c, self._policy, number, minute, self._process, counts)
            if now.minute == 0:
                traffic.prune(c, now)

        try:
            written = self._store.submit(write)
        except StoreError:
            self._put_back(rows)
            raise
        written.add_done_callback(lambda done: self._put_back(rows) if done.cancelled() or done.exception() else None)
        return written

    def _put_back(self, rows: Sequence[tuple[tuple[int, datetime], Counts]]) -> None:
        """What was not stored is written the next time."""
        with self._lock:
            self._changed.update(key for key, _ in rows)

    async def keep_flushing(self, *, every_s: float = FLUSH_S) -> None:
        """`flush` again and again until cancelled, and once more then."""
        try:
            while True:
                await asyncio.sleep(every_s)
                await self._flushed()
        finally:
            await self._flushed()

    async def _flushed(self) -> None:
        try:
            written = self.flush()
            if written is not None:
                await asyncio.wrap_future(written)
        except StoreError as error:
            logger.warning("what the versions' answers were like is written later: %s", error)
        except Exception as error:  # noqa: BLE001 - answering goes on
            log_failure(logger, error, "what the versions' answers were like could not be written")

    def _answered(
        self,
        number: int,
        who: str,
        answers: tuple[Completion, ...],
        spent_s: float,
        by_client: Set[FinishReason],
        *,
        is_unseen: bool,
    ) -> None:
        """Of a comparison's answers the first one counts: they are of one prompt.

        Where it ended as its client may have wanted (``by_client``), how much there is of it tells nothing of the version.
        """
        if not answers:
            return
        first, longest = answers[0], max(len(answer.token_ids) for answer in answers)
        opening = first.text[:OPENING_CHARS]
        is_whole = first.finish_reason not in by_client
        is_lacking = first.finish_reason is FinishReason.LENGTH or not opening.strip()
        is_bad = (is_whole and is_lacking) or bool(self._refusal.search(opening))
        with self._lock:
            counts = self._of(number, who)
            if counts is not None:
                counts.answers += 1
                counts.unseen += is_unseen
                counts.refusals += is_bad
                if is_whole:
                    counts.latency[traffic.class_of(1000 * spent_s / max(1, longest))] += 1
                    counts.length[traffic.class_of(max(1, len(first.token_ids)))] += 1

    def _of(self, number: int, who: str) -> Counts | None:
        """The counts of this minute; None for someone who was heard often enough."""
        now = datetime.now(UTC)
        if now.hour != self._hour:
            self._hour = now.hour
            self._heard.clear()
        times = self._heard[number, who] = self._heard.pop((number, who), 0) + 1
        if len(self._heard) > HEARD:
            self._heard.popitem(last=False)
        if times > MOST_OF_ONE:
            return None
        key = (number, traffic.minute_of(now))
        self._changed.add(key)
        return self._counts.setdefault(key, Counts())


def _copy(counts: Counts) -> Counts:
    latency, length = counts.latency.copy(), counts.length.copy()
    return Counts(counts.answers, counts.errors, counts.refusals, latency, length, counts.unseen)
