"""The cookie of a session: scripts cannot read it, other sites cannot send it, and a key is never in it."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from pairloop.store.sessions import LASTS
from pairloop.web.sites import site_of

SESSION_COOKIE = "pairloop_session"
VISITOR_COOKIE = "pairloop_visitor"
"""Tells apart who picks in the chat without being signed in."""


def session_token(headers: Headers) -> str | None:
    """The token in a request's cookie, which counts only for this server's own pages."""
    origin = headers.get("origin")
    if headers.get("cookie") is None or (origin is not None and headers.get("host") != site_of(origin)):
        return None
    return cookie_parser(headers["cookie"]).get(SESSION_COOKIE) or None


def renewed(token: str, scheme: str) -> str:
    """The header that sets it, for as long as a session lasts. ``token`` is one that we made: hexadecimal."""
    return _header(token, scheme, int(LASTS.total_seconds()))


def cleared(scheme: str) -> str:
    """The header that takes it away."""
    return _header("", scheme, 0)


def _header(token: str, scheme: str, max_age_s: int) -> str:
    secure = "; Secure" if scheme == "https" else ""
    return f"{SESSION_COOKIE}={token}; Path=/; Max-Age={max_age_s}; HttpOnly; SameSite=strict{secure}"
