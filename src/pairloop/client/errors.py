"""What goes wrong at a server's other end; each error carries the request's id, under which the server logged it."""

from __future__ import annotations

from pairloop.errors import PairloopError, SystemFailure, UserError


class ApiError(PairloopError):
    """A reply that is not a success. ``param`` names the field at fault, ``code`` is stable."""

    def __init__(
        self, message: str, *, status: int, param: str | None = None, code: str | None = None, request_id: str | None = None
    ) -> None:
        super().__init__(f"{message} ({status}, request {request_id})" if request_id else f"{message} ({status})")
        self.status = status
        self.param = param
        self.code = code
        self.request_id = request_id


class BadRequest(ApiError, UserError):
    """400, 413 and the like: the request cannot be right."""


class AccessDenied(ApiError, UserError):
    """401 or 403: no good key, or one that lacks the scope."""


class NotFound(ApiError, UserError):
    """404: an unknown id or name."""


class Conflict(ApiError, UserError):
    """409: the same id or key with another body, or a move that the state forbids."""


class RateLimited(ApiError, UserError):
    """429, after all attempts."""


class ServerError(ApiError, SystemFailure):
    """5xx, after all attempts where trying again could help."""


class Unreachable(SystemFailure):
    """No reply at all, after all attempts."""


def error_of(status: int) -> type[ApiError]:
    """The kind of error that a status stands for."""
    kinds = {401: AccessDenied, 403: AccessDenied, 404: NotFound, 409: Conflict, 429: RateLimited}
    return kinds.get(status, BadRequest if status < 500 else ServerError)
