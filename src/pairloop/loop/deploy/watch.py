"""The watch: looks at new champion, canary and challenger again and again, and takes back what a live guard breaks on.

It has a thread of its own because a cycle's trains for hours. What a cycle has to record itself (its duel, the end of its
canary) it is told of by ``on_alarm``. Several processes may watch one policy: every act is one
transaction that checks that what it ends is still on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from pairloop.config import Config
from pairloop.errors import ConflictError, EngineError, PairloopError, log_failure
from pairloop.loop.deploy.aliases import known, promote, rollback
from pairloop.loop.deploy.canary import Standing, canary_standing, champion_standing, duel_standing, stop_canary
from pairloop.policy.protocols import Policy
from pairloop.store import Store, canaries, duels, traffic
from pairloop.store.canaries import Canary

logger = logging.getLogger(__name__)

EVERY_S = 2.0
AFTER_TROUBLE_S = 30.0
MINUTE = timedelta(minutes=1)
REST = 50.0
"""Seconds of rest per second that a look took: looking must not take the time that answering needs."""


class Watch:
    """Looks every `EVERY_S`; ``start`` and ``stop`` once each, ``look`` from one thread at a time.

    ``alarm``: the open cycle's duel or canary is to be looked at.
    """

    def __init__(
        self, store: Store, policy: Policy, config: Config, *, every_s: float = EVERY_S, on_alarm: Callable[[], object] = bool
    ) -> None:
        self._store = store
        self._policy = policy
        self._config = config
        self._every_s = every_s
        self._stopping = threading.Event()
        self._told: tuple[int, datetime] | None = None
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._on_alarm = on_alarm
        self.alarm = False
        self.trouble: str | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def look(self, now: datetime | None = None) -> None:
        """One look: withdraws or promotes a canary, or rolls the champion back, where that is due.

        EngineError where the former champion cannot answer either: then the engine is at fault, and nothing is moved. The
        champion's errors are forgiven up to a minute later, in the store: another process or a later one sees no more of them.
        """
        now, name = now or datetime.now(UTC), self._config.policy.name
        with self._store.reading() as c:
            watched = champion_standing(c, self._config, now)
            canary, duel = canaries.current(c, name), duels.current(c, name)
            trial = canary_standing(c, self._config, canary, now) if canary is not None else None
            if canary is None and duel is not None:
                trial = duel_standing(c, self._config, duel, now)
        self.alarm = trial is not None and (trial.broken is not None or trial.is_over)
        if watched is not None and watched.broken is not None:
            try:
                self._take_back(watched)
            except EngineError:
                number = watched.version
                self._store.write(lambda c: traffic.forgive(c, name, number, now + MINUTE))
                raise
        elif canary is not None and trial is not None:
            self._end_canary(canary, trial)
        if self.alarm:
            self._on_alarm()

    def _end_canary(self, canary: Canary, standing: Standing) -> None:
        if standing.broken is not None:
            reason = f"a live guard broke: {standing.broken}"
            logger.error("%s@%d is withdrawn as canary: %s", canary.policy, canary.version, reason)
            stop_canary(self._store, canary.policy, reason=reason, canary_id=canary.canary_id, details=evidence(standing))
        elif standing.is_over and canary.cycle_id is None:  # a cycle promotes its own, with its record
            version = known(self._store, canary.policy, canary.version)
            reason = f"{canary.reason}; {standing.answers} requests as canary broke no guard"
            promote(self._store, self._policy, version, reason=reason, replacing=canary.champion, canary_id=canary.canary_id)

    def _take_back(self, standing: Standing) -> None:
        name, told = self._config.policy.name, (standing.version, standing.since)
        reason = f"a live guard broke: {standing.broken}"
        if not self._config.deploy.auto_rollback:
            if self._told != told:
                self._told = told
                logger.error("%s@%d stays the champion (deploy.auto_rollback = false): %s", name, standing.version, reason)
            return
        logger.error("%s@%d is rolled back to version %d: %s", name, standing.version, standing.former, reason)
        rollback(
            self._store,
            name,
            to=standing.former,
            reason=reason,
            policy=self._policy,
            details=evidence(standing),
            replacing=standing.version,
        )

    def _run(self) -> None:
        wait_s = self._every_s
        while not self._stopping.wait(wait_s):
            began = time.monotonic()
            try:
                self.look()
                self.trouble, wait_s = None, max(self._every_s, REST * (time.monotonic() - began))
            except ConflictError as error:  # another process, or somebody by hand, was faster
                logger.info("%s", error)
            except PairloopError as error:
                logger.error("the watch cannot act: %s", error)
                self.trouble, wait_s = str(error), AFTER_TROUBLE_S
            except Exception as error:  # noqa: BLE001 - the supervisor: the watch outlives whatever a look ran into
                log_failure(logger, error, "a look at the live guards failed")
                self.trouble, wait_s = f"{type(error).__name__}: {error}", AFTER_TROUBLE_S


def evidence(standing: Standing) -> dict[str, Any]:
    """What the audit trail keeps of a guard that broke."""
    return {"answers": standing.answers, "guards": [asdict(reason) for reason in standing.reasons]}
