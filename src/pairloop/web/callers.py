"""Who a request comes from, as the layers and pages know it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from starlette.types import Scope as AsgiScope

from pairloop.errors import InvalidRequestError
from pairloop.store.accounts import Account
from pairloop.store.keys import Key, Scope
from pairloop.store.subjects import is_reserved
from pairloop.types import Source

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
    def own_name(self) -> str | None:
        """The name that a session asks and picks under; None for a key, which speaks for the people it names."""
        return None if self.session_id is None else self.owner.name

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


async def _caller(request: Request) -> Caller | None:
    return caller_of(request.scope)


AsCaller = Annotated[Caller | None, Depends(_caller)]


def name_of(caller: Caller | None, named: str | None, param: str) -> str | None:
    """Under which name this is done: of a session its own alone, else the one that ``param`` names."""
    own = None if caller is None else caller.own_name
    if own is not None and named not in (None, own):
        text = f"{param} has to be {own!r}, as whom you are signed in here, or be left out; an API key may name others"
        raise InvalidRequestError(text, param=param, code="not_your_name")
    if named is not None and is_reserved(named):
        text = f"{param} may not be {named!r}: so a vote of an operator is recorded, or a person named who is to be erased"
        raise InvalidRequestError(text, param=param, code="reserved_name")
    return named if own is None else own


def source_of(caller: Caller | None, named: str | None) -> Source:
    """Who or what judged: a session is a person, so that no vote of one passes for a judge's, which other rules are for."""
    if named not in (None, Source.HUMAN) and caller is not None and caller.own_name is not None:
        text = "source has to be 'human', or be left out, by who is signed in; a judge or verifier shows an API key"
        raise InvalidRequestError(text, param="source", code="not_your_name")
    return Source.HUMAN if named is None else Source(named)


def may_open(scope: AsgiScope, wanted: Collection[Scope]) -> bool:
    """Whether who asks may have what takes one of these scopes; nobody was asked on an open path, and then it is not told."""
    caller = caller_of(scope)
    return not wanted or not scope.get(LOCKED, True) if caller is None else caller.allows(wanted)
