"""Whoever asks, as themselves: a session picks under its own name, and guesses, streams and kept replies have their bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope
from tests.server import RunningServer, chat_body, fake_config
from tests.stores import open_store
from tests.test_sign_in import PASSWORD, _quick, add_account, add_key, browser, browser_of, house, server, sign_in
from tests.waiting import PATIENCE_S, until

from pairloop.errors import ConfigError
from pairloop.store import accounts, feedback, groups, keys, reservations, schema, sessions
from pairloop.store.accounts import Role
from pairloop.store.keys import Scope
from pairloop.web import login
from pairloop.web.hashing import AT_ONCE, HASHING, WAITING
from pairloop.web.limits import Places, network_of
from pairloop.web.login import PER_ADDRESS, PER_NAME
from pairloop.web.proxies import Proxies
from pairloop.web.server import Server, refuse_open_doors

__all__ = ["_quick", "browser", "house", "server"]  # the fixtures

UNDER = {"idempotency-key": "one"}


def compared(http: httpx.Client, **more: str) -> str:
    """The id of a comparison."""
    reply = http.post("/v1/chat/completions", json=chat_body(n=2, **more))
    assert reply.status_code == 200, reply.text
    return str(reply.json()["id"])


def refused_for(reply: httpx.Response) -> str:
    """The field that a refusal names."""
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["code"] == "not_your_name"
    return str(reply.json()["error"]["param"])


# --- whose picks they are


def test_a_session_picks_asks_and_reserves_under_its_own_name_alone(server: RunningServer, browser: httpx.Client) -> None:
    sign_in(browser, "rater")
    for user in (None, "rater"):  # whoever is named, or nobody
        group_id = compared(browser, **({} if user is None else {"user": user}))
        pick = {"inference_id": group_id, "outcome": "chosen", "chosen_index": 0}
        thumb = {"inference_id": group_id, "choice_index": 0, "metric_name": "thumbs", "value": True}
        assert browser.post("/v1/preferences", json=pick).status_code == 201
        assert browser.post("/v1/preferences", json={**pick, "rater_id": "rater", "chosen_index": 1}).status_code == 201
        assert browser.post("/v1/feedback", json=thumb).status_code == 201
        with server.store.reading() as c:
            group = groups.get(c, group_id)
            assert group is not None
            assert group.rater_id == "rater"
            assert {row.rater_id for row in feedback.history(c, group_id)} == {"rater"}
    reply = browser.post("/v1/chat/completions", json=chat_body(user="adminr"))
    assert refused_for(reply) == "user"
    assert "'rater'" in reply.json()["error"]["message"]
    for more in ({}, {"repeat": True, "shown_order": [0, 1]}, {"reservation_id": "r"}, {"dryrun": True}):
        assert refused_for(browser.post("/v1/preferences", json={**pick, "rater_id": "adminr", **more})) == "rater_id"
    assert refused_for(browser.post("/v1/feedback", json={**thumb, "source_id": "adminr"})) == "source_id"
    for source in ("llm", "code"):  # a judge's vote counts for whoever asked, however fast it came
        for path, body in (("/v1/preferences", pick), ("/v1/feedback", thumb)):
            assert refused_for(browser.post(path, json={**body, "source": source})) == "source"
    assert browser.post("/v1/feedback", json={**thumb, "source": "human"}).status_code == 201
    about = {"conversation_id": "c-1", "metric_name": "resolved", "value": True, "source_id": "adminr"}
    assert refused_for(browser.post("/v1/feedback", json=about)) == "source_id"
    assert refused_for(browser.post("/v1/queue/reservations", json={"rater_id": "adminr"})) == "rater_id"
    assert refused_for(browser.get("/v1/queue", params={"rater_id": "adminr"})) == "rater_id"
    assert browser.get("/v1/queue", params={"rater_id": "rater"}).status_code == 200
    assert [browser.get("/v1/queue").status_code, browser.post("/v1/queue/reservations", json={}).status_code] == [200, 200]
    assert 'data-visitor="rater"' in browser.get("/").text
    assert "pairloop_visitor" not in browser.cookies


def test_a_pick_of_who_asked_as_somebody_else_is_still_the_sessions_own(server: RunningServer, browser: httpx.Client) -> None:
    """A comparison that a program asked for in a customer's name does not lend that name to who is signed in."""
    _, token = add_key(server, Scope.RATE)
    program = {"authorization": f"Bearer {token}"}
    asked = server.http.post("/v1/chat/completions", json=chat_body(n=2, user="customer"), headers=program)
    group_id = asked.json()["id"]
    sign_in(browser, "rater")
    pick = {"inference_id": group_id, "outcome": "chosen", "chosen_index": 0}
    assert browser.post("/v1/preferences", json=pick).status_code == 201
    # A key is a program's, which speaks for the people it names.
    assert server.http.post("/v1/preferences", json=pick, headers=program).status_code == 201
    assert server.http.post("/v1/preferences", json={**pick, "rater_id": "ann"}, headers=program).status_code == 201
    nobody = server.http.post("/v1/queue/reservations", json={}, headers=program)
    assert (nobody.status_code, nobody.json()["error"]["param"]) == (400, "rater_id")
    with server.store.reading() as c:
        assert sorted(row.rater_id for row in feedback.history(c, group_id)) == ["ann", "customer", "rater"]


def test_a_reservation_is_given_back_by_whose_it_is(server: RunningServer) -> None:
    with browser_of(server) as ada, browser_of(server) as bob:
        add_account(server, "ada", Role.RATE)
        add_account(server, "bob", Role.RATE)
        sign_in(ada, "ada")
        sign_in(bob, "bob")
        compared(ada)
        item = ada.post("/v1/queue/reservations", json={"rater_id": "ada"}).json()["item"]
        gone = bob.delete(f"/v1/queue/reservations/{item['id']}")
        assert (gone.status_code, gone.json()["deleted"]) == (200, False)
        with server.store.reading() as c:
            assert reservations.get(c, item["id"]) is not None
        stolen = {"inference_id": item["inference_id"], "reservation_id": item["id"], "outcome": "skip"}
        assert bob.post("/v1/preferences", json=stolen).status_code == 409
        assert ada.delete(f"/v1/queue/reservations/{item['id']}").json()["deleted"] is True


# --- streams of events


def events_of(http: httpx.Client, opened: ExitStack) -> Iterator[str]:
    """The lines of a stream that is open until ``opened`` is left, the first one read."""
    reply = opened.enter_context(http.stream("GET", "/page/events"))
    assert reply.status_code == 200
    lines = reply.iter_lines()
    assert next(lines) == "event: moved"
    opened.callback(lambda: lines)  # httpx hangs up where nobody holds on to them
    return lines


def until_it_ends(lines: Iterator[str]) -> None:
    begun = monotonic()
    for _ in lines:
        assert monotonic() - begun < PATIENCE_S


@pytest.mark.slow
def test_a_stream_ends_with_what_let_it_in(server: RunningServer, browser: httpx.Client) -> None:
    """A session, a key, a role that lost the page's scope, and the end of the open house itself: within seconds."""
    now = datetime.now(UTC)
    with ExitStack() as opened:
        key_id, token = add_key(server, Scope.OPERATE)
        bearer = opened.enter_context(httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {token}"}))
        others = [opened.enter_context(browser_of(server)) for _ in range(2)]
        sign_in(browser, "rater")
        sign_in(others[0], "operater")
        others[1].post("/login", data={"key": token})
        streams = [events_of(http, opened) for http in (browser, bearer, *others)]
        good = opened.enter_context(browser_of(server))
        sign_in(good, "adminr")
        stays = events_of(good, opened)
        # By another process, which tells this one nothing.
        server.store.write(lambda c: c.execute(sa.delete(schema.sessions).where(schema.sessions.c.account == "rater")))
        server.store.write(lambda c: keys.revoke(c, key_id, now, actor="test", reason="test"))
        expired = sa.update(schema.sessions).where(schema.sessions.c.account == "operater").values(expires_at=now)
        server.store.write(lambda c: c.execute(expired))
        for lines in streams:
            until_it_ends(lines)
        assert next(stays) is not None
        for http in (browser, bearer, *others):
            assert http.get("/page/events").status_code == 401


def test_so_many_streams_are_open_and_no_more(
    server: RunningServer, browser: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(2, 3)
    monkeypatch.setattr(server.app.state.context, "streams", places)
    with ExitStack() as opened:
        sign_in(browser, "rater")
        other = opened.enter_context(browser_of(server))
        sign_in(other, "operater")
        with ExitStack() as first:
            events_of(browser, first)
            events_of(browser, opened)
            late = browser.get("/page/events")
            assert (late.status_code, late.json()["error"]["code"]) == (429, "too_many_streams")
            assert int(late.headers["retry-after"]) >= 1
            events_of(other, opened)
            late = other.get("/page/events")
            assert (late.status_code, late.json()["error"]["code"]) == (503, "too_many_streams")
            assert int(late.headers["retry-after"]) >= 1
        until(lambda: places.open == 2)  # one left, and has its place back
        events_of(browser, opened)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40))
def test_a_place_is_never_lost_nor_given_twice(steps: list[tuple[str, bool]]) -> None:
    places, held = Places(2, 4), list[tuple[str, ExitStack]]()
    for caller, comes in steps:
        if not comes:
            mine = next((one for one in held if one[0] == caller), None)
            if mine is not None:
                held.remove(mine)
                mine[1].close()
            continue
        of_caller = sum(name == caller for name, _ in held)
        with ExitStack() as taken:
            refusal = taken.enter_context(places.taken(caller))
            assert refusal == ("caller" if of_caller == 2 else "all" if len(held) == 4 else None)
            if refusal is None:
                held.append((caller, taken.pop_all()))
        assert places.open == len(held)


# --- from where


async def client_of(trusted: list[str], peer: str, *chain: str) -> tuple[str, str]:
    """Address and scheme, as the server takes them of a request by ``peer`` that names ``chain``."""
    seen: list[tuple[str, str]] = []

    async def app(scope: AsgiScope, _receive: Receive, _send: Send) -> None:
        seen.append((scope["client"][0], scope["scheme"]))

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    headers = [(b"x-forwarded-for", value.encode()) for value in chain] + [(b"x-forwarded-proto", b"https")]
    scope = {"type": "http", "scheme": "http", "client": (peer, 1), "headers": headers}
    await Proxies(app, trusted)(scope, nothing, nothing)
    return seen[0]


ADDRESSES = st.ip_addresses().map(str)


@settings(max_examples=25, deadline=None)
@given(ADDRESSES, st.lists(ADDRESSES, max_size=4), st.lists(st.sampled_from(["10.0.0.1", "10.0.0.2"]), max_size=3), ADDRESSES)
def test_the_rightmost_address_that_is_no_proxys_is_the_clients(
    client: str, lies: list[str], proxies: list[str], peer: str
) -> None:
    trusted = ["10.0.0.0/30", "fd00::1"]
    assume(not any(ip_address(one) in ip_network(trusted[0]) or one == trusted[1] for one in (client, peer)))
    chain = ", ".join([*lies, client, *proxies])
    assert asyncio.run(client_of(trusted, "fd00::1", chain)) == (client, "https")
    assert asyncio.run(client_of(trusted, "10.0.0.2", *lies, client, *proxies)) == (client, "https")
    assert asyncio.run(client_of(trusted, peer, chain)) == (peer, "http")
    assert asyncio.run(client_of([], "127.0.0.1", chain)) == ("127.0.0.1", "http")


@pytest.mark.parametrize("peer", ["10.0.0.1", "::ffff:10.0.0.1", "::ffff:a00:1"])
@pytest.mark.parametrize("trusted", ["10.0.0.0/8", "10.0.0.1", "::ffff:10.0.0.0/104", "::ffff:10.0.0.1"])
def test_an_ipv4_address_in_ipv6_is_the_same_proxy(trusted: str, peer: str) -> None:
    """As a socket of both families tells it."""
    assert asyncio.run(client_of([trusted], peer, f"9.9.9.9, 198.51.100.7, {peer}")) == ("198.51.100.7", "https")
    assert asyncio.run(client_of([trusted], peer, f"9.9.9.9, ::ffff:11.0.0.1, [{peer}]:80"))[0] == "::ffff:11.0.0.1"
    assert asyncio.run(client_of([trusted], "::ffff:11.0.0.1", "198.51.100.7")) == ("::ffff:11.0.0.1", "http")


def test_who_is_not_believed_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    layer = Proxies(JSONResponse({}), [])

    async def ask() -> None:
        async def nothing(*_: Any) -> Any: ...

        for _ in range(3):
            headers = [(b"x-forwarded-for", b"198.51.100.1")]
            await layer({"type": "http", "scheme": "http", "client": ("127.0.0.1", 1), "headers": headers}, nothing, nothing)

    asyncio.run(ask())
    (line,) = caplog.messages
    assert "serve.trusted_proxies" in line
    assert "127.0.0.1" in line


@pytest.mark.parametrize("bad", ["*", "proxy.example", "10.0.0.1/8", "0.0.0.0/0", "::/0", "::/64", "::ffff:0:0/96", ""])
def test_a_proxy_is_an_address_or_a_network(tmp_path: Path, bad: str) -> None:
    with pytest.raises(ConfigError, match=r"serve\.trusted_proxies"):
        fake_config(tmp_path, serve={"trusted_proxies": [bad]})


def test_a_proxy_in_front_opens_the_doors_and_uvicorn_believes_nobody_by_itself(server: RunningServer, tmp_path: Path) -> None:
    with open_store(tmp_path / "artifacts") as store, pytest.raises(ConfigError, match="trusted_proxies"):
        refuse_open_doors(store, fake_config(tmp_path, serve={"trusted_proxies": ["127.0.0.1"]}))
    assert not Server(server.app, lambda: None).config.proxy_headers


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("198.51.100.7", "198.51.100.7"),
        ("::ffff:198.51.100.7", "198.51.100.7"),
        ("2001:db8:1:2:aaaa::7", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unknown", "unknown"),
    ],
)
def test_what_one_host_may_call_itself_is_one_network(address: str, network: str) -> None:
    assert network_of(address) == network


def guess(browser: httpx.Client, address: str, name: str = "adminr", password: str = "wrong horse battery") -> int:
    """The status of a sign-in from an address, as the proxy on this machine tells it."""
    fields = {"name": name, "password": password}
    return browser.post("/login", data=fields, headers={"x-forwarded-for": f"203.0.113.1, {address}"}).status_code


def test_a_stranger_who_guesses_locks_nobody_else_out(browser: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under one name from one address, from one address whatever the name, under one name from anywhere."""
    monkeypatch.setattr(login, "PER_NAME_ANYWHERE", 2 * PER_NAME + 2)
    stranger, owner, third = "2001:db8:1:2::{}", "198.51.100.8", "198.51.100.9"
    assert [guess(browser, stranger.format(n)) for n in range(PER_NAME + 1)] == [401] * PER_NAME + [429]
    assert guess(browser, "2001:db8:1:3::1") == 401  # the next network
    assert guess(browser, owner, password=PASSWORD) == 303
    # Everybody together: so many that no one of them, alone, can lock the owner out.
    assert [guess(browser, third) for _ in range(PER_NAME + 1)].count(401) >= PER_NAME - 1
    assert guess(browser, "198.51.100.10", password=PASSWORD) == 429
    assert guess(browser, owner, name="operater", password=PASSWORD) == 303


def test_one_address_guesses_few_names(browser: httpx.Client) -> None:
    tried = [guess(browser, "198.51.100.7", name=f"user{n}") for n in range(PER_ADDRESS + 1)]
    assert tried == [401] * PER_ADDRESS + [429]
    assert guess(browser, "198.51.100.7", name="adminr", password=PASSWORD) == 429
    assert guess(browser, "198.51.100.8", name="adminr", password=PASSWORD) == 303


def test_a_session_says_from_where_it_was_begun(server: RunningServer, browser: httpx.Client) -> None:
    assert guess(browser, "198.51.100.8", password=PASSWORD) == 303
    with server.store.reading() as c:
        assert [session.address for session in sessions.list_(c)] == ["198.51.100.8"]


# --- slow on purpose


def test_so_many_passwords_wait_and_no_more(server: RunningServer, browser: httpx.Client) -> None:
    release = Event()
    sign_in(browser, "adminr")
    with browser_of(server) as other:
        try:
            waiting = [HASHING.submit(release.wait) for _ in range(AT_ONCE + WAITING)]
            late = sign_in(other, "rater")
            assert (late.status_code, int(late.headers["retry-after"]) >= 1, "moment" in late.text) == (503, True, True)
            body = {"name": "new", "role": "rate", "password": PASSWORD}
            for path in ("/v1/accounts", "/v1/accounts/rater"):
                refused = browser.post(path, json=body if path == "/v1/accounts" else {"password": PASSWORD})
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "busy")
                assert refused.headers["retry-after"]
            _, token = add_key(server, Scope.RATE)
            assert other.post("/login", data={"key": token}).status_code == 303  # a key is hashed at once
        finally:
            release.set()
        assert all(one.result(PATIENCE_S) for one in waiting)
        assert sign_in(other, "rater").status_code == 303
        with pytest.raises(ZeroDivisionError):
            HASHING.submit(lambda: 1 // 0).result(PATIENCE_S)
        assert not HASHING.is_full


# --- kept replies


def test_a_kept_reply_is_its_callers_alone_and_one_about_an_account_is_nobodys(
    server: RunningServer, browser: httpx.Client
) -> None:
    sign_in(browser, "adminr")
    with browser_of(server) as rater:
        sign_in(rater, "rater")
        first = [one.post("/v1/chat/completions", json=chat_body(n=2), headers=UNDER) for one in (browser, rater)]
        again = [one.post("/v1/chat/completions", json=chat_body(n=2), headers=UNDER) for one in (browser, rater)]
        assert [reply.content for reply in first] == [reply.content for reply in again]
        assert all(reply.headers["idempotent-replayed"] == "true" for reply in again)
        assert first[0].json()["id"] != first[1].json()["id"]
        # Under the same key another caller's request is another one, whatever it asks.
        other = rater.post("/v1/chat/completions", json=chat_body(n=1), headers=UNDER)
        assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    with server.store.reading() as c:
        kept = {row.caller: row.subject for row in c.execute(sa.select(schema.stored_replies))}
    assert kept == {f"account:{name}": reply.json()["id"] for name, reply in zip(("adminr", "rater"), first, strict=True)}
    body = {"name": "new", "role": "rate", "password": PASSWORD}
    for path in ("/v1/accounts", "/v1/accounts/rater", "/v1/keys"):
        refused = browser.post(path, json=body, headers={"idempotency-key": "two"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")
    with server.store.reading() as c:
        assert accounts.get(c, "new") is None
        assert len(c.execute(sa.select(schema.stored_replies)).all()) == 2
