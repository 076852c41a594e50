"""Who a request comes from, as the layers and pages know it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from starlette.types import Scope as AsgiScope

from pairloop.store.accounts import Account
from pairloop.store.keys import Key, Scope

CALLER = "pairloop.caller"
"""Where the scope of a request holds who sent it: ``key:<id>``, ``account:<name>`` or ``address:<ip>``."""
LET_IN = "pairloop.let_in"
"""Where it holds the `Caller` who showed a key or is signed in."""
LOCKED = "pairloop.locked"
"""Where it holds whether the server asks for a key or a sign-in."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever showed a key, or is signed in with a key or an account (then with the session)."""

    owner: Key | Account
    session_id: str | None = None

    @property
    def ident(self) -> str:
        """As the audit trail names it."""
        return f"key:{self.owner.key_id}" if isinstance(self.owner, Key) else f"account:{self.owner.name}"

    @property
    def requests_per_minute(self) -> int | None:
        return self.owner.requests_per_minute if isinstance(self.owner, Key) else None

    @property
    def role(self) -> str:
        """What is told beside the name: a person's role, or that it is a key."""
        return "key" if isinstance(self.owner, Key) else str(self.owner.role)

    def allows(self, wanted: Collection[Scope]) -> bool:
        """Whether one of the wanted scopes is among its own, or none is wanted."""
        return not wanted or Scope.ADMIN in self.owner.scopes or not self.owner.scopes.isdisjoint(wanted)


def caller_of(scope: AsgiScope) -> Caller | None:
    caller: Caller | None = scope.get(LET_IN)
    return caller


def may_open(scope: AsgiScope, wanted: Collection[Scope]) -> bool:
    """Whether who asks may have what takes one of these scopes."""
    caller = caller_of(scope)
    return not wanted or not scope.get(LOCKED) if caller is None else caller.allows(wanted)
