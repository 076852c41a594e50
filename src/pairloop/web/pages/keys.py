"""Who may come in: keys, people's accounts, and who is signed in."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime

from fastapi import APIRouter, Request, Response

from pairloop.store import Store, accounts, keys, sessions
from pairloop.store.accounts import Account, Role
from pairloop.store.keys import Key, Scope
from pairloop.store.sessions import Session
from pairloop.web.context import Here
from pairloop.web.pages.rendering import PageRoute, page
from pairloop.web.paging import After

PER_PAGE = 100
ROLE_WORDS = {
    Role.RATE: "rate: chat and label",
    Role.OPERATE: "operate: also run the loop and read everything",
    Role.ADMIN: "admin: also keys, accounts and erasure",
}

router = APIRouter(include_in_schema=False, route_class=PageRoute)


@dataclass(frozen=True, slots=True)
class Held:
    """What the page shows; each list is a first part where ``…_more``."""

    keys: list[Key]
    keys_more: bool
    accounts: list[Account]
    accounts_more: bool
    sessions: list[Session]
    sessions_more: bool
    names: dict[str, str]
    """Names of the keys that sessions belong to, by id."""


@router.get("/keys")
async def keys_page(
    request: Request, context: Here, key: After = None, account: After = None, session: After = None
) -> Response:
    """``key``, ``account``, ``session``: each list begins behind this one."""
    held = await asyncio.to_thread(_read, context.store, key, account, session)
    return page(
        request,
        context,
        "keys.html",
        title="Keys",
        held=held,
        locked=await context.keys.locked(),
        default_rpm=context.config.serve.requests_per_minute,
        scopes=list(Scope),
        roles=ROLE_WORDS,
        now=datetime.now(UTC),
    )


def _read(store: Store, key: str | None, account: str | None, session: str | None) -> Held:
    with store.reading() as c:
        found_keys = keys.list_(c, after=key, limit=PER_PAGE + 1)
        found_accounts = accounts.list_(c, after=account, limit=PER_PAGE + 1)
        found_sessions = sessions.list_(c, after=session, limit=PER_PAGE + 1)
        names = keys.names_of(c, {one.key_id for one in found_sessions if one.key_id is not None})
    return Held(
        found_keys[:PER_PAGE],
        len(found_keys) > PER_PAGE,
        found_accounts[:PER_PAGE],
        len(found_accounts) > PER_PAGE,
        found_sessions[:PER_PAGE],
        len(found_sessions) > PER_PAGE,
        names,
    )
