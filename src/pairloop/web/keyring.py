"""The keys as requests see them: verified without reading the store each time."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from datetime import UTC, datetime
from time import monotonic

from pairloop.store import Store, keys
from pairloop.store.keys import Key

FRESH_S = 2.0
"""How long what was read of a key stands: as long as a revocation by another process takes to be seen here."""
TOUCHED_EVERY_S = 60.0
"""The least time between two writes of when a key was last used."""
REMEMBERED = 4_096
"""Keys kept in mind, unknown ones included."""


class KeyRing:
    """Reads each key at most every ``FRESH_S``; lives in one event loop, ``forget`` may be called from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: OrderedDict[str, tuple[float, Key | None]] = OrderedDict()
        self._touched: dict[str, float] = {}
        self._locked = False
        self._looked_at = float("-inf")

    async def locked(self) -> bool:
        """Whether requests need a key: from the first one that was ever made, for good."""
        if not self._locked and monotonic() - self._looked_at > FRESH_S:
            self._locked = await asyncio.to_thread(self._any)
            self._looked_at = monotonic()
        return self._locked

    async def verify(self, token: str) -> Key | str:
        """The key of a token, or why it is not good."""
        parts = keys.split(token)
        if parts is None:
            return "does not look like sk-pairloop-…"
        key_id, secret = parts
        key = await self._find(key_id)
        if key is None:
            return "is not known"
        refusal = key.refusal(secret, datetime.now(UTC))
        if refusal is None:
            self._touch(key_id)
        return refusal or key

    def forget(self, key_id: str) -> None:
        """A key was made or revoked here: what was read of it no longer stands."""
        self._known.pop(key_id, None)
        self._looked_at = float("-inf")

    async def _find(self, key_id: str) -> Key | None:
        known = self._known.get(key_id)
        if known is not None and monotonic() - known[0] <= FRESH_S:
            return known[1]
        read_at = monotonic()
        key = await asyncio.to_thread(self._read, key_id)
        self._known[key_id] = (read_at, key)
        self._known.move_to_end(key_id)
        while len(self._known) > REMEMBERED:
            self._touched.pop(self._known.popitem(last=False)[0], None)
        return key

    def _touch(self, key_id: str) -> None:
        now = monotonic()
        if now - self._touched.get(key_id, float("-inf")) < TOUCHED_EVERY_S:
            return
        self._touched[key_id] = now
        at = datetime.now(UTC)
        self._store.submit(lambda c: keys.touch(c, {key_id: at}), admitted=True)  # nobody waits for it

    def _any(self) -> bool:
        with self._store.reading() as c:
            return keys.any_(c)

    def _read(self, key_id: str) -> Key | None:
        with self._store.reading() as c:
            return keys.get(c, key_id)
