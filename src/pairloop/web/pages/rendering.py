"""What every page shares: the templates, the menu, and errors that a person can read."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.types import Scope

from pairloop import __version__
from pairloop.errors import PairloopError
from pairloop.statistics import percent
from pairloop.types import Interval
from pairloop.web.callers import LOCKED, caller_of
from pairloop.web.context import Context, context_of
from pairloop.web.errors import from_error, from_validation
from pairloop.web.pages.menu import menu

WEB = Path(__file__).parent.parent
HTML = "text/html; charset=utf-8"


class PageRoute(APIRoute):
    """A route whose errors are pages too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_as_page(request: Request) -> Response:
            try:
                return await handle(request)
            except PairloopError as error:
                refusal = from_error(error)
            except RequestValidationError as error:
                refusal = from_validation(error.errors())
            return error_page(request.scope, refusal.status_code, refusal.message)

        return handle_as_page


def error_page(scope: Scope, status: int, message: str) -> Response:
    """What went wrong, as a page."""
    request = Request(scope)
    context = context_of(request)
    return page(request, context, "error.html", title=f"Error {status}", status_code=status, message=message)


def page(request: Request, context: Context, template: str, *, title: str, status_code: int = 200, **values: Any) -> Response:
    """A page of the house: ``template`` extends base.html, which has the menu with ``request``'s page marked."""
    policy, path, caller = context.policy_name, request.url.path, caller_of(request.scope)
    return render(
        template, status_code=status_code, title=title, policy=policy, menu=menu(request), path=path, caller=caller, **values
    )


def client_values(request: Request) -> dict[str, Any]:
    """What a client that calls this server is made with, for the pages that show code: the address as the reader came by."""
    is_open = not request.scope.get(LOCKED)
    return {"base_url": str(request.base_url).rstrip("/") + "/v1", "api_key": "none" if is_open else "your key"}


def render(template: str, *, status_code: int = 200, **values: Any) -> Response:
    """A template as a response."""
    return Response(fragment(template, values), status_code=status_code, media_type=HTML)


def fragment(template: str, values: Mapping[str, Any]) -> str:
    """A template as HTML."""
    return environment().get_template(template).render(values)


@cache
def environment() -> Environment:
    """One environment for the process: escaped output, and an unknown name is an error."""
    loader = FileSystemLoader(WEB / "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "percent": percent,
        "interval": _interval,
        "between": _between,
        "clock": _clock,
        "ago": _ago,
        "duration": _duration,
        "number": _number,
        "words": _words,
        "took": _took,
    }
    environment.globals["version"] = __version__
    return environment


def _interval(interval: Interval) -> str:
    return f"{100 * interval.mean:.0f} % ({100 * interval.lo:.0f}–{100 * interval.hi:.0f})"


def _between(interval: Interval) -> str:
    return f"{100 * interval.lo:.0f}–{100 * interval.hi:.0f} %"


def _clock(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S")


def _ago(at: datetime) -> str:
    """``3 min ago``, of a time with a zone; ``in 3 min`` of one to come."""
    seconds = (datetime.now(UTC) - at).total_seconds()
    return f"{_duration(seconds)} ago" if seconds >= 0 else f"in {_duration(-seconds)}"


def _duration(seconds: float) -> str:
    """In the largest unit that it fills."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _took(seconds: float) -> str:
    """A duration to be compared with others, so with one digit more than ``_duration``."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _number(value: float) -> str:
    """Whole numbers with their thousands apart, others with three digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _words(name: str) -> str:
    return str(name).replace("_", " ")
