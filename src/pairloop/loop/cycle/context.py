"""What a cycle works with, and the leases: one cycle at a time of a policy, one training at a time on a machine."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from sqlalchemy import Connection

from pairloop import faults
from pairloop.config import Config, duration_s
from pairloop.errors import ConflictError, StoreError
from pairloop.loop.background import repeating
from pairloop.policy.protocols import Policy
from pairloop.store import Store, leases, new_id

logger = logging.getLogger(__name__)

WAIT_S = 0.2
"""Seconds between two tries to begin a training while another one is on."""
STANDSTILL_S = 2.0
"""Seconds for which `standstill` waits for a cycle that moves."""

_held_here: set[str] = set()
"""Lease owners of this process. A lease under our own process id that is not among them outlived its process."""


@dataclass(frozen=True, slots=True)
class Loop:
    """Store, engine and configuration of one policy's loop; ``owner`` is ``host:pid`` of the process that turns it."""

    store: Store
    policy: Policy
    config: Config
    owner: str

    @property
    def name(self) -> str:
        """The policy's name."""
        return self.config.policy.name


class Lease:
    """Held while its block runs, and renewed by a thread; ``check`` inside a transaction fences off an owner that lost it.

    ConflictError on entering while another holds it. A holder that was killed on this machine is not waited for. One that was
    only thought dead (a stopped process, a clock that jumped) loses it: what it writes through ``store.fenced(lease.check)``
    from then on is refused.
    """

    def __init__(self, store: Store, config: Config, owner: str, name: str, what: str) -> None:
        self._store = store.fenced(None)  # a lease is its own fence
        self._name = name
        self._what = what
        self._owner = f"{owner}/{new_id('lease')}"
        self._ttl_s = duration_s(config.schedule.lease)
        self._token: int | None = None
        self._lost = threading.Event()
        self._renewing = repeating(self._renew, every_s=self._ttl_s / 3, name="lease")

    def __enter__(self) -> Self:
        _held_here.add(self._owner)
        try:
            self._token, holder = self._store.write(self._take)
            if self._token is None:
                raise ConflictError(f"{self._what} is running already ({self._name} is held by {holder}); one at a time")
        except BaseException:
            _held_here.discard(self._owner)
            raise
        self._renewing.__enter__()
        faults.reach("lease.taken")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._renewing.__exit__(None, None, None)
        _held_here.discard(self._owner)
        faults.reach("lease.before_release")
        self._store.write(lambda c: leases.release(c, self._name, self._owner))

    def check(self, c: Connection) -> None:
        """Renew in the caller's transaction; ConflictError where another process took the cycle over meanwhile."""
        token = leases.acquire(c, self._name, self._owner, now=self._store.clock(c), ttl_s=self._ttl_s)
        if token is None or token != self._token:
            raise self._taken_over()

    @property
    def is_lost(self) -> bool:
        """True once the renewing thread has found another owner: whatever takes long may stop."""
        return self._lost.is_set()

    def insist(self) -> None:
        """ConflictError where the lease is known to be lost."""
        if self.is_lost:
            raise self._taken_over()

    def _taken_over(self) -> ConflictError:
        return ConflictError(f"{self._name}: the lease ran out and another process took it over; nothing was written")

    def _take(self, c: Connection) -> tuple[int | None, str | None]:
        now = self._store.clock(c)
        token = leases.acquire(c, self._name, self._owner, now=now, ttl_s=self._ttl_s)
        if token is not None:
            return token, None
        holder = leases.holder(c, self._name)
        if holder is not None and is_gone(holder):
            leases.release(c, self._name, holder)
            token = leases.acquire(c, self._name, self._owner, now=now, ttl_s=self._ttl_s)
        return token, holder

    def _renew(self) -> None:
        if self.is_lost:
            return
        try:
            self._store.write(self.check)
        except ConflictError as error:
            self._lost.set()
            logger.warning("%s", error)
        except StoreError as error:
            logger.warning("%s could not be renewed: %s", self._name, error)


class CycleLease(Lease):
    """Held while a cycle of the policy moves."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop.store, loop.config, loop.owner, _cycle_lease(loop.name), "a cycle of this policy")


def _cycle_lease(policy: str) -> str:
    return f"cycle:{policy}"


@contextmanager
def standstill(store: Store, config: Config, policies: Sequence[str]) -> Iterator[None]:
    """No cycle of these policies begins or moves while the block runs; a short look at a duel is waited for.

    ConflictError where a cycle still moves after `STANDSTILL_S` seconds.
    """
    owner, until = f"{socket.gethostname()}:{os.getpid()}", time.monotonic() + STANDSTILL_S
    pause = threading.Event()
    with ExitStack() as held:
        for policy in sorted(policies):  # two of these take them in the same order
            while True:
                try:
                    held.enter_context(Lease(store, config, owner, _cycle_lease(policy), f"a cycle of {policy}"))
                    break
                except ConflictError:
                    if time.monotonic() >= until:
                        raise
                pause.wait(WAIT_S)
        yield


@contextmanager
def training(loop: Loop, should_stop: Callable[[], bool]) -> Iterator[bool]:
    """Held while a model is trained, by a cycle or by a job: one at a time on a machine, which has room for one.

    Waits while another one is on; False where ``should_stop`` said so before its turn came.
    """
    name, pause = f"training:{socket.gethostname()}", threading.Event()
    lease = Lease(loop.store, loop.config, loop.owner, name, "a training on this machine")
    while not should_stop():
        try:
            lease.__enter__()
        except ConflictError:
            pause.wait(WAIT_S)
            continue
        try:
            yield True
        finally:
            lease.__exit__(None, None, None)
        return
    yield False


@contextmanager
def owning(owner: str) -> Iterator[None]:
    """For as long as this process holds something as ``owner``, so that `is_gone` knows it."""
    _held_here.add(owner)
    try:
        yield
    finally:
        _held_here.discard(owner)


def is_gone(owner: str) -> bool:
    """True where the owner ``host:pid/lease`` was a process of this machine that no longer runs."""
    process, _, _ = owner.partition("/")
    host, _, pid = process.rpartition(":")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    if int(pid) == os.getpid():
        return owner not in _held_here
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
