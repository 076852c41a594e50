"""A circuit breaker: after failures in a row a replica gets no requests for a while, then one on trial."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from enum import StrEnum

FAILURES = 3
"""Failures in a row that open the circuit."""
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class Circuit(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """Closed until `FAILURES` requests in a row failed; then open for a pause; then half-open: one request on trial.

    A trial that succeeds closes it; one that fails opens it for twice the pause. Used by one thread.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, rng: random.Random | None = None) -> None:
        self._clock = clock
        self._rng = rng or random.Random()
        self.reset()

    def reset(self) -> None:
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._open_until: float | None = None
        self._on_trial = False

    @property
    def state(self) -> Circuit:
        if self._open_until is None:
            return Circuit.CLOSED
        return Circuit.OPEN if self._clock() < self._open_until else Circuit.HALF_OPEN

    @property
    def admits(self) -> bool:
        """True where a request may go now; while half-open only as long as none is on trial."""
        state = self.state
        return state is Circuit.CLOSED or (state is Circuit.HALF_OPEN and not self._on_trial)

    def begin(self) -> bool:
        """A request goes out; True where it is on trial: its end must be told by `succeeded`, `failed` or `gave_up`."""
        trial = self.state is Circuit.HALF_OPEN
        self._on_trial = self._on_trial or trial
        return trial

    def succeeded(self) -> None:
        self.reset()

    def failed(self) -> None:
        self._failures += 1
        if self._on_trial or (self._open_until is None and self._failures >= FAILURES):
            # Jitter, so that many clients do not come back in the same moment.
            self._open_until = self._clock() + self._pause_s * self._rng.uniform(0.5, 1.5)
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        self._on_trial = False

    def gave_up(self) -> None:
        """The request on trial ended without a verdict (its client went away): the next one is on trial."""
        self._on_trial = False
