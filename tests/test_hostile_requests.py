"""Requests that no honest client sends, and some that honest ones do: refused by name or answered, never a 500."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from tests.server import POLICY, RunningServer, chat_body

from pairloop.store.schema import stored_replies
from pairloop.types import REDACTED_TAG, RELABELLED_TAG

Serve = Callable[..., RunningServer]
ROWS = b'{"a": 1}\n', b'{"a": 2}\n'


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("hostile") / "server") as server:
        yield server


def upload(server: RunningServer, content: bytes, **headers: str) -> httpx.Response:
    files = {"file": ("rows.jsonl", content)}
    return server.http.post("/v1/files", files=files, data={"purpose": "fine-tune"}, headers=headers)


SURROGATE = '"\\ud800"'
FUNCTION = '{"name": "f", "description": %s}'


@pytest.mark.parametrize(
    ("messages", "tools", "param"),
    [
        ('[{"role": "user", "content": "\\ud800"}]', "[]", "messages[0].content"),
        ('[{"role": "user", "content": "a\\u0000"}]', "[]", "messages[0].content"),
        (
            '[{"role": "user", "content": "a"}]',
            f'[{{"type": "function", "function": {FUNCTION % SURROGATE}}}]',
            "tools[0].function",
        ),
    ],
)
def test_what_is_no_text_is_refused_by_its_place(shared: RunningServer, messages: str, tools: str, param: str) -> None:
    body = f'{{"model": "{POLICY}", "messages": {messages}, "tools": {tools}}}'
    response = shared.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert shared.chat().status_code == 200


@pytest.mark.parametrize("name", [RELABELLED_TAG, REDACTED_TAG, "pairloop.", "pairloop.anything"])
def test_names_of_the_servers_own_are_nobody_elses(shared: RunningServer, name: str) -> None:
    """A tag that says an operator relabelled a vote must be an operator's."""
    forged = {"shop": "north", name: "account:ada"}
    group_id = shared.chat(n=2, metadata={"pairloop": "x", "my.pairloop.x": "x"}).json()["id"]
    about = {"inference_id": group_id, "tags": forged}
    value = {"metric_name": "thumbs", "value": True, "tags": forged}
    for path, field, body in (
        ("/v1/chat/completions", "metadata", chat_body(metadata=forged)),
        (f"/v1/chat/completions/{group_id}", "metadata", {"metadata": forged}),
        ("/v1/preferences", "tags", about | {"chosen_index": 0}),
        ("/v1/feedback", "tags", about | value | {"choice_index": 0}),
        ("/v1/feedback", "tags", value | {"conversation_id": group_id}),
    ):
        refused = shared.http.post(path, json=body)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, f"{field}.{name}"), (path, refused.text)
        assert "'pairloop.'" in error["message"]
    assert shared.http.get("/v1/feedback", params={"inference_id": group_id}).json()["data"] == []


def test_fields_that_clients_send_as_null_ask_for_nothing(shared: RunningServer) -> None:
    nothing = dict.fromkeys(("reasoning_effort", "audio", "prediction", "verbosity", "functions"))
    messages = [{"role": "user", "content": "Hello", "name": None}]
    assert shared.chat(messages=messages, **nothing).status_code == 200
    assert shared.chat(reasoning_effort="high").json()["error"]["param"] == "reasoning_effort"


@pytest.mark.parametrize(
    ("path", "param"),
    [("/v1/cycles/%00", "url"), ("/v1/datasets?after=%00", "after"), ("/v1/models/ft:%00", "url"), ("/v1/duels?%00=1", "url")],
)
def test_a_nul_in_the_url_is_refused(shared: RunningServer, path: str, param: str) -> None:
    response = shared.http.get(path)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("origin", ["http://[", "http://[x]"])
def test_an_origin_that_is_no_address_is_another_site(shared: RunningServer, origin: str) -> None:
    assert shared.http.get("/v1/models", headers={"origin": origin}).status_code == 403


@pytest.mark.parametrize("host", ["[::1", "[::1:8000", "[localhost", "[::1]x:80", "localhost]"])
def test_a_host_that_is_no_address_is_another_server(shared: RunningServer, host: str) -> None:
    assert shared.http.get("/home", headers={"host": host}).status_code == 421
    assert shared.http.get("/home", headers={"host": "[::1]:8000"}).status_code == 200


def test_a_long_login_form_is_not_read(shared: RunningServer) -> None:
    assert shared.http.post("/login", content=b"&a=1" * 100_000).status_code == 413
    for key in ("sk-pairloop-%00-x", "sk-pairloop-" + "8" * 3_000 + "-x"):
        assert shared.http.post("/login", content=f"key={key}", headers={"origin": shared.url}).status_code == 401


def test_many_parts_in_one_upload_are_refused(shared: RunningServer) -> None:
    files = [("file", (f"{i}.jsonl", b"{}")) for i in range(3)]
    response = shared.http.post("/v1/files", files=files, data={"purpose": "fine-tune"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"]


def test_an_upload_is_replayed_for_the_same_content_alone(shared: RunningServer) -> None:
    key = {"idempotency-key": "upload-1"}
    first, again = upload(shared, ROWS[0], **key), upload(shared, ROWS[0], **key)
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["idempotent-replayed"] == "true"
    other = upload(shared, ROWS[1], **key)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")


def test_a_large_upload_is_hashed_whatever_its_pieces(shared: RunningServer) -> None:
    key, row = {"idempotency-key": "upload-2"}, json.dumps({"a": "x" * 1_000}).encode() + b"\n"
    first = upload(shared, row * 3_000, **key)
    assert upload(shared, row * 3_000, **key).json()["id"] == first.json()["id"]
    assert upload(shared, row * 2_999 + row.replace(b"x", b"y", 1), **key).status_code == 409


def test_an_export_is_not_kept(shared: RunningServer) -> None:
    shared.http.post("/v1/datasets/none/export", headers={"idempotency-key": "export-1"})
    with shared.store.reading() as c:
        kept = c.execute(sa.select(stored_replies.c.idempotency_key)).scalars().all()
    assert "export-1" not in kept


def test_a_store_that_fails_is_a_503_that_tells_no_address(serve: Serve) -> None:
    server = serve()
    body: Any = chat_body()
    server.store.write(lambda c: c.execute(sa.text("ALTER TABLE stored_replies RENAME TO gone")))
    response = server.http.post("/v1/chat/completions", json=body, headers={"idempotency-key": "k"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "sqlite" not in response.text
    assert server.chat().status_code == 200
