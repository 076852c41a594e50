"""Every error leaves as ``{"error": {message, type, param, code}}``, all four keys, whatever went wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from pairloop.errors import (
    BrokenVersionError,
    BusyError,
    ConflictError,
    EngineError,
    InvalidRequestError,
    NotFoundError,
    PairloopError,
    StoreBusyError,
    StoreError,
    UserError,
)

ErrorPage = Callable[[Scope, int, str], Response]

logger = logging.getLogger(__name__)

STORE_DOWN = "The store cannot be used at the moment; the server's log says why. Nothing was changed; try again."
STORE_BUSY = "Too many writes wait for the database at the moment. Nothing of this one was stored; try again."
INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
UNREADABLE = "There was an error parsing the body"
"""What FastAPI says of a body that it could not read, for whatever reason."""
RETRY_AFTER_S = "1"
ERROR_CODE = "pairloop.error_code"
"""Where the scope of a request holds the code of its error."""
UNION_MEMBERS = frozenset({"bool", "float", "int", "str"})
"""What pydantic appends to a field's place where several types were tried."""

_STATUS: tuple[tuple[type[PairloopError], int], ...] = (
    (NotFoundError, 404),
    (ConflictError, 409),
    (InvalidRequestError, 400),
    (EngineError, 503),
    (StoreError, 503),
    (BusyError, 503),
    (UserError, 400),
)
_CODES = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "request_too_large",
    408: "request_timeout",
}
_SHOULD_RETRY = {408: "true", 409: "false", 429: "true", 503: "true"}
"""What the official clients obey; left to themselves they would send a conflict again, in vain."""


class ErrorResponse(Response):
    """A reply that leaves its code in the scope, for whoever counts errors; ``message`` is for people."""

    def __init__(self, body: Mapping[str, Any], status: int, headers: Mapping[str, str]) -> None:
        super().__init__(json.dumps(body), status_code=status, media_type="application/json", headers=dict(headers))
        self.code, self.message = str(body["error"]["code"]), str(body["error"]["message"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[ERROR_CODE] = self.code
        await super().__call__(scope, receive, send)


def error_body(
    message: str, *, kind: str = INVALID_REQUEST, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    kind: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> ErrorResponse:
    """The reply to what went wrong; 503 carries retry-after, and what a client may try again, or should not, says so."""
    body = error_body(
        message,
        kind=kind or (INVALID_REQUEST if status < 500 else SERVER_ERROR),
        param=param,
        code=code or _CODES.get(status),
    )
    sent = {"x-should-retry": _SHOULD_RETRY[status]} if status in _SHOULD_RETRY else {}
    sent |= {"retry-after": RETRY_AFTER_S} if status == 503 else {}
    return ErrorResponse(body, status, sent | dict(headers or {}))


def from_error(error: PairloopError) -> ErrorResponse:
    """The reply to an error of ours."""
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    param = getattr(error, "param", None)
    code = getattr(error, "code", None)
    if isinstance(error, NotFoundError) and param == "model":
        code = "model_not_found"
    if isinstance(error, EngineError):
        code = "engine_unavailable"
    if isinstance(error, StoreBusyError):
        return error_response(status, STORE_BUSY, code="store_busy")
    if isinstance(error, StoreError):
        logger.error("the store failed a request: %s", error)  # with paths and addresses, which are nobody else's business
        return error_response(status, STORE_DOWN, code="store_unavailable")
    if isinstance(error, BrokenVersionError):
        logger.error("%s", error)
        return error_response(status, str(error), code=code, headers={"x-should-retry": "false"})  # it stays broken until then
    return error_response(status, str(error), param=param, code=code)


def install(app: FastAPI, error_page: ErrorPage) -> None:
    """Register the handlers of everything that a route may raise; ``error_page`` is for people who mistyped an address."""

    @app.exception_handler(PairloopError)
    async def ours(_request: Request, error: PairloopError) -> Response:
        return from_error(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        return from_validation(error.errors())

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = error.detail
        if error.status_code == 400 and message == UNREADABLE:
            text = "We could not parse the JSON body of your request: it is not UTF-8, or broken off."
            return error_response(400, text, param="body", code="invalid_json")
        if error.status_code == 404 and message == "Not Found":
            if is_for_a_person(request.scope):
                return error_page(request.scope, 404, f"There is no page {request.url.path} here.")
            message = f"Invalid URL ({request.method} {request.url.path})"
        if error.status_code == 405:
            message = f"Not allowed to {request.method} on {request.url.path}"
        param = "body" if error.status_code == 400 else None  # no route of ours raises it: a form that could not be read
        return error_response(error.status_code, message, param=param, headers=error.headers)


def is_for_a_person(scope: Scope) -> bool:
    """Whether a browser asks for a page: programs take JSON, and /v1 is theirs whatever they accept."""
    could_be = scope["method"] in ("GET", "HEAD") and not scope["path"].startswith("/v1")
    return could_be and "text/html" in Headers(scope=scope).get("accept", "")


def from_validation(problems: Sequence[Mapping[str, Any]]) -> ErrorResponse:
    """400 for the first problem that pydantic found, its field named the way OpenAI does: ``messages[0].content``."""
    problem = problems[0]
    kind = str(problem["type"])
    place = [part for part in problem["loc"] if part not in ("body", "query", "path", "header")]
    if kind == "json_invalid":
        reason = problem.get("ctx", {}).get("error", "")
        text = f"We could not parse the JSON body of your request: {reason}"
        return error_response(400, text, param="body", code="invalid_json")
    param = ".".join(filter(None, (_param(place), problem.get("ctx", {}).get("param")))) or None
    return error_response(400, _sentence(kind, param, str(problem["msg"])), param=param or "body", code=_code(kind))


def _param(place: Sequence[Any]) -> str | None:
    name = ""
    for part in place:
        if part in UNION_MEMBERS or str(part).startswith(("list[", "constrained-")):
            break
        if isinstance(part, int):
            name += f"[{part}]"
        elif part != "[key]":
            name += f".{part}" if name else str(part)
    return name or None


def _sentence(kind: str, param: str | None, message: str) -> str:
    if param is None:
        return f"Invalid body: {message}. Send a JSON object with content-type application/json."
    if kind == "extra_forbidden":
        return f"Unsupported parameter: '{param}' is not supported by this server."
    if kind == "missing":
        return f"Missing required parameter: '{param}'."
    return f"Invalid value for '{param}': {message.removeprefix('Value error, ')}."


def _code(kind: str) -> str:
    if kind == "extra_forbidden":
        return "unsupported_parameter"
    if kind == "missing":
        return "missing_required_parameter"
    return "invalid_type" if kind.endswith("_type") else "invalid_value"
