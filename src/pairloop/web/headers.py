"""Request headers, read off the scope, and those of every response: what is done for each request has to be cheap."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import Scope

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
# The referrer stays within the server; with none at all, browsers would not say either where a form comes from.
SECURITY_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
NO_STORE = (b"cache-control", b"no-store")
HSTS = (b"strict-transport-security", b"max-age=31536000")


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of this name (in small letters)."""
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return None


def secured(headers: Iterable[tuple[bytes, bytes]], scheme: str) -> list[tuple[bytes, bytes]]:
    """A response's headers with those that every response has; kept by nobody, unless it says itself for how long."""
    whole = [*headers, *SECURITY_HEADERS]
    if not any(name == NO_STORE[0] for name, _ in whole):
        whole.append(NO_STORE)
    if scheme == "https":
        whole.append(HSTS)
    return whole
