"""Which scope opens which route: one table, by method and the beginning of the path.

``create_app`` refuses to start with a route that no line of it covers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from starlette.routing import BaseRoute, Mount, Route

from pairloop.store.keys import Scope

Scopes = frozenset[Scope]

OPEN: Scopes = frozenset()
"""Needs no key."""
ANY: Scopes = frozenset(Scope)
"""A key, whatever its scopes."""
_INFERENCE: Scopes = frozenset({Scope.INFERENCE})
NAME_VERSIONS: Scopes = _INFERENCE
"""May have a version answer by its name; who only rates must not know one by its style."""
_GIVE: Scopes = frozenset({Scope.FEEDBACK, Scope.RATE})
_OPERATE: Scopes = frozenset({Scope.OPERATE})
_RATE: Scopes = frozenset({Scope.RATE, Scope.OPERATE})
"""Chat and labelling queue, and what these pages show."""
_TRAIN: Scopes = frozenset({Scope.TRAIN})
_READ: Scopes = frozenset({Scope.OPERATE, Scope.TRAIN})
_ADMIN: Scopes = frozenset({Scope.ADMIN})

_LOOP = ("policies", "versions", "cycles", "datasets", "duels", "gates", "raters", "schedules", "status")


_PAGES = (
    "page",
    "home",
    "versions",
    "gates",
    "runs",
    "preferences",
    "raters",
    "datasets",
    "requests",
    "schedule",
    "audit",
    "system",
)


class Rule(NamedTuple):
    """``scopes``: one of them is enough. ``below`` is False where the rule is about the path itself, not what lies below."""

    methods: str
    path: str
    scopes: Scopes
    below: bool = True


RULES: tuple[Rule, ...] = (
    *(Rule("GET", path, OPEN) for path in ("/health", "/version", "/docs", "/openapi.json", "/static", "/favicon.ico")),
    Rule("GET POST", "/login", OPEN, below=False),
    Rule("POST", "/logout", OPEN, below=False),
    Rule("GET", "/", _RATE, below=False),
    *(Rule("GET", path, _RATE) for path in ("/page/events", "/page/live", "/queue")),
    *(Rule("GET", f"/{noun}", _OPERATE) for noun in _PAGES),
    Rule("GET", "/keys", _ADMIN),
    Rule("GET", "/metrics", _OPERATE, below=False),
    Rule("GET", "/v1/models", ANY),
    # One stored completion is found by its id, which only its client was told; the list shows everybody's.
    Rule("GET", "/v1/chat/completions", _OPERATE, below=False),
    Rule("POST", "/v1/chat/completions", frozenset({Scope.INFERENCE, Scope.RATE}), below=False),
    Rule("GET POST", "/v1/chat/completions", _INFERENCE),
    Rule("DELETE", "/v1/chat/completions", _OPERATE),
    Rule("POST", "/v1/preferences", _GIVE),
    # What people said, and what is decided about it.
    Rule("GET POST", "/v1/groups", _OPERATE),
    Rule("GET POST DELETE", "/v1/views", _OPERATE),
    Rule("GET", "/v1/feedback", _READ),
    # Found by ids that only who gave the feedback was told; it names versions, no text and nobody.
    Rule("GET", "/v1/lineage", _GIVE, below=False),
    Rule("POST", "/v1/feedback", _GIVE),
    Rule("GET POST DELETE", "/v1/files", _TRAIN),
    Rule("GET POST DELETE", "/v1/fine_tuning", _TRAIN),
    # Other people's conversations.
    Rule("GET POST", "/v1/queue/gold", _OPERATE),
    Rule("GET", "/v1/queue", _RATE, below=False),
    Rule("POST DELETE", "/v1/queue/reservations", _RATE),
    Rule("POST", "/v1/replays", _OPERATE, below=False),
    Rule("GET", "/v1/exports", _OPERATE),
    Rule("GET POST", "/v1/doctor", _OPERATE, below=False),
    Rule("GET", "/v1/rater_checks", _READ, below=False),
    *(Rule("GET", f"/v1/{noun}", _READ) for noun in _LOOP),
    *(Rule("POST", f"/v1/{noun}", _OPERATE) for noun in _LOOP),
    Rule("GET", "/v1/audit", _OPERATE),
    *(Rule("GET POST DELETE", f"/v1/{noun}", _ADMIN) for noun in ("keys", "accounts", "sessions")),
    Rule("GET POST", "/v1/erasures", _ADMIN),
)


def rule_of(method: str, path: str) -> Rule | None:
    """The first line of the table about this request; HEAD asks for what GET does."""
    wanted = "GET" if method == "HEAD" else method
    for rule in RULES:
        inside = path.startswith(rule.path) and (len(path) == len(rule.path) or (rule.below and path[len(rule.path)] == "/"))
        if inside and wanted in rule.methods.split():
            return rule
    return None


def scopes_of(method: str, path: str) -> Scopes:
    """The scopes one of which opens this; a path that no route has still takes a key to be told so."""
    rule = rule_of(method, path)
    return ANY if rule is None else rule.scopes


def is_page(method: str, path: str) -> bool:
    """Whether this is a page for people: without a session it leads to /login, and its refusals are pages."""
    known = rule_of(method, path) is not None
    return known and method in ("GET", "HEAD") and path != "/metrics" and not path.startswith(("/v1/", "/page/"))


def undeclared(routes: Iterable[BaseRoute]) -> list[str]:
    """``METHOD path`` of the routes that no line of the table covers."""
    missing = []
    for route in routes:
        methods = sorted(route.methods or ()) if isinstance(route, Route) else ["GET"]
        path = route.path if isinstance(route, Route | Mount) else str(route)
        missing += [f"{method} {path}" for method in methods if rule_of(method, path) is None]
    return missing
