"""The pages' door: a name and password, or a key, become a session."""

from __future__ import annotations

import asyncio
from urllib.parse import parse_qs

from fastapi import APIRouter, Request, Response
from starlette.responses import RedirectResponse

from pairloop.errors import BusyError, ConflictError, NotFoundError
from pairloop.store import accounts, sessions
from pairloop.store.accounts import LONGEST_PASSWORD, Account
from pairloop.store.keys import Key
from pairloop.web.callers import Caller, caller_of
from pairloop.web.context import Context, Here
from pairloop.web.cookies import VISITOR_COOKIE, cleared, renewed
from pairloop.web.errors import RETRY_AFTER_S, error_response
from pairloop.web.hashing import HASHING
from pairloop.web.limits import network_of
from pairloop.web.pages.menu import first_path
from pairloop.web.pages.rendering import render
from pairloop.web.sites import is_own, own_path

router = APIRouter(include_in_schema=False)

LONGEST_FORM = 8_192
PER_NAME, PER_ADDRESS, PER_NAME_ANYWHERE = 10, 30, 100
"""Sign-ins that may be tried in a minute: under one name from one address (of IPv6: its /64), from one address, and under one
name from all of them, which is more, so that nobody is locked out by somebody else's few tries."""
NO_MATCH = "Name and password do not match."
FOREIGN = "This form was not sent from this server's own page. Try again here."


@router.get("/login")
async def form(request: Request, context: Here) -> Response:
    then = own_path(request.query_params.get("next", ""))
    caller = caller_of(request.scope)
    if caller is not None or not await context.keys.locked():
        return RedirectResponse(then or ("/" if caller is None else first_path(caller)), status_code=303)
    return _form(then)


@router.post("/login")
async def log_in(request: Request, context: Here) -> Response:
    """A session for who shows a key or password; the same refusal, after the same time, whatever of both was wrong."""
    sent = b""
    async for chunk in request.stream():
        sent += chunk
        if len(sent) > LONGEST_FORM:
            return error_response(413, f"The form of /login has at most {LONGEST_FORM} bytes.")
    fields = {name: values[0] for name, values in parse_qs(sent.decode(errors="replace")).items()}
    then = own_path(fields.get("next", ""))
    if not is_own(request.headers, request.url.scheme):
        return _form(then, FOREIGN, 403)
    name, address = fields.get("name", "").strip()[:LONGEST_PASSWORD], request.client.host if request.client else "unknown"
    key = fields.get("key", "").strip()
    if not key and HASHING.is_full:  # before it counts as a try
        return _busy(then, name)
    wait_s = _wait_s(context, name, network_of(address))
    if wait_s:
        response = _form(then, f"Too many sign-ins were tried. Try again in {wait_s} s.", 429)
        response.headers["retry-after"] = str(wait_s)
        return response
    try:
        owner = await _owner(context, key, name, fields.get("password", ""))
    except BusyError:
        return _busy(then, name)
    if isinstance(owner, str):
        return _form(then, owner, 401, name)
    try:
        token = await asyncio.to_thread(context.store.write, lambda c: sessions.begin(c, owner, address=address))
    except NotFoundError:  # removed, or with another password, between the look and the write
        return _form(then, NO_MATCH, 401, name)
    except ConflictError as error:
        return _form(then, str(error), 409, name)
    response = RedirectResponse(then or first_path(Caller(owner)), status_code=303)
    response.headers.append("set-cookie", renewed(token, request.url.scheme))
    return response


@router.post("/logout")
async def log_out(request: Request, context: Here) -> Response:
    """The session ends, and who comes next in this browser is another visitor; static/actions.js clears what pages kept."""
    if not is_own(request.headers, request.url.scheme):
        return error_response(403, "Log out from a page of this server.", code="cross_site")
    caller = caller_of(request.scope)
    session_id = caller.session_id if caller is not None else None
    if session_id is not None:
        await asyncio.to_thread(context.store.write, lambda c: sessions.log_out(c, session_id))
        context.keys.forget(session_id)
    response = RedirectResponse("/login", status_code=303)
    response.headers.append("set-cookie", cleared(request.url.scheme))
    response.delete_cookie(VISITOR_COOKIE, httponly=True, samesite="strict")
    return response


async def _owner(context: Context, token: str, name: str, password: str) -> Key | Account | str:
    """Who signs in, or why nobody does."""
    if token:
        key = await context.keys.verify(token)
        return f"This key {key}." if isinstance(key, str) else key

    def look() -> Account | None:
        with context.store.reading() as c:
            account = accounts.get(c, name)
        return account if accounts.matches(account, password) else None

    account = await asyncio.wrap_future(HASHING.submit(look))
    return account if account is not None else NO_MATCH


def _busy(then: str | None, name: str) -> Response:
    response = _form(then, "Too many people sign in at this moment. Try again in a moment.", 503, name)
    response.headers["retry-after"] = RETRY_AFTER_S
    return response


def _wait_s(context: Context, name: str, address: str) -> int:
    """How long until one more sign-in may be tried from this address, and under this name; 0 where it may be."""
    wanted = [(f"address:{address}", PER_ADDRESS)]
    if name:
        wanted += [(f"name:{name}@{address}", PER_NAME), (f"name:{name}", PER_NAME_ANYWHERE)]
    for bucket, per_minute in wanted:
        retry_s = context.sign_ins.take(bucket, per_minute).retry_s
        if retry_s:  # what is refused takes nothing from the next bucket, which is also others'
            return retry_s
    return 0


def _form(then: str | None, problem: str | None = None, status_code: int = 200, name: str = "") -> Response:
    return render("login.html", status_code=status_code, problem=problem, then=then, name=name)
