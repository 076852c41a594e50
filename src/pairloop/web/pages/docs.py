"""The API for people: every route, what it takes and what it is for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.staticfiles import StaticFiles

from pairloop.web.context import Here
from pairloop.web.pages.rendering import WEB, PageRoute, client_values, page

router = APIRouter(include_in_schema=False, route_class=PageRoute)


class Assets(StaticFiles):
    """Kept by browsers for a minute, then asked for by their etag."""

    def file_response(self, *args: Any, **more: Any) -> Response:
        response = super().file_response(*args, **more)
        response.headers["cache-control"] = "max-age=60"
        return response


def mount_static(app: FastAPI) -> None:
    app.mount("/static", Assets(directory=WEB / "static"), name="static")


@router.get("/docs")
async def docs(request: Request, context: Here) -> Response:
    schema = request.app.openapi()
    return page(request, context, "docs.html", title="API", sections=_sections(schema), **client_values(request))


@router.get("/favicon.ico")
async def favicon() -> Response:
    return Response(status_code=308, headers={"location": "/static/favicon.svg"})


def _sections(schema: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    sections: dict[str, list[dict[str, Any]]] = {}
    shapes = schema["components"]["schemas"]
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            content = route.get("requestBody", {}).get("content", {}).get("application/json", {})
            shape = content.get("schema", {})
            name = _reference(shape)
            known = shapes.get(name, {})
            fields = [
                {"name": field, "type": _type_words(about), "required": field in known.get("required", [])}
                for field, about in known.get("properties", {}).items()
                if about.get("type") != "null"
            ]
            entry = {"method": method.upper(), "path": path, "summary": route.get("summary", ""), "fields": fields}
            entry["query"] = [parameter["name"] for parameter in route.get("parameters", []) if parameter["in"] == "query"]
            entry["scopes"] = route.get("x-scopes", [])
            entry["example"] = json.dumps(content["example"], indent=1, ensure_ascii=False) if "example" in content else ""
            sections.setdefault(route.get("tags", ["other"])[0], []).append(entry)
    return sections


def _reference(shape: Mapping[str, Any]) -> str:
    """The name of a schema, also where it may be null."""
    options = [shape, *shape.get("anyOf", [])]
    return next((str(option["$ref"]).rsplit("/", 1)[-1] for option in options if "$ref" in option), "")


def _type_words(about: Mapping[str, Any]) -> str:
    if "anyOf" in about:
        return " or ".join(dict.fromkeys(_type_words(option) for option in about["anyOf"] if option.get("type") != "null"))
    if "enum" in about:
        return " | ".join(map(str, about["enum"]))
    if "const" in about:
        return str(about["const"])
    if about.get("type") == "array":
        return f"list of {_type_words(about.get('items', {}))}"
    return str(about.get("type") or _reference(about) or "any")
