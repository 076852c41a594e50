"""Whoever asks, as themselves: a session picks under its own name, and guesses, streams and kept replies have their bounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from time import monotonic

import httpx
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from tests.server import RunningServer, chat_body
from tests.test_sign_in import _quick, add_account, add_key, browser, browser_of, house, server, sign_in

from pairloop.store import feedback, groups, keys, reservations, schema
from pairloop.store.accounts import Role
from pairloop.store.keys import Scope
from pairloop.web.limits import Places

__all__ = ["_quick", "browser", "house", "server"]  # the fixtures

PATIENCE_S = 10.0


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
    about = {"conversation_id": "c-1", "metric_name": "resolved", "value": True, "source_id": "adminr"}
    assert refused_for(browser.post("/v1/feedback", json=about)) == "source_id"
    assert refused_for(browser.post("/v1/queue/reservations", json={"rater_id": "adminr"})) == "rater_id"
    assert refused_for(browser.get("/v1/queue", params={"rater_id": "adminr"})) == "rater_id"
    assert browser.get("/v1/queue", params={"rater_id": "rater"}).status_code == 200
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
        begun = monotonic()
        while places.open > 2:  # one left, and has its place back
            assert monotonic() - begun < PATIENCE_S
        events_of(browser, opened)


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
