"""What every route shares: the store, the policy, the configuration, the chat service and the scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from fastapi import Depends, Request

from pairloop.config import Config
from pairloop.loop.serve import ChatService
from pairloop.policy.protocols import Policy
from pairloop.store import Store
from pairloop.web.examination import Examination
from pairloop.web.keyring import KeyRing
from pairloop.web.limits import Buckets, Places
from pairloop.web.metrics import Metrics
from pairloop.web.overview import OverviewBoard
from pairloop.web.status import StatusBoard

STREAMS_OF_ONE, STREAMS = 32, 256
"""Streams of events that may be open at a time: of one caller, which may be several people with one key, and in all."""
SEARCHES_AT_ONCE = 2
"""Searches that go on may look through a window at a time; there are few threads, and every page is read in one."""


class SchedulerLike(Protocol):
    """What runs cycles in the background; all methods may be called from any thread."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def notify(self) -> None:
        """Something was written that may make a cycle due; returns at once."""
        ...

    def status(self) -> Mapping[str, Any]: ...


@dataclass(slots=True)
class Context:
    """One serving process; ``draining`` turns true when it is about to stop."""

    store: Store
    policy: Policy
    config: Config
    scheduler: SchedulerLike | None
    service: ChatService
    metrics: Metrics
    board: StatusBoard
    keys: KeyRing
    overview: OverviewBoard
    sign_ins: Buckets = field(default_factory=Buckets)
    streams: Places = field(default_factory=lambda: Places(STREAMS_OF_ONE, STREAMS))
    searching: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(SEARCHES_AT_ONCE))
    doctor: Examination = field(default_factory=Examination)
    draining: bool = False

    @property
    def policy_name(self) -> str:
        return self.config.policy.name

    def drain(self) -> None:
        """From here on this process is about to stop, and says so."""
        self.draining = True
        self.metrics.draining.set(1)

    def notify(self) -> None:
        if self.scheduler is not None:
            self.scheduler.notify()

    def moved(self) -> None:
        """The loop stands elsewhere now by somebody's hand, who wants to see that at once."""
        self.board.forget()
        self.notify()


def context_of(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


async def _here(request: Request) -> Context:
    """A coroutine, because FastAPI sends a plain function through a worker thread, at each request."""
    return context_of(request)


Here = Annotated[Context, Depends(_here)]
