"""The menu: which pages there are, in which order, and who sees them."""

from __future__ import annotations

from typing import NamedTuple

from fastapi import Request

from pairloop.web.access import KEY
from pairloop.web.scopes import scopes_of


class Entry(NamedTuple):
    """A line of the menu; ``icon`` is the id of a symbol in static/icons.svg."""

    path: str
    word: str
    icon: str


GROUPS: tuple[tuple[str, tuple[Entry, ...]], ...] = (
    ("Use", (Entry("/", "Chat", "chat"),)),
    ("Loop", (Entry("/home", "Home", "home"), Entry("/versions", "Versions", "versions"))),
    (
        "People",
        (
            Entry("/preferences", "Preferences", "preferences"),
            Entry("/queue", "Labelling queue", "queue"),
            Entry("/raters", "Raters", "raters"),
        ),
    ),
)


def path_of(icon: str) -> str | None:
    """Where the page with this icon is; None where there is none."""
    return next((entry.path for _, entries in GROUPS for entry in entries if entry.icon == icon), None)


def menu(request: Request) -> list[tuple[str, list[Entry]]]:
    """The groups with the entries that whoever asks may open."""
    key = request.scope.get(KEY)
    shown = []
    for word, entries in GROUPS:
        allowed = [entry for entry in entries if key is None or key.allows(scopes_of("GET", entry.path))]
        if allowed:
            shown.append((word, allowed))
    return shown
