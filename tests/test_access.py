"""Who may come in: keys and their scopes, requests per minute, other hosts and sites, the page's door."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest
from fastapi import APIRouter
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event
from tests.server import POLICY, RunningServer, chat_body, fake_config, user_of
from tests.stores import database_of
from tests.waiting import until

from pairloop.config import child_env, parse_config
from pairloop.errors import ConfigError, InvalidRequestError
from pairloop.scaffold import write_config
from pairloop.store import Store, keys
from pairloop.store.accounts import SCOPES_OF, Role
from pairloop.store.keys import Scope
from pairloop.types import Pool
from pairloop.web import keyring
from pairloop.web.limits import Buckets
from pairloop.web.scopes import scopes_of, undeclared
from pairloop.web.server import run

Serve = Callable[..., RunningServer]


def make_key(server: RunningServer, scopes: Collection[Scope] = (Scope.ADMIN,), **fields: Any) -> str:
    """A token of a key with these scopes, made beside the server as the command line does."""
    key, token = keys.new("test", scopes, **fields)
    server.store.write(lambda c: keys.insert(c, key))
    return token


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def id_of(token: str) -> str:
    parts = keys.split(token)
    assert parts is not None
    return parts[0]


@pytest.fixture
def locked(serve: Serve) -> tuple[RunningServer, str]:
    """A server with a key of all scopes, which it knows of."""
    server = serve()
    token = make_key(server)
    server.app.state.context.keys.forget(id_of(token))
    return server, token


# --- scopes


def test_every_route_says_which_scope_opens_it_and_a_new_one_that_does_not_is_found() -> None:
    router = APIRouter()

    @router.post("/v1/forgotten")
    async def forgotten() -> None: ...

    @router.get("/v1/cycles/{cycle_id}/more")
    async def covered() -> None: ...

    assert undeclared(router.routes) == ["POST /v1/forgotten"]
    assert scopes_of("PUT", "/v1/keys") == frozenset(Scope)  # no such route; a key is asked for all the same
    for path in ("/v1/files", "/v1/files/file-1/content", "/v1/fine_tuning/jobs/ftjob-1/events"):
        assert scopes_of("GET", path) == {Scope.TRAIN}
    assert scopes_of("GET", "/v1/chat/completions") == scopes_of("DELETE", "/v1/chat/completions/x") == {Scope.OPERATE}
    assert scopes_of("POST", "/v1/chat/completions") == {Scope.INFERENCE, Scope.RATE}
    assert scopes_of("GET", "/v1/chat/completions/x") == scopes_of("POST", "/v1/chat/completions/x") == {Scope.INFERENCE}
    assert scopes_of("GET", "/versionless") == frozenset(Scope)  # /version is open, what only begins like it is not


@pytest.mark.parametrize("scope", list(Scope))
def test_each_scope_opens_its_own_routes_and_no_others(locked: tuple[RunningServer, str], scope: Scope) -> None:
    server, admin = locked
    token = make_key(server, [scope])
    paths = server.http.get("/openapi.json").json()["paths"]
    for path, methods in paths.items():
        for method in methods:
            url = path.replace("{", "").replace("}", "")
            response = server.http.request(method, url, headers=bearer(token), json={"nothing": "that is taken"})
            wanted = scopes_of(method.upper(), url)
            refused = bool(wanted) and scope is not Scope.ADMIN and scope not in wanted
            assert (response.status_code == 403) == refused, (scope, method, path, response.text)
            assert response.status_code not in (401, 500), (scope, method, path, response.text)
            if refused:
                error = response.json()["error"]
                assert error["code"] == "insufficient_scope"
                assert any(repr(str(name)) in error["message"] for name in wanted)
            without = server.http.request(method, url)
            assert (without.status_code == 401) == bool(wanted), (method, path)
    assert server.http.get("/v1/keys", headers=bearer(admin)).status_code == 200


# --- keys


def test_without_keys_any_authorization_is_accepted(serve: Serve) -> None:
    server = serve()
    for value in ("Bearer none", "Bearer sk-pairloop-a-b", "Basic eDp5", "nonsense"):
        assert server.http.get("/v1/models", headers={"authorization": value}).status_code == 200


def test_once_there_is_a_key_every_v1_route_needs_one(locked: tuple[RunningServer, str]) -> None:
    server, token = locked
    revoked, expired = make_key(server), make_key(server, expires_at=datetime.now(UTC) + timedelta(milliseconds=1))
    server.store.write(lambda c: keys.revoke(c, id_of(revoked), datetime.now(UTC), actor="test", reason="test"))
    wrong = f"{token[:-4]}{'0' * 4 if token[-4:] != '0' * 4 else '1' * 4}"
    for value, reason in (
        (None, "needs an API key"),
        ("Basic eDp5", "needs an API key"),
        ("Bearer none", "does not look like"),
        (f"Bearer {wrong}", "is not known"),
        ("Bearer sk-pairloop-0123-4567", "does not look like"),
        (f"Bearer sk-pairloop-{'0' * 16}-{'1' * 64}", "is not known"),
        (f"Bearer {revoked}", "was revoked"),
        (f"Bearer {expired}", "has expired"),
    ):
        response = server.http.get("/v1/models", headers={"authorization": value} if value else {})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (401, "invalid_api_key"), value
        assert reason in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
        assert response.headers["www-authenticate"].startswith("Bearer")
        assert response.headers["x-request-id"].startswith("req_")
        assert value is None or value.split("-")[-1] not in response.text
    assert server.http.get("/v1/models", headers=bearer(token)).status_code == 200
    assert server.openai.with_options(api_key=token).models.list().data[0].id == POLICY
    assert server.http.get("/health/ready").status_code == server.http.get("/docs").status_code == 200
    assert server.http.get("/v1/nowhere", headers=bearer(token)).status_code == 404


def test_keys_are_made_shown_once_listed_and_revoked_at_once_over_http(serve: Serve) -> None:
    server = serve()
    made = server.http.post("/v1/keys", json={"name": "root", "scopes": ["admin"]})
    assert made.status_code == 201, made.text
    admin = bearer(made.json()["token"])
    assert server.http.get("/v1/keys").status_code == 401
    body = {"name": "shop", "scopes": ["feedback", "inference"], "expires_at": 4_000_000_000, "requests_per_minute": 60}
    shop = server.http.post("/v1/keys", json=body, headers=admin).json()
    assert server.http.get("/v1/models", headers=bearer(shop["token"])).status_code == 200
    assert server.http.post("/v1/cycles", headers=bearer(shop["token"])).status_code == 403
    listed = server.http.get("/v1/keys", headers=admin)
    assert [key["id"] for key in listed.json()["data"]] == [shop["id"], made.json()["id"]]
    assert shop["token"].rsplit("-", 1)[1] not in listed.text
    assert "hash" not in listed.text
    first = server.http.get("/v1/keys", params={"limit": 1}, headers=admin).json()
    second = server.http.get("/v1/keys", params={"limit": 1, "after": first["last_id"]}, headers=admin).json()
    assert (first["has_more"], second["has_more"], second["last_id"]) == (True, False, made.json()["id"])
    assert server.http.get(f"/v1/keys/{shop['id']}", headers=admin).json()["scopes"] == ["feedback", "inference"]
    assert server.http.delete(f"/v1/keys/{shop['id']}", headers=admin).json()["revoked_at"] is not None
    assert server.http.get("/v1/models", headers=bearer(shop["token"])).status_code == 401
    assert server.http.delete("/v1/keys/nobody", headers=admin).status_code == 404
    for fields, param in (
        ({"name": ""}, "name"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["all"]}, "scopes[0]"),
        ({"expires_at": 1}, "expires_at"),
        ({"requests_per_minute": -1}, "requests_per_minute"),
    ):
        response = server.http.post("/v1/keys", json={**body, **fields}, headers=admin)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_a_revoked_last_key_does_not_open_the_server_again(locked: tuple[RunningServer, str]) -> None:
    server, token = locked
    assert server.http.delete(f"/v1/keys/{id_of(token)}", headers=bearer(token)).status_code == 200
    assert server.http.get("/v1/models").status_code == 401


def test_keys_of_another_process_are_seen_soon(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "FRESH_S", 0.02)
    server = serve()
    assert server.http.get("/v1/models").status_code == 200
    token = make_key(server)
    until(lambda: server.http.get("/v1/models").status_code == 401)
    assert server.http.get("/v1/models", headers=bearer(token)).status_code == 200
    server.store.write(lambda c: keys.revoke(c, id_of(token), datetime.now(UTC), actor="test", reason="test"))
    until(lambda: server.http.get("/v1/models", headers=bearer(token)).status_code == 401)


def test_a_request_reads_no_key_from_the_store_and_writes_none(locked: tuple[RunningServer, str]) -> None:
    server, token = locked
    assert server.http.get("/v1/models", headers=bearer(token)).status_code == 200
    server.store.write(lambda _: None)  # nobody waited for the note of its use
    used_at = server.http.get(f"/v1/keys/{id_of(token)}", headers=bearer(token)).json()["last_used_at"]
    assert used_at is not None
    said, begun = list[str](), monotonic()
    for engine in (server.store._reading, server.store._writing):
        event.listen(engine, "before_cursor_execute", lambda _c, _cursor, sql, *_rest: said.append(sql))
    for _ in range(30):
        assert server.http.get("/v1/models", headers=bearer(token)).status_code == 200
    assert len(said) >= 30  # the models themselves are read
    assert sum("FROM keys" in sql for sql in said) <= 1 + (monotonic() - begun) / keyring.FRESH_S
    assert not any("UPDATE keys" in sql for sql in said)


@pytest.mark.sqlite("what its file holds")
def test_only_a_hash_of_the_secret_is_stored(tmp_path: Path) -> None:
    key, token = keys.new("mine", [Scope.TRAIN])
    secret = token.rsplit("-", 1)[1]
    with Store.open(parse_config({"state_dir": tmp_path})) as store:
        store.write(lambda c: keys.insert(c, key))
        with store.reading() as c:
            assert keys.get(c, key.key_id) == key
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(secret.encode() in path.read_bytes() for path in files)
    assert any(keys.hash_of(secret).encode() in path.read_bytes() for path in files)
    assert keys.hash_of(secret) not in repr(key)
    assert len(secret) == 64
    for name, scopes in (("", [Scope.TRAIN]), ("x" * 129, [Scope.TRAIN]), ("x", [])):
        with pytest.raises(InvalidRequestError):
            keys.new(name, scopes)


# --- requests per minute


@given(st.integers(1, 600), st.lists(st.floats(0.0, 30.0), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_minute_lets_in_more_than_two_buckets_and_a_quiet_caller_is_never_refused(
    per_minute: int, pauses: list[float]
) -> None:
    clock = [0.0]
    buckets = Buckets(lambda: clock[0])
    let_in: list[float] = []
    for pause in pauses:
        clock[0] += pause
        taken = buckets.take("one", per_minute)
        assert 0 <= taken.remaining <= per_minute
        if not taken.retry_s:
            let_in.append(clock[0])
        else:
            clock[0] += taken.retry_s
            assert not buckets.take("one", per_minute).retry_s, "what it said was not enough"
            let_in.append(clock[0])
        assert not buckets.take(f"other-{clock[0]}", per_minute).retry_s
    for start in let_in:
        assert sum(start <= at < start + 60 for at in let_in) <= 2 * per_minute


def test_requests_beyond_the_limit_are_told_when_to_come_again(serve: Serve, tmp_path: Path) -> None:
    server = serve(config=fake_config(tmp_path / "state", serve={"requests_per_minute": 3}))
    replies = [server.http.get("/v1/models") for _ in range(4)]
    assert [reply.status_code for reply in replies] == [200, 200, 200, 429]
    assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["2", "1", "0", "0"]
    refused = replies[-1]
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert (refused.headers["x-should-retry"], refused.headers["x-ratelimit-limit-requests"]) == ("true", "3")
    assert refused.json()["error"] == {
        "message": refused.json()["error"]["message"],
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert server.http.get("/health").status_code == 200
    token = make_key(server, requests_per_minute=0)
    server.app.state.context.keys.forget(id_of(token))
    assert {server.http.get("/v1/models", headers=bearer(token)).status_code for _ in range(5)} == {200}
    slow = make_key(server, requests_per_minute=1)
    assert [server.http.get("/v1/models", headers=bearer(slow)).status_code for _ in range(2)] == [200, 429]
    guesses = [server.http.get("/v1/models", headers=bearer(f"sk-pairloop-{n}-x")).status_code for n in range(5)]
    assert guesses[-1] == 429  # whoever guesses keys runs into the limit of its address


def test_a_body_that_does_not_come_is_not_waited_for(serve: Serve, tmp_path: Path) -> None:
    server = serve(config=fake_config(tmp_path / "state", serve={"body_timeout": "0.5s"}))
    url = httpx.URL(server.url)
    for extra in (b"", b"idempotency-key: one\r\n"):
        with socket.create_connection((url.host, url.port or 80), timeout=10) as client:
            head = b"POST /v1/feedback HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 50\r\n"
            client.sendall(head + extra + b'\r\n{"inference_id": ')
            reply = b""
            while piece := client.recv(4096):
                reply += piece
            assert b" 408 " in reply.split(b"\r\n", 1)[0], reply
            assert b'"request_timeout"' in reply
    assert server.chat().status_code == 200


# --- other hosts and sites


@pytest.mark.parametrize("serving", [{"host": "0.0.0.0"}, {"host": "::"}, {"allowed_hosts": ["llm.example"]}])
def test_a_server_without_keys_does_not_open_itself_to_others(tmp_path: Path, serving: dict[str, Any]) -> None:
    config = fake_config(tmp_path, serve={"port": 0, **serving}, schedule={"enabled": False})
    with pytest.raises(ConfigError, match="pairloop keys create"):
        run(config)


SERVE = """
import sys
from pathlib import Path
from pairloop.cli import pairloop
pairloop(["serve", "--config", sys.argv[1], "--host", "0.0.0.0", "--port", "0", "--no-scheduler"])
"""


def test_with_a_key_made_on_the_command_line_other_hosts_are_served(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from pairloop.cli import pairloop

    serve = {"allowed_hosts": ["llm.example"]}
    write_config(tmp_path, {"policy": {"model": "fake", "method": "full"}, "serve": serve, "store": database_of(tmp_path)})
    made = CliRunner().invoke(pairloop, ["keys", "create", "--config", str(tmp_path), "--scope", "inference", "--name", "one"])
    assert made.exit_code == 0, made.output
    token = made.output.split()[0]
    command = [sys.executable, "-u", "-c", SERVE, str(tmp_path)]
    env, log = child_env(PAIRLOOP_LOG_FORMAT="json", PAIRLOOP_SERVE_PROT="1"), (tmp_path / "log").open("w")
    with log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip().rsplit(":", 1)[1]
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20.0, trust_env=False) as http:
                for host, status in (("192.0.2.7:80", 200), ("llm.example", 200), ("evil.example", 421)):
                    assert http.get("/v1/models", headers=bearer(token) | {"host": host}).status_code == status, host
                assert http.get("/v1/models").status_code == 401
        finally:
            process.terminate()
            process.wait(20)
    assert "PAIRLOOP_SERVE_PROT" in json.loads((tmp_path / "log").read_text().splitlines()[0])["message"]
    listed = CliRunner().invoke(pairloop, ["keys", "list", "--config", str(tmp_path)])
    assert "one" in listed.output
    assert token.rsplit("-", 1)[1] not in listed.output
    revoked = CliRunner().invoke(pairloop, ["keys", "revoke", id_of(token), "--config", str(tmp_path)])
    assert revoked.exit_code == 0, revoked.output
    assert "revoked" in CliRunner().invoke(pairloop, ["keys", "list", "--config", str(tmp_path)]).output
    bad = CliRunner().invoke(pairloop, ["keys", "create", "--config", str(tmp_path), "--expires", "soon"])
    assert (bad.exit_code, "not a duration" in bad.output) == (2, True)


def test_pages_of_the_configured_origins_may_call_and_no_others(serve: Serve, tmp_path: Path) -> None:
    shop = "https://shop.example"
    server = serve(config=fake_config(tmp_path / "state", serve={"allowed_origins": [shop]}))
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    preflight = server.http.options("/v1/preferences", headers={"origin": shop, **asked})
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, shop)
    assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
    for status, body in ((200, chat_body()), (400, {"model": 3})):
        reply = server.http.post("/v1/chat/completions", json=body, headers={"origin": shop})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, shop)
        assert "x-request-id" in reply.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in reply.headers
    for origin in ("https://evil.example", "https://shop.example.evil.example", "http://shop.example", "null"):
        assert server.http.post("/v1/cycles", headers={"origin": origin}).status_code == 403
    token = make_key(server)
    server.app.state.context.keys.forget(id_of(token))
    refused = server.http.post("/v1/cycles", headers={"origin": shop})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, shop)


def test_no_page_of_another_site_may_call_by_default(serve: Serve) -> None:
    reply = serve().http.options(
        "/v1/cycles", headers={"origin": "https://shop.example", "access-control-request-method": "POST"}
    )
    assert reply.status_code == 403
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("origin", ["shop.example", "https://shop.example/", "https://shop.example/page", "*", "ftp://a"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match=r"serve\.allowed_origins"):
        parse_config({"serve": {"allowed_origins": [origin]}})


# --- the page


def test_the_page_asks_for_a_key_and_keeps_a_session_in_a_cookie(locked: tuple[RunningServer, str]) -> None:
    server, token = locked
    own = {"origin": server.url}
    with httpx.Client(base_url=server.url, timeout=20.0, trust_env=False) as browser:
        asked = browser.get("/")
        assert (asked.status_code, asked.headers["location"]) == (303, "/login")
        assert browser.get("/page/live").status_code == browser.get("/metrics").status_code == 401
        form = browser.get("/login")
        assert form.status_code == 200
        assert "form-action 'self'" in form.headers["content-security-policy"]
        bad = browser.post("/login", data={"key": "<b>"}, headers=own)
        assert bad.status_code == 401
        assert "does not look like" in bad.text
        assert not browser.cookies
        assert browser.post("/login", data={"key": token}, headers={"origin": "https://evil.example"}).status_code == 403
        good = browser.post("/login", data={"key": token}, headers=own)
        assert (good.status_code, good.headers["location"]) == (303, "/")
        assert browser.get("/").status_code == browser.get("/page/live").status_code == 200
        assert browser.post("/v1/chat/completions", json=chat_body(n=2), headers=own).status_code == 200
        server.store.write(lambda c: keys.revoke(c, id_of(token), datetime.now(UTC), actor="test", reason="test"))
        server.app.state.context.keys.forget(id_of(token))
        assert browser.get("/page/live").status_code == 401


def test_the_cookie_does_not_count_for_another_site(serve: Serve, tmp_path: Path) -> None:
    shop = "https://shop.example"
    server = serve(config=fake_config(tmp_path / "state", serve={"allowed_origins": [shop]}))
    token = make_key(server)
    server.app.state.context.keys.forget(id_of(token))
    assert server.http.post("/login", data={"key": token}, headers={"origin": server.url}).status_code == 303
    assert server.http.post("/v1/cycles", headers={"origin": server.url}).status_code == 202
    assert server.http.post("/v1/cycles", headers={"origin": shop}).status_code == 401


# --- headers


def test_what_a_reply_cost_is_told_unless_it_would_unblind_a_duel(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve()
    caplog.set_level("INFO", "pairloop.web.middleware")
    trace = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "x-stainless-retry-count": "2"}
    for stream in (False, True):
        plain = server.http.post("/v1/chat/completions", json=chat_body(stream=stream), headers=trace)
        assert 0 <= float(plain.headers["x-pairloop-overhead-ms"]) <= 1 + float(plain.headers["openai-processing-ms"])
        assert plain.headers["x-pairloop-model-version"] == f"{POLICY}@0"
    assert any(record.__dict__["fields"]["trace_id"] == "ab" * 16 for record in caplog.records)
    assert "pairloop_retried_requests_total 2.0" in server.http.get("/metrics").text
    server.add_version(1)
    server.open_duel(1)
    duel = server.chat(n=2, user=user_of(Pool.GATE))
    assert duel.status_code == 200
    assert not [name for name in duel.headers if name.startswith("x-pairloop")]


def test_clients_are_told_not_to_send_a_conflict_again(serve: Serve) -> None:
    server = serve()
    assert server.http.post(f"/v1/policies/{POLICY}/rollback").headers["x-should-retry"] == "false"


def test_who_only_rates_reads_no_stored_conversation_and_a_broken_address_is_no_error(
    locked: tuple[RunningServer, str],
) -> None:
    server, _ = locked
    assert SCOPES_OF[Role.RATE].isdisjoint(scopes_of("GET", "/v1/chat/completions/chatcmpl-1"))
    assert not SCOPES_OF[Role.RATE].isdisjoint(scopes_of("POST", "/v1/chat/completions"))
    sent = {"hx-request": "true", "hx-current-url": "http://["}
    assert server.http.get("/home", headers=sent).status_code == 401
