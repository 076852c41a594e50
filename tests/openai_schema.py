"""Bodies checked against OpenAI's published description, where the test data is there."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

DATA = Path(os.environ.get("PAIRLOOP_TEST_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data").resolve()
OPENAPI = DATA / "openai_openapi" / "openapi.json"


def validate(name: str, body: Any) -> None:
    """jsonschema.ValidationError where ``body`` is not what the component ``name`` describes; skips without the data."""
    if not OPENAPI.exists():
        pytest.skip(f"{OPENAPI} is absent; PAIRLOOP_TEST_DATA names the folder")
    schema = {"$ref": f"#/components/schemas/{name}", "components": _openapi()["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)


@cache
def _openapi() -> dict[str, Any]:
    """OpenAI's description, with OpenAPI 3.0's ``nullable`` (of which some is left in it) said in JSON Schema's words."""
    document: dict[str, Any] = json.loads(OPENAPI.read_text(encoding="utf-8"), object_hook=_nullable)
    return document


def _nullable(node: dict[str, Any]) -> dict[str, Any]:
    if node.pop("nullable", False) is True:
        return {"anyOf": [node, {"type": "null"}]}
    return node
