"""The pages Keys and Audit as text: what they show, their filters as parameters, and exports of exactly what is filtered."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection
from tests.server import RunningServer
from tests.test_pages import EVIL, Collector

from pairloop.store import accounts, audit, keys, schema, sessions
from pairloop.store.accounts import Cost, Role
from pairloop.store.audit import AuditAction
from pairloop.store.keys import Scope
from pairloop.web import audit as audit_api

DAY = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for most of these tests."""
    with RunningServer(tmp_path_factory.mktemp("house") / "server") as server:
        yield server


@pytest.fixture
def server(house: RunningServer) -> RunningServer:
    """Without keys, accounts and acts; but it has been locked, perhaps: see `admin`."""
    tables = (schema.sessions, schema.accounts, schema.keys, schema.audit)
    house.store.write(lambda c: [c.execute(sa.delete(table)) for table in tables])
    house.http.headers.pop("authorization", None)
    return house


def admin(server: RunningServer) -> str:
    """The id of a key of all scopes, which the server's client sends from now on."""
    key, token = keys.new("root", [Scope.ADMIN])
    server.store.write(lambda c: keys.insert(c, key))
    server.app.state.context.keys.forget(key.key_id)
    server.http.headers["authorization"] = f"Bearer {token}"
    return key.key_id


def test_empty_pages_say_what_to_do_next(serve: Callable[..., RunningServer]) -> None:
    server = serve()
    page = server.http.get("/keys").text
    assert "make the first one an <strong>admin</strong>" in page
    assert "No keys yet" in page
    assert "No accounts yet" in page
    assert "Nothing was done yet" in server.http.get("/audit").text


def test_keys_accounts_and_sessions_are_listed_and_can_be_ended(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "COST", Cost(16, 8, 1))
    root = admin(server)
    now = datetime.now(UTC)

    def fill(c: Connection) -> None:
        shop, _ = keys.new(f"shop {EVIL}", [Scope.INFERENCE], requests_per_minute=600, expires_at=now + timedelta(days=9))
        old, _ = keys.new("old", [Scope.TRAIN])
        for key in (shop, old):
            keys.insert(c, key)
        sessions.begin(c, shop, address="192.0.2.7")
        sessions.begin(c, old, address="192.0.2.8")
        keys.revoke(c, old.key_id, now, actor="test", reason="test")
        ada = accounts.create(c, "ada@shop", Role.OPERATE, accounts.hash_password("x" * 12), actor="test", reason="test")
        sessions.begin(c, ada, address="2001:db8::1")

    server.store.write(fill)
    page = server.http.get("/keys").text
    assert EVIL not in page
    assert "shop &lt;script&gt;" in page
    assert "make the first one" not in page
    assert "192.0.2.7" in page
    assert "192.0.2.8" not in page  # ended with its key
    tags = Collector(page).tags
    acts = [attributes["data-act"] or "" for tag, attributes in tags if tag == "button" and "data-act" in attributes]
    assert sorted(act.rsplit("/", 1)[0] for act in acts) == [
        "DELETE /v1/accounts",
        "DELETE /v1/keys",
        "DELETE /v1/keys",
        "DELETE /v1/sessions",
        "DELETE /v1/sessions",
    ]
    for act in reversed(acts):  # each button's request is one that the API takes
        if root not in act:
            method, path = act.split()
            assert server.http.request(method, path).status_code == 200, act
    emptied = server.http.get("/keys").text
    assert "Nobody is signed in" in emptied
    assert "No accounts yet" in emptied
    bad = server.http.get("/keys", params={"key": "nobody"})
    assert (bad.status_code, "no key &#39;nobody&#39;" in bad.text) == (404, True)


def filled(server: RunningServer, count: int = 120) -> None:
    """An act an hour, from the first of March on: promotions by grace, and every third an erasure by ada."""

    def write(c: Connection) -> None:
        for number in range(count):
            by_ada = number % 3 == 0
            audit.record(
                c,
                AuditAction.ERASE if by_ada else AuditAction.PROMOTE,
                actor="account:ada" if by_ada else "account:grace",
                subject=f"bot@{number}" if not by_ada else "user_100%",
                reason=f'=HYPERLINK(1) {EVIL}, "quoted"' if number == 3 else "why\nnot",
                details={"number": number, "text": EVIL},
                at=DAY + timedelta(hours=number),
            )

    server.store.write(write)


def shown(server: RunningServer, **params: Any) -> list[str]:
    """Ids of the entries on a page."""
    reply = server.http.get("/audit", params=params)
    assert reply.status_code == 200, reply.text
    return [attributes["id"] or "" for tag, attributes in Collector(reply.text).tags if tag == "tr" and "id" in attributes]


def test_the_trail_is_filtered_paged_and_exported_as_it_is_filtered(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_api, "AT_ONCE", 7)
    admin(server)
    filled(server)
    everything = server.http.get("/audit").text
    assert EVIL not in everything
    assert "&lt;script&gt;" in everything
    first = shown(server)
    assert len(first) == 50
    second, third = shown(server, after=first[-1]), shown(server, after=shown(server, after=first[-1])[-1])
    assert (len(second), len(third), len({*first, *second, *third})) == (50, 20, 120)
    older = next(a["href"] for t, a in Collector(everything).tags if t == "a" and "after=" in (a.get("href") or ""))
    assert older == f"/audit?after={first[-1]}"
    for params, count in (
        ({"action": "erase"}, 40),
        ({"actor": "GRACE"}, 50),
        ({"subject": "100%"}, 40),
        ({"subject": "bot@1_"}, 0),  # nothing is a wildcard
        ({"since": "2026-03-02", "until": "2026-03-02"}, 24),
        ({"since": "2026-03-05", "action": "erase", "actor": "ada", "subject": "user", "until": ""}, 8),
    ):
        found = shown(server, **params)
        assert len(found) == count, params
        page = server.http.get("/audit", params=params).text
        hrefs = [attributes.get("href") or "" for tag, attributes in Collector(page).tags if tag == "a"]
        links = {link.rsplit("=", 1)[1]: link for link in hrefs if link.startswith("/v1/audit/export?")}
        lines = [json.loads(line) for line in server.http.get(links["jsonl"]).text.splitlines()]
        assert [line["id"] for line in lines][:50] == found
        rows = list(csv.DictReader(io.StringIO(server.http.get(links["csv"]).text)))
        assert [row["id"] for row in rows] == [line["id"] for line in lines]
        if "actor" in params and count == 50:
            assert len(lines) == 80  # all pages of it
        if params == {"action": "erase"}:
            evil = next(line for line in lines if line["details"]["number"] == 3)
            cell = next(row for row in rows if row["id"] == evil["id"])
            assert evil["reason"] == f'=HYPERLINK(1) {EVIL}, "quoted"'
            assert cell["reason"] == "'" + evil["reason"]  # not a formula in a spreadsheet
            assert json.loads(cell["details"]) == evil["details"]
    assert "See everything" in server.http.get("/audit", params={"actor": "nobody"}).text
    assert server.http.get("/v1/audit", params={"until": int(DAY.timestamp()) + 1}).json()["data"][0]["details"]["number"] == 0


def test_a_long_reason_is_folded_and_a_short_one_stands(server: RunningServer) -> None:
    admin(server)
    verdict = "; ".join(f"reason {number} of the gate, in the words of its rule" for number in range(9))

    def write(c: Connection) -> None:
        for reason in (verdict, "by hand; at night"):
            audit.record(c, AuditAction.PROMOTE, actor="cli:ada", subject="bot@1", reason=reason, at=DAY)

    server.store.write(write)
    page = server.http.get("/audit").text
    assert '<summary dir="auto">reason 0 of the gate, in the words of its rule; …</summary>' in page
    assert f'<p dir="auto">{verdict}</p>' in page
    assert '<span dir="auto">by hand; at night</span>' in page


def test_no_reason_in_the_exported_trail_is_a_formula(server: RunningServer) -> None:
    admin(server)
    formulas, harmless = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1+1", "\r=1+1"], ["1=1", "a@b", " - "]

    def write(c: Connection) -> None:
        for reason in (*formulas, *harmless):
            audit.record(c, AuditAction.PROMOTE, actor="account:grace", subject="bot@1", reason=reason, details={})

    server.store.write(write)
    text = server.http.get("/v1/audit/export", params={"format": "csv", "actor": "grace"}).text
    told = [row["reason"] for row in csv.DictReader(io.StringIO(text, newline=""))]
    assert told[::-1] == [*("'" + reason for reason in formulas), *harmless]


def test_parameters_that_cannot_be_are_named(server: RunningServer) -> None:
    admin(server)
    for params, name in (
        ({"since": "yesterday"}, "since"),
        ({"until": "2026-13-01"}, "until"),
        ({"until": "9999-12-31"}, "until"),
        ({"since": "0001-01-01"}, "since"),
        ({"action": "dance"}, "action"),
        ({"actor": "x" * 200}, "actor"),
        ({"after": "audit_99999"}, "audit_99999"),
    ):
        reply = server.http.get("/audit", params=params)
        assert reply.status_code in (400, 404)
        assert "<h1>Error 40" in reply.text
        assert name in reply.text, params
    for params, name in (({"format": "xls"}, "format"), ({"action": "dance"}, "action"), ({"since": "-1"}, "since")):
        bad = server.http.get("/v1/audit/export", params=params)
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, name)


def test_an_entry_names_the_keys_it_is_about(server: RunningServer) -> None:
    admin(server)
    made = server.http.post("/v1/keys", json={"name": "shop <b>", "scopes": ["inference"]}).json()
    page = server.http.get("/audit", params={"subject": f"key:{made['id']}"}).text
    assert "shop &lt;b&gt;" in page
    assert "<bdi>root</bdi>" in page
