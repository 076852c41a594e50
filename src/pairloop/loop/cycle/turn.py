"""One stage's turn: what it works with, and how it records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

from pairloop.errors import NotFoundError
from pairloop.loop.cycle.context import CycleLease, Loop
from pairloop.store import cycles, versions
from pairloop.types import Cycle, CycleState, CycleStep, Version


@dataclass(frozen=True, slots=True)
class Turn:
    """A cycle that moves, under the lease of whoever moves it."""

    loop: Loop
    lease: CycleLease
    cycle: Cycle
    should_stop: Callable[[], bool]

    def record(self, c: Connection, state: CycleState, record: Mapping[str, Any]) -> None:
        """Append the step in the caller's transaction, if the lease is still ours."""
        self.lease.check(c)
        cycles.step(c, self.cycle.cycle_id, CycleStep(state, record, datetime.now(UTC)))

    def enter(self, state: CycleState, record: Mapping[str, Any]) -> None:
        self.loop.store.write(lambda c: self.record(c, state, record))

    def recorded(self, state: CycleState) -> Mapping[str, Any]:
        record = self.cycle.record(state)
        assert record is not None, f"{state} is entered with a record"
        return record

    def version(self, number: int) -> Version:
        with self.loop.store.reading() as c:
            version = versions.get(c, self.loop.name, number)
        if version is None:
            raise NotFoundError(f"{self.loop.name} has no version {number}", param="version")
        return version
