"""Accounts and sessions over HTTP: made, changed, removed, ended. A password travels in a body only, and is in no reply."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field

from pairloop.client.shapes import AccountResource, Page, SessionResource
from pairloop.errors import ConflictError
from pairloop.store import accounts, sessions
from pairloop.store.accounts import LONGEST_PASSWORD, SHORTEST_PASSWORD, Account, Role
from pairloop.store.sessions import Session
from pairloop.web.audit import BY_HAND, Actor
from pairloop.web.context import Here
from pairloop.web.hashing import HASHING
from pairloop.web.paging import After, Limit, page
from pairloop.web.resources import seconds
from pairloop.web.wire import Body, PlainText

router = APIRouter(tags=["accounts"])

RoleField = Annotated[Role, Field(strict=False)]
Password = Annotated[PlainText, Field(min_length=SHORTEST_PASSWORD, max_length=LONGEST_PASSWORD)]
OfAccount = Annotated[str | None, Query(max_length=48, description="Only those of this account.")]


class AccountBody(Body):
    """An account to be made."""

    name: PlainText = Field(min_length=1, max_length=48, examples=["ada"])
    role: RoleField = Field(examples=["rate"])
    password: Password


class AccountChangeBody(Body):
    """What is to be different: the role, the password (which ends the account's sessions), or both."""

    role: RoleField | None = None
    password: Password | None = None


@router.post("/v1/accounts", status_code=201, summary="Make an account for a person")
def create_account(body: AccountBody, context: Here, actor: Actor) -> AccountResource:
    password_hash = _hashed(body.password)
    account = context.store.write(
        lambda c: accounts.create(c, body.name, body.role, password_hash, actor=actor, reason=BY_HAND)
    )
    context.keys.forget(account.name)
    return account_resource(account)


@router.get("/v1/accounts", summary="Accounts, by name")
def list_accounts(context: Here, limit: Limit = 20, after: After = None) -> Page[AccountResource]:
    with context.store.reading() as c:
        found = accounts.list_(c, after=after, limit=limit + 1)
    return page([account_resource(account) for account in found], limit=limit)


@router.get("/v1/accounts/{name}", summary="One account")
def get_account(name: str, context: Here) -> AccountResource:
    with context.store.reading() as c:
        return account_resource(accounts.need(c, name))


@router.post("/v1/accounts/{name}", summary="Give an account another role or password")
def change_account(name: str, body: AccountChangeBody, context: Here, actor: Actor) -> AccountResource:
    if body.role not in (None, Role.ADMIN):
        _refuse_oneself(name, actor, "be made less than admin")
    password_hash = None if body.password is None else _hashed(body.password)
    account = context.store.write(
        lambda c: accounts.change(c, name, role=body.role, password_hash=password_hash, actor=actor, reason=BY_HAND)
    )
    context.keys.forget(name)
    return account_resource(account)


@router.delete("/v1/accounts/{name}", summary="Remove an account, and end its sessions")
def remove_account(name: str, context: Here, actor: Actor) -> AccountResource:
    _refuse_oneself(name, actor, "be removed")
    account = context.store.write(lambda c: accounts.remove(c, name, actor=actor, reason=BY_HAND))
    context.keys.forget(name)
    return account_resource(account)


@router.get("/v1/sessions", summary="Who is signed in, newest first")
def list_sessions(context: Here, limit: Limit = 20, after: After = None, account: OfAccount = None) -> Page[SessionResource]:
    with context.store.reading() as c:
        found = sessions.list_(c, account=account, after=after, limit=limit + 1)
    return page([session_resource(session) for session in found], limit=limit)


@router.delete("/v1/sessions/{session_id}", summary="End a session")
def end_session(session_id: str, context: Here, actor: Actor) -> SessionResource:
    session = context.store.write(lambda c: sessions.end(c, session_id, actor=actor, reason=BY_HAND))
    context.keys.forget(session_id)
    return session_resource(session)


def _hashed(password: str) -> str:
    return HASHING.submit(lambda: accounts.hash_password(password)).result()


def _refuse_oneself(name: str, actor: str, what: str) -> None:
    """Nobody locks themselves out by a slip."""
    if actor == f"account:{name}":
        raise ConflictError(f"{name!r} is signed in here, and cannot {what} by itself: another admin or the command line can")


def account_resource(account: Account) -> AccountResource:
    return AccountResource(
        id=account.name,
        role=account.role.value,
        scopes=sorted(account.scopes),
        created_at=seconds(account.created_at),
        last_login_at=None if account.last_login_at is None else seconds(account.last_login_at),
    )


def session_resource(session: Session) -> SessionResource:
    return SessionResource(
        id=session.session_id,
        owner=session.owner,
        address=session.address,
        created_at=seconds(session.created_at),
        used_at=seconds(session.used_at),
        expires_at=seconds(session.expires_at),
    )
