"""The first page: two answers to pick from, the curve of versions, and the loop as it turns. Rendered here, no build step."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, FastAPI, Request, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.staticfiles import StaticFiles

from pairloop import __version__
from pairloop.types import CycleState, Interval
from pairloop.web.context import Here
from pairloop.web.curve import chart
from pairloop.web.status import STAGES, Status

HERE = Path(__file__).parent
HTML = "text/html; charset=utf-8"
VISITOR_COOKIE = "pairloop_visitor"
VISITOR_MAX_AGE_S = 365 * 24 * 3600
_VISITOR = re.compile(r"visitor-[0-9a-f]{32}")

SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

STAGE_WORDS: Mapping[str, str] = {
    "building": "pairs",
    "training": "DPO",
    "checking": "check",
    "duelling": "duel",
    "canary": "canary",
}

router = APIRouter(include_in_schema=False)


def mount_static(app: FastAPI) -> None:
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")


@router.get("/")
async def first_page(request: Request, context: Here) -> Response:
    visitor = request.cookies.get(VISITOR_COOKIE, "")
    known = _VISITOR.fullmatch(visitor) is not None
    visitor = visitor if known else f"visitor-{uuid4().hex}"
    status = await asyncio.to_thread(context.board.read)
    settings = {"visitor": visitor, "min_latency_ms": context.config.feedback.min_latency_ms}
    response = _html("page.html", status, **settings)
    if not known:
        response.set_cookie(VISITOR_COOKIE, visitor, max_age=VISITOR_MAX_AGE_S, httponly=True, samesite="strict")
    return response


@router.get("/page/live")
async def live(context: Here) -> Response:
    """The running cycle and the last verdict; the page fetches it every second."""
    return _html("_live.html", await asyncio.to_thread(context.board.read))


@router.get("/page/curve")
async def curve(context: Here) -> Response:
    """The curve and the list of cycles; fetched when their revision changed."""
    return _html("_curve.html", await asyncio.to_thread(context.board.read))


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The API for people: every route, what it takes and what it is for."""
    schema = request.app.openapi()
    return render("docs.html", title=schema["info"]["title"], sections=_sections(schema))


@router.get("/favicon.ico")
async def favicon() -> Response:
    return Response(status_code=308, headers={"location": "/static/favicon.svg"})


def render(template: str, *, status_code: int = 200, sends_forms: bool = False, **values: Any) -> Response:
    """A page; one that ``sends_forms`` may send them to this server, and to nobody else."""
    body = _environment().get_template(template).render(**values)
    headers = dict(SECURITY_HEADERS)
    if sends_forms:
        headers["content-security-policy"] = headers["content-security-policy"].replace(
            "form-action 'none'", "form-action 'self'"
        )
    return Response(body, status_code=status_code, media_type=HTML, headers=headers)


def _html(template: str, status: Status, **more: Any) -> Response:
    return render(template, **_view(status), **more)


def _view(status: Status) -> dict[str, Any]:
    return {
        "status": status,
        "now": status.now,
        "stages": _stages(status.now.state),
        "chart": chart(status.points, champion=status.now.champion),
        "points": {point.contest.challenger: point for point in status.points},
    }


def _stages(state: str) -> list[dict[str, str]]:
    """Each stage with its word and whether it is done, now or still to come."""
    stages = (*STAGES, CycleState.CANARY) if state == CycleState.CANARY else STAGES
    reached = next((position for position, stage in enumerate(stages) if stage == state), -1)
    names = []
    for position, stage in enumerate(stages):
        when = "now" if position == reached else "done" if position < reached else "todo"
        names.append({"word": STAGE_WORDS[stage.value], "when": when})
    return names


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


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _interval(interval: Interval) -> str:
    return f"{100 * interval.mean:.0f} % ({100 * interval.lo:.0f}–{100 * interval.hi:.0f})"


def _clock(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S")


def _number(value: float) -> str:
    return f"{value:.3g}"


@cache
def _environment() -> Environment:
    """One environment for the process: escaped output, and an unknown name is an error."""
    loader = FileSystemLoader(HERE / "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "interval": _interval, "clock": _clock, "number": _number}
    environment.globals["version"] = __version__
    return environment
