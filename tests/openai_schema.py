"""OpenAI's own schema: checks a response's body against what their document says about its method and path."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import jsonschema  # type: ignore[import-untyped]
import pytest

DATA = Path(os.environ.get("PAIRLOOP_TEST_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data").resolve()
DOCUMENT = DATA / "openai_openapi" / "openapi.json"
COMPONENTS = "#/components/schemas/"


def check(response: httpx.Response) -> None:
    """An httpx response hook: the body of a 200 under ``/v1`` is what OpenAI's document says; event streams are left alone."""
    path = response.request.url.path.removeprefix("/v1")
    name = _schema_of(response.request.method.lower(), path)
    if name is None or response.status_code != 200 or response.headers["content-type"].startswith("text/event-stream"):
        return
    response.read()
    validate(name, response.json())


def validate(name: str, body: Any) -> None:
    """jsonschema.ValidationError where ``body`` is not a component ``name`` of the document; skips where that is absent."""
    _validator(name).validate(body)


@cache
def _validator(name: str) -> Any:
    return jsonschema.Draft202012Validator({"$ref": f"{COMPONENTS}{name}", "components": _document()["components"]})


def _schema_of(method: str, path: str) -> str | None:
    """The component that the document promises as the JSON body; None where it knows no such path, or promises no JSON."""
    for template, operations in _document()["paths"].items():
        if method in operations and re.fullmatch(re.sub(r"\{[^}]+\}", "[^/]+", template), path):
            content = operations[method]["responses"].get("200", {}).get("content", {})
            found: str = content.get("application/json", {}).get("schema", {}).get("$ref", "")
            return found.removeprefix(COMPONENTS) or None
    return None


@cache
def _document() -> dict[str, Any]:
    if not DOCUMENT.exists():
        pytest.skip(f"{DOCUMENT} is absent; PAIRLOOP_TEST_DATA names the folder")
    document: dict[str, Any] = json.loads(DOCUMENT.read_text(encoding="utf-8"), object_hook=_nullable)
    return document


def _nullable(node: dict[str, Any]) -> dict[str, Any]:
    if node.get("exclusiveMinimum") is True:  # OpenAPI 3.0's words for what JSON Schema says by the number itself
        node["exclusiveMinimum"] = node.pop("minimum")
    if node.pop("nullable", False) is True:
        return {"anyOf": [node, {"type": "null"}]}
    return node
