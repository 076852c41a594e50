"""Challengers that were put to the test in vain go from this process, wherever their cycle ended.

The process that ends a cycle unloads its challenger; a server beside the command line or a worker has it loaded, too.
"""

from __future__ import annotations

import asyncio
import logging
import time

from pairloop.config import Config
from pairloop.errors import EngineError, UnavailableError, log_failure
from pairloop.loop.cycle.status import challenger_of
from pairloop.policy.protocols import Policy
from pairloop.store import Store, canaries, cycles, duels, versions
from pairloop.types import Alias, Cycle, CycleState

logger = logging.getLogger(__name__)

AGAIN_S = 30.0
"""How long what could not be unloaded is left alone before it is tried again."""
_RECENT = 8
"""Cycles that may end between two looks; one older than that stays until others take its place (``policy.max_loaded``)."""
_IN_VAIN = (CycleState.HELD, CycleState.REJECTED, CycleState.FAILED)


class Unloader:
    """Looks for cycles that ended, and unloads the challenger of each once; ``look`` from one thread at a time.

    Once: whoever asks for the version by its number later has it again.
    """

    def __init__(self, store: Store, policy: Policy, config: Config, *, again_s: float = AGAIN_S) -> None:
        self._store = store
        self._policy = policy
        self._name = config.policy.name
        self._again_s = again_s
        self._done: frozenset[str] = frozenset()
        self._rests_until = float("-inf")

    def look(self) -> None:
        """What fails of one cycle holds up nothing else, and is tried again; UnavailableError where the store is away."""
        if time.monotonic() < self._rests_until:
            return
        with self._store.reading() as c:
            ended = [cycle for cycle in cycles.list_(c, self._name, limit=_RECENT) if cycle.state.is_terminal]
        done = {cycle.cycle_id for cycle in ended if cycle.cycle_id in self._done or self._let_go(cycle)}
        self._done = frozenset(done)
        if len(done) < len(ended):
            self._rests_until = time.monotonic() + self._again_s

    async def keep_looking(self, every_s: float) -> None:
        """Look again and again, in a server that turns no cycles itself."""
        while True:
            look, wait_s = asyncio.ensure_future(asyncio.to_thread(self.look)), every_s
            try:
                await asyncio.shield(look)
            except asyncio.CancelledError:
                await asyncio.wait([look])  # store and policy are closed next
                raise
            except Exception as error:  # noqa: BLE001 - the supervisor: the next look may find the store well again
                log_failure(logger, error, "what cycles left loaded could not be looked for")
                wait_s = max(every_s, self._again_s)
            await asyncio.sleep(wait_s)

    def _let_go(self, ended: Cycle) -> bool:
        """Whether there is nothing left to do about it."""
        try:
            self._unload(ended)
        except UnavailableError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever an engine ran into: cycles go on, and it is tried again
            log_failure(logger, error, "a challenger could not be unloaded")
            return False
        return True

    def _unload(self, ended: Cycle) -> None:
        """An engine that says that it cannot is left as it is."""
        if ended.state not in _IN_VAIN:
            return
        with self._store.reading() as c:
            number = challenger_of(ended, duels.of_cycle(c, self._name, ended.cycle_id))
            canary = canaries.current(c, self._name)
            wanted = {versions.alias(c, self._name, alias) for alias in (Alias.CHAMPION, Alias.CHALLENGER)}
        if number is None or number in wanted or (canary is not None and number == canary.version):
            return
        if number in self._policy.loaded():
            try:
                self._policy.unload(number)
            except EngineError as error:
                logger.warning("version %d of cycle %d stays loaded: %s", number, ended.number, error)
