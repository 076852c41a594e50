"""Which site a browser's request comes from."""

from __future__ import annotations

from urllib.parse import urlsplit


def site_of(origin: str) -> str | None:
    """Host and port of an Origin header; None where it is none, and so is no site that we know."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
