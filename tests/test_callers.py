"""Whoever asks, as themselves: a session picks under its own name, and guesses, streams and kept replies have their bounds."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import sqlalchemy as sa
from tests.server import RunningServer, chat_body
from tests.test_sign_in import _quick, add_account, add_key, browser, browser_of, house, server, sign_in

from pairloop.store import feedback, groups, reservations
from pairloop.store.accounts import Role
from pairloop.store.keys import Scope

__all__ = ["_quick", "browser", "house", "server"]  # the fixtures

ANOTHER = {"origin": "http://elsewhere.example"}


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
