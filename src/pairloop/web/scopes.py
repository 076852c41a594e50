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
_FEEDBACK: Scopes = frozenset({Scope.FEEDBACK})
_OPERATE: Scopes = frozenset({Scope.OPERATE})
_TRAIN: Scopes = frozenset({Scope.TRAIN})
_READ: Scopes = frozenset({Scope.OPERATE, Scope.TRAIN})
_ADMIN: Scopes = frozenset({Scope.ADMIN})

_LOOP = ("policies", "versions", "cycles", "datasets", "duels", "gates", "raters", "schedules", "status")


class Rule(NamedTuple):
    """``scopes``: one of them is enough. ``below`` is False where the rule is about the path itself, not what lies below."""

    methods: str
    path: str
    scopes: Scopes
    below: bool = True


RULES: tuple[Rule, ...] = (
    *(Rule("GET", path, OPEN) for path in ("/health", "/version", "/docs", "/openapi.json", "/static", "/favicon.ico")),
    Rule("GET POST", "/login", OPEN, below=False),
    Rule("GET", "/", _OPERATE, below=False),
    *(Rule("GET", path, _OPERATE) for path in ("/page", "/home", "/preferences", "/queue", "/raters", "/versions")),
    Rule("GET", "/metrics", _OPERATE, below=False),
    Rule("GET", "/v1/models", ANY),
    # One stored completion is found by its id, which only its client was told; the list shows everybody's.
    Rule("GET", "/v1/chat/completions", _OPERATE, below=False),
    Rule("GET POST", "/v1/chat/completions", _INFERENCE),
    Rule("DELETE", "/v1/chat/completions", _OPERATE),
    Rule("POST", "/v1/preferences", _FEEDBACK),
    # What people said, and what is decided about it.
    Rule("GET POST", "/v1/groups", _OPERATE),
    Rule("GET POST DELETE", "/v1/views", _OPERATE),
    Rule("GET", "/v1/feedback", _READ),
    Rule("POST", "/v1/feedback", _FEEDBACK),
    Rule("GET POST DELETE", "/v1/files", _TRAIN),
    Rule("GET POST DELETE", "/v1/fine_tuning", _TRAIN),
    # Other people's conversations.
    Rule("GET POST", "/v1/queue/gold", _OPERATE),
    Rule("GET POST DELETE", "/v1/queue", _OPERATE),
    Rule("GET", "/v1/rater_checks", _READ, below=False),
    *(Rule("GET", f"/v1/{noun}", _READ) for noun in _LOOP),
    *(Rule("POST", f"/v1/{noun}", _OPERATE) for noun in _LOOP),
    Rule("GET", "/v1/audit", _OPERATE),
    Rule("GET POST DELETE", "/v1/keys", _ADMIN),
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


def undeclared(routes: Iterable[BaseRoute]) -> list[str]:
    """``METHOD path`` of the routes that no line of the table covers."""
    missing = []
    for route in routes:
        methods = sorted(route.methods or ()) if isinstance(route, Route) else ["GET"]
        path = route.path if isinstance(route, Route | Mount) else str(route)
        missing += [f"{method} {path}" for method in methods if rule_of(method, path) is None]
    return missing
