"""Requests drawn from the OpenAPI document itself, good ones and bad ones: none is a 500, and each refusal says why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import Response
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from tests.server import RunningServer, fake_config

from pairloop.store import keys
from pairloop.web.errors import error_response

Serve = Callable[..., RunningServer]

NAMELESS = frozenset({401, 403, 404, 405, 406, 408, 409, 413, 415, 421, 422, 429})
"""Refusals that may be about no single parameter; a 400 names one."""


@pytest.fixture
def server(serve: Serve, tmp_path: Path) -> RunningServer:
    return serve(config=fake_config(tmp_path / "state", serve={"max_tokens": 8}))


def operations(document: dict[str, Any]) -> Iterator[Any]:
    schema = schemathesis.openapi.from_dict(document)
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result
        yield result.ok()


def fuzz(server: RunningServer, examples: int, paths: Collection[str] = ()) -> Counter[int]:
    """``examples`` requests per operation (of ``paths``), in part such as the document forbids; the statuses that came back."""
    document = server.http.get("/openapi.json").json()
    del document["components"]["securitySchemes"]  # else it draws keys, too, and is told 401
    for methods in document["paths"].values():
        for route in methods.values():
            route.pop("security", None)
    if paths:
        document["paths"] = {path: document["paths"][path] for path in paths}
    key, token = keys.new("fuzz", [keys.Scope.ADMIN])  # one that a drawn request makes would lock the others out
    server.store.write(lambda c: keys.insert(c, key))
    admin = {"authorization": f"Bearer {token}"}
    statuses: Counter[int] = Counter()
    for operation in operations(document):
        cases = st.one_of(operation.as_strategy(GenerationMode.POSITIVE), operation.as_strategy(GenerationMode.NEGATIVE))

        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases)
        def call(case: Any) -> None:
            response = case.call(base_url=server.url, timeout=20, headers=admin)
            statuses[response.status_code] += 1
            check(response, case)

        call()
        assert server.http.get("/health").status_code == 200
    return statuses


def check(response: Any, case: Any) -> None:
    """No 500; every refusal has all four keys and a request id, and a 400 names what is wrong."""
    asked = f"{case.method} {case.formatted_path} {case.query!r} {case.body!r} → {response.status_code} {response.text[:500]}"
    assert response.status_code < 500, asked
    if response.status_code < 400:
        return
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, asked
    assert error["message"], asked
    assert error["code"], asked
    assert response.headers["x-request-id"][0].startswith("req_"), asked
    assert error["param"] is not None or response.status_code in NAMELESS, asked


def test_no_request_that_the_document_knows_is_a_500(server: RunningServer) -> None:
    statuses = fuzz(server, 5, ("/v1/chat/completions", "/v1/preferences", "/v1/versions", "/v1/keys/{key_id}"))
    assert sum(count for status, count in statuses.items() if 400 <= status < 500) > 10
    assert sum(count for status, count in statuses.items() if status < 300) > 3


def test_the_documents_examples_are_taken(server: RunningServer) -> None:
    """Every route that takes JSON shows a body, and none of these is refused for its form."""
    key, token = keys.new("root", [keys.Scope.ADMIN])  # the examples make keys and accounts: from then on others are asked
    server.store.write(lambda c: keys.insert(c, key))
    server.http.headers["authorization"] = f"Bearer {token}"
    document = server.http.get("/openapi.json").json()
    group_id = server.chat(n=2).json()["id"]
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            content = route.get("requestBody", {}).get("content", {}).get("application/json")
            if content is None:
                continue
            body = {key: group_id if key == "inference_id" else value for key, value in content["example"].items()}
            response = server.http.request(method, path, json=body)
            assert response.status_code < 300 or response.status_code in (404, 409), (method, path, response.text)
            if "{" not in path and path != "/v1/fine_tuning/jobs":
                assert response.status_code < 300, (method, path, response.text)


@pytest.mark.slow
def test_no_request_that_the_document_knows_is_a_500_at_length(server: RunningServer) -> None:
    statuses = fuzz(server, examples=100)
    print(f"{statuses.total()} requests: {dict(sorted(statuses.items()))}")
    assert statuses[401] == 0


def test_a_500_and_a_nameless_refusal_are_found(serve: Serve) -> None:
    """The check itself: a route with a bug in it, and one that does not say what was wrong with a request."""
    server = serve()

    @server.app.post("/v1/status/bug", summary="planted")
    async def bug(number: int) -> float:
        return 1 / (number * 0)

    @server.app.get("/v1/status/mute", summary="planted", response_model=None)
    async def mute(number: int) -> Response:
        return error_response(400, f"no {number}")

    server.app.openapi_schema = None
    document = server.http.get("/openapi.json").json()
    for path in ("/v1/status/bug", "/v1/status/mute"):
        (operation,) = operations({**document, "paths": {path: document["paths"][path]}})
        case = operation.Case(query={"number": 1})
        with pytest.raises(AssertionError):
            check(case.call(base_url=server.url), case)
