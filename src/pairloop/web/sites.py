"""Which site a browser's request comes from."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers

LONGEST_NEXT = 2_000


def site_of(origin: str) -> str | None:
    """Host and port of an Origin header; None where it is none, and so is no site that we know."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def is_own(headers: Headers, scheme: str) -> bool:
    """Whether a browser says that a page of this very host sends this: by Origin, or by Sec-Fetch-Site where there is none.

    Browsers set both themselves, and send an Origin with everything that writes. Over https an http page of the same host is
    somebody else's.
    """
    origin, fetched_from = headers.get("origin"), headers.get("sec-fetch-site")
    if fetched_from not in (None, "same-origin"):
        return False
    if origin is None:
        return fetched_from == "same-origin"
    return site_of(origin) == headers.get("host") and (scheme != "https" or origin.startswith("https:"))


def own_path(path: str) -> str | None:
    """The path of this server, query included, that ``path`` is; None for what a browser could take for another site's."""
    tricky = "\\" in path or any(ord(character) <= 0x20 or character == "\x7f" for character in path)
    if tricky or not path.startswith("/") or path.startswith("//") or len(path) > LONGEST_NEXT:
        return None
    return None if path.split("?")[0] in ("/login", "/logout") else path
