"""Requests that are tried again where that can help: with back-off, and with one idempotency key for all attempts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

import httpx

from pairloop.client.errors import Unreachable, error_of

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0
LONGEST_RETRY_AFTER_S = 60.0
RETRIED = frozenset({408, 429, 502, 503, 504})


class Transport:
    """One connection pool to one server; ``sleep`` waits between attempts."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        *,
        timeout_s: float,
        retries: int,
        sleep: Callable[[float], None] = time.sleep,
        http: httpx.Client | None = None,
    ) -> None:
        self._base_url = base_url.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s
        self._http = http or httpx.Client(timeout=timeout_s)
        self._retries = retries
        self._sleep = sleep

    def call(
        self, method: str, path: str, *, params: Mapping[str, Any] | None = None, json: Any = None, keyed: bool = True
    ) -> httpx.Response:
        """The reply of a request that succeeded; ApiError or Unreachable otherwise.

        ``keyed``: a POST gets an Idempotency-Key; without one it is not sent again where no reply came.
        """
        headers = dict(self._headers)
        if method == "POST" and keyed:
            headers["idempotency-key"] = str(uuid4())
        for attempt in range(self._retries + 1):
            last = attempt == self._retries
            sent = headers | ({"x-stainless-retry-count": str(attempt)} if attempt else {})
            try:
                reply = self._http.request(
                    method, f"{self._base_url}{path}", params=_given(params), json=json, headers=sent, timeout=self._timeout_s
                )
            except httpx.TransportError as error:
                if last or (method == "POST" and not keyed):
                    raise Unreachable(f"{self._base_url} did not answer: {error or type(error).__name__}") from error
                self._sleep(_wait_s(attempt, None))
                continue
            if reply.is_success:
                return reply
            if last or not _may_retry(reply):
                raise _error(reply)
            self._sleep(_wait_s(attempt, reply.headers.get("retry-after")))
        raise AssertionError("unreachable")

    def close(self) -> None:
        self._http.close()


def _given(params: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (params or {}).items() if value is not None}


def _may_retry(reply: httpx.Response) -> bool:
    """As the server says where it does."""
    said = reply.headers.get("x-should-retry")
    return reply.status_code in RETRIED if said is None else said == "true"


def _wait_s(attempt: int, retry_after: str | None) -> float:
    """What the server asked for, within reason; else twice as long each time, and not all clients at once."""
    try:
        asked = float(retry_after) if retry_after is not None else -1.0
    except ValueError:
        asked = -1.0
    if 0 <= asked <= LONGEST_RETRY_AFTER_S:
        return asked
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0**attempt) * random.uniform(0.75, 1.0)


def _error(reply: httpx.Response) -> Exception:
    try:
        told = reply.json()["error"]
        message, param, code = str(told["message"]), told.get("param"), told.get("code")
    except (ValueError, KeyError, TypeError):
        message, param, code = reply.text[:500] or reply.reason_phrase, None, None
    request_id = reply.headers.get("x-request-id")
    return error_of(reply.status_code)(message, status=reply.status_code, param=param, code=code, request_id=request_id)
