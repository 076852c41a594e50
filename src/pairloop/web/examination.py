"""The doctor's visit, off the request's path: one at a time, in a thread of its own, its last finding kept."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from pairloop.errors import PairloopError, log_failure
from pairloop.store import Store
from pairloop.store.doctor import Problem, check

logger = logging.getLogger(__name__)

Check = Callable[[Store], Sequence[Problem]]


@dataclass(frozen=True, slots=True)
class Finding:
    """Where the last visit stands. ``error``: why it came to no end; ``took_s``: so far, while it is running."""

    status: Literal["never", "running", "done", "failed"]
    began_at: datetime | None = None
    took_s: float = 0.0
    problems: tuple[Problem, ...] = ()
    error: str | None = None


class Examination:
    """Runs ``check`` when asked, reports, and repairs nothing. Any thread."""

    def __init__(self, look: Check = check) -> None:
        self._look = look
        self._lock = threading.Lock()
        self._last = Finding("never")
        self._visit: Future[Finding] | None = None

    @property
    def finding(self) -> Finding:
        with self._lock:
            found = self._last
        if found.status != "running" or found.began_at is None:
            return found
        return Finding("running", found.began_at, _since_s(found.began_at))

    def begin(self, store: Store) -> Future[Finding]:
        """Begin a visit, or join the one that is on; what it found, when it is over."""
        with self._lock:
            if self._visit is None or self._visit.done():
                began_at = datetime.now(UTC)
                self._visit, self._last = Future(), Finding("running", began_at)
                # A daemon: a server that stops does not wait for the end of a visit, which writes nothing.
                threading.Thread(target=self._examine, args=(store, began_at, self._visit), name="doctor", daemon=True).start()
            return self._visit

    def _examine(self, store: Store, began_at: datetime, visit: Future[Finding]) -> None:
        found = Finding("failed", began_at, error="it broke; the log says why")
        try:
            problems = tuple(self._look(store))
            found = Finding("done", began_at, _since_s(began_at), problems)
        except PairloopError as error:
            found = Finding("failed", began_at, _since_s(began_at), error=str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, it must be told where the finding is looked for
            log_failure(logger, error, "the doctor's visit broke")
        finally:
            with self._lock:
                self._last = found
                visit.set_result(found)


def _since_s(at: datetime) -> float:
    return (datetime.now(UTC) - at).total_seconds()
