"""Keys and sessions as requests see them: verified without reading the store each time."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Collection
from datetime import UTC, datetime
from time import monotonic
from typing import Generic, TypeVar

from pairloop.store import Store, accounts, keys, sessions
from pairloop.store.accounts import Account
from pairloop.store.keys import Key, Scope
from pairloop.store.sessions import SLIDES_AFTER, Session
from pairloop.web.callers import Caller

FRESH_S = 2.0
"""How long what was read of a key or session stands: as long as a revocation by another process takes to be seen here."""
TOUCHED_EVERY_S = 60.0
"""The least time between two writes of when a key was last used."""
REMEMBERED = 4_096
"""Keys, and sessions, kept in mind, unknown ones included."""

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """What was read lately, by id; may be used from any thread."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[float, Value]] = OrderedDict()
        self._lock = threading.Lock()
        self._forgotten_at = float("-inf")

    def get(self, name: str) -> tuple[Value] | None:
        """The value, boxed, where it is fresh."""
        known = self._known.get(name)
        return (known[1],) if known is not None and monotonic() - known[0] <= FRESH_S else None

    def put(self, name: str, value: Value, read_at: float) -> None:
        """Keep what a reading that began at ``read_at`` found, unless something was forgotten meanwhile."""
        with self._lock:
            if read_at <= self._forgotten_at:
                return
            self._known[name] = (read_at, value)
            self._known.move_to_end(name)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)

    def forget(self, name: str | None = None) -> None:
        """What was read of one, or of all, and what is being read now."""
        with self._lock:
            self._forgotten_at = monotonic()
            if name is None:
                self._known.clear()
            else:
                self._known.pop(name, None)


class KeyRing:
    """Reads each key and session at most every ``FRESH_S``; lives in one event loop, but any thread may ``forget``."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._keys: Recent[Key | None] = Recent()
        self._sessions: Recent[tuple[Session, Key | Account] | None] = Recent()
        self._touched: OrderedDict[str, float] = OrderedDict()
        self._locked = False
        self._looked_at = float("-inf")

    async def locked(self) -> bool:
        """Whether requests need a key or a sign-in: from the first key or account that was ever made, for good."""
        if not self._locked and monotonic() - self._looked_at > FRESH_S:
            self._locked = await asyncio.to_thread(self._is_locked)
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

    async def visit(self, token: str) -> tuple[Caller, bool] | None:
        """Who is signed in with a session's token, and whether it was just prolonged; None where it is no session any more."""
        parts = sessions.split(token)
        found = None if parts is None else await self._find_session(parts[0])
        if parts is None or found is None:
            return None
        (session, owner), now = found, datetime.now(UTC)
        if not session.belongs_to(parts[1], now) or (isinstance(owner, Key) and owner.ended(now)):
            return None
        if isinstance(owner, Key):
            self._touch(owner.key_id)
        prolonged = now - session.used_at >= SLIDES_AFTER and self._due(f"session:{session.session_id}")
        if prolonged:
            self._store.submit(lambda c: sessions.prolong(c, session.session_id, now), admitted=True)  # nobody waits for it
        return Caller(owner, session.session_id), prolonged

    async def still(self, caller: Caller | None, wanted: Collection[Scope]) -> bool:
        """Whether who was let in before would be let in now; None while nobody was asked."""
        if caller is None:
            return not await self.locked()
        now = datetime.now(UTC)
        if caller.session_id is not None:
            found = await self._find_session(caller.session_id)
            if found is None or now >= found[0].expires_at:
                return False
            owner: Key | Account | None = found[1]
        else:
            owner = await self._find(caller.owner.key_id) if isinstance(caller.owner, Key) else None
        if owner is None or (isinstance(owner, Key) and owner.ended(now)):
            return False
        return Caller(owner, caller.session_id).allows(wanted)

    def forget(self, name: str) -> None:
        """A key, account or session of this id was made, changed or ended here: what was read no longer stands."""
        self._keys.forget(name)
        self._sessions.forget()
        self._looked_at = float("-inf")

    async def _find(self, key_id: str) -> Key | None:
        known = self._keys.get(key_id)
        if known is not None:
            return known[0]
        read_at = monotonic()
        key = await asyncio.to_thread(self._read, key_id)
        self._keys.put(key_id, key, read_at)
        return key

    async def _find_session(self, session_id: str) -> tuple[Session, Key | Account] | None:
        known = self._sessions.get(session_id)
        if known is not None:
            return known[0]
        read_at = monotonic()
        found = await asyncio.to_thread(self._read_session, session_id)
        self._sessions.put(session_id, found, read_at)
        return found

    def _touch(self, key_id: str) -> None:
        if self._due(key_id):
            at = datetime.now(UTC)
            self._store.submit(lambda c: keys.touch(c, {key_id: at}), admitted=True)  # nobody waits for it

    def _due(self, name: str) -> bool:
        """Whether its use is to be written down again."""
        now = monotonic()
        if now - self._touched.get(name, float("-inf")) < TOUCHED_EVERY_S:
            return False
        self._touched[name] = now
        self._touched.move_to_end(name)
        if len(self._touched) > REMEMBERED:
            self._touched.popitem(last=False)
        return True

    def _is_locked(self) -> bool:
        with self._store.reading() as c:
            return accounts.is_locked(c)

    def _read(self, key_id: str) -> Key | None:
        with self._store.reading() as c:
            return keys.get(c, key_id)

    def _read_session(self, session_id: str) -> tuple[Session, Key | Account] | None:
        with self._store.reading() as c:
            return sessions.get(c, session_id)
