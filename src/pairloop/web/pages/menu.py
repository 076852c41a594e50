"""The menu: which pages there are, in which order, and who sees them."""

from __future__ import annotations

from typing import NamedTuple

from fastapi import Request

from pairloop.web.callers import Caller, may_open
from pairloop.web.scopes import scopes_of


class Entry(NamedTuple):
    """A line of the menu; ``icon`` is the id of a symbol in static/icons.svg."""

    path: str
    word: str
    icon: str


GROUPS: tuple[tuple[str, tuple[Entry, ...]], ...] = (
    (
        "Use",
        (
            Entry("/", "Chat", "chat"),
            Entry("/queue", "Label", "queue"),
        ),
    ),
    (
        "Loop",
        (
            Entry("/home", "Home", "home"),
            Entry("/versions", "Versions", "versions"),
            Entry("/gates", "Gate", "gate"),
            Entry("/runs", "Training", "runs"),
        ),
    ),
    (
        "Data",
        (
            Entry("/preferences", "Preferences", "preferences"),
            Entry("/raters", "Raters", "raters"),
            Entry("/datasets", "Datasets", "datasets"),
            Entry("/requests", "Requests", "requests"),
        ),
    ),
    (
        "Operate",
        (
            Entry("/schedule", "Schedule", "schedule"),
            Entry("/keys", "Keys", "keys"),
            Entry("/audit", "Audit", "audit"),
            Entry("/system", "Health", "health"),
        ),
    ),
)


def path_of(icon: str) -> str | None:
    """Where the page with this icon is; None where there is none."""
    return next((entry.path for _, entries in GROUPS for entry in entries if entry.icon == icon), None)


def menu(request: Request) -> list[tuple[str, list[Entry]]]:
    """The groups with the entries that whoever asks may open; none for one who has still to sign in."""
    shown = []
    for word, entries in GROUPS:
        allowed = [entry for entry in entries if may_open(request.scope, scopes_of("GET", entry.path))]
        if allowed:
            shown.append((word, allowed))
    return shown


def first_path(caller: Caller) -> str:
    """Where somebody who has just signed in begins."""
    paths = (entry.path for _, entries in GROUPS for entry in entries)
    return next((path for path in paths if caller.allows(scopes_of("GET", path))), "/docs")
