"""The OpenAPI document: what FastAPI derives, with an example of each body, the scopes, and what a refusal looks like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from pairloop.web.scopes import ANY, scopes_of

PICK = {
    "inference_id": "chatcmpl-0192f0c1-7d0a-7b6e-9f7c-2f4f1f6a3b11",
    "outcome": "chosen",
    "chosen_index": 1,
    "rejected_index": 0,
}

EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "POST /v1/chat/completions": {
        "model": "support-bot",
        "messages": [{"role": "user", "content": "Where is my order?"}],
        "n": 2,
        "user": "customer-7",
    },
    "POST /v1/chat/completions/{completion_id}": {"metadata": {"shop": "north"}},
    "POST /v1/preferences": {
        **PICK,
        "shown_order": [1, 0],
        "reason": "names the day",
        "rater_id": "customer-7",
        "latency_ms": 5400,
    },
    "POST /v1/feedback": {
        "inference_id": PICK["inference_id"],
        "choice_index": 0,
        "metric_name": "thumbs",
        "value": True,
        "source_id": "customer-7",
    },
    "POST /v1/cycles": {"reason": "new tone of voice"},
    "POST /v1/schedules/{name}": {"cron": "0 3 * * *", "min_pairs": 300, "reason": "faster rounds this week"},
    "POST /v1/schedules/{name}/reset": {"settings": ["min_pairs"], "reason": "the launch is over"},
    "POST /v1/versions/{version_id}/promote": {"reason": "tried by hand", "canary_share": 0.1},
    "POST /v1/policies/{name}/canary/stop": {"reason": "answers in the wrong language"},
    "POST /v1/policies/{name}/rollback": {"to": 3, "reason": "answers in the wrong language"},
    "POST /v1/cycles/{cycle_id}/cancel": {"reason": "the picks of last night came from a test"},
    "POST /v1/raters/{rater_id}/quarantine": {"reason": "votes for the longer answer whatever it says"},
    "POST /v1/raters/{rater_id}/release": {"reason": "talked to them: they had misread the guidelines"},
    "POST /v1/raters/quarantine": {"rater_id": "customer-7", "reason": "votes for the longer answer whatever it says"},
    "POST /v1/raters/release": {"rater_id": "customer-7", "reason": "they had misread the guidelines"},
    "POST /v1/replays": {"inference_id": PICK["inference_id"], "model": "support-bot@0"},
    "POST /v1/queue/reservations": {"rater_id": "ann"},
    "POST /v1/queue/gold": {"inference_id": PICK["inference_id"], "chosen_index": 1, "reason": "the other invents a date"},
    "POST /v1/queue/gold/unanimous": {"min_raters": 3, "limit": 20, "reason": "all agreed", "dryrun": True},
    "POST /v1/queue/gold/{inference_id}/take_back": {"reason": "the policy changed: both are right"},
    "POST /v1/groups/exclude": {"filters": {"rater": "customer-7"}, "reason": "a test account", "dryrun": True},
    "POST /v1/groups/include": {"filters": {"rater": "customer-7"}, "reason": "it was a customer after all", "dryrun": True},
    "POST /v1/groups/relabel": {"filters": {"q": "refund", "label": "A"}, "label": "B", "reason": "B is right", "dryrun": True},
    "POST /v1/groups/enqueue": {"filters": {"label": "TIE"}, "reason": "another look", "dryrun": True},
    "POST /v1/groups/dequeue": {"filters": {"label": "TIE"}, "reason": "enough of them", "dryrun": True},
    "POST /v1/views": {"name": "ties", "filters": {"label": "TIE"}},
    "POST /v1/erasures": {"user": "customer-7", "reason": "asked by mail", "dryrun": True},
    "POST /v1/accounts": {"name": "ada", "role": "rate", "password": "correct horse battery staple"},
    "POST /v1/accounts/{name}": {"role": "operate"},
    "POST /v1/keys": {"name": "shop front", "scopes": ["inference", "feedback"], "requests_per_minute": 600},
    "POST /v1/fine_tuning/jobs": {
        "training_file": "file-0192f0c17d0a7b6e9f7c2f4f1f6a3b11",
        "model": "support-bot",
        "suffix": "friendly",
        "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": 1}}},
    },
}
"""One body for each route that takes JSON; a test sends them all."""

_NULLABLE = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": _NULLABLE, "code": _NULLABLE},
        }
    },
}


def install(app: FastAPI) -> None:
    """Make ``app.openapi`` give this document, computed once."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    parts = found.setdefault("components", {})
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "bearerFormat": "sk-pairloop-…"}}
    shapes = parts.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own refusals; ours look as below
        shapes.pop(name, None)
    shapes["Error"] = _ERROR
    for path, methods in found["paths"].items():
        for method, route in methods.items():
            _complete(f"{method.upper()} {path}", route)
    return found


def _complete(name: str, route: dict[str, Any]) -> None:
    responses = route["responses"]
    responses.pop("422", None)
    refused = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses["4XX"] = {"description": "What is wrong with the request, and with which parameter", "content": refused}
    scopes = scopes_of(*name.split(" ", 1))
    if scopes:
        route["security"] = [{"key": []}]
        route["x-scopes"] = ["any"] if scopes == ANY else sorted(scopes)
    content = route.get("requestBody", {}).get("content", {}).get("application/json")
    if content is not None and name in EXAMPLES:
        content["example"] = EXAMPLES[name]
