"""The audit trail: every act leaves its line, with who and why, in the transaction of the act."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import Connection
from tests.server import POLICY, RunningServer, World

from pairloop.cli import pairloop
from pairloop.errors import InvalidRequestError, NotFoundError
from pairloop.loop import deploy
from pairloop.store import audit, keys, versions
from pairloop.store.audit import AuditAction, AuditEntry
from pairloop.store.keys import Scope
from pairloop.types import Alias


def trail(world: World) -> list[AuditEntry]:
    with world.store.reading() as c:
        return audit.list_(c)


def test_there_is_no_act_without_its_line_and_no_line_without_its_act(tmp_path: Path) -> None:
    with World(tmp_path / "world") as world:
        version = world.add_version(1)

        def broken(_: Connection) -> None:
            raise RuntimeError("the disk is full")

        with pytest.raises(RuntimeError, match="disk"):
            deploy.promote(world.store, world.policy, version, reason="better", also=broken)
        assert trail(world) == []
        deploy.promote(world.store, world.policy, version, reason="better", actor="cli:ada")
        (entry,) = trail(world)
        assert (entry.actor, entry.action, entry.subject, entry.reason) == ("cli:ada", "promote", f"{POLICY}@1", "better")
        assert entry.details["previous"] == 0
        with world.store.reading() as c:
            assert versions.alias(c, POLICY, Alias.CHAMPION) == 1


def test_the_list_goes_on_behind_an_entry_and_can_be_narrowed(tmp_path: Path) -> None:
    with World(tmp_path / "world") as world:
        begin = datetime(2026, 1, 5, tzinfo=UTC)

        def write(c: Connection) -> None:
            for i in range(5):
                action = AuditAction.PROMOTE if i % 2 else AuditAction.ERASE
                audit.record(c, action, actor="a", subject=str(i), reason="r", at=begin + timedelta(days=i))

        world.store.write(write)
        with world.store.reading() as c:
            first = audit.list_(c, limit=2)
            rest = audit.list_(c, after=first[-1].audit_id)
            assert [entry.subject for entry in (*first, *rest)] == ["4", "3", "2", "1", "0"]
            assert [entry.subject for entry in audit.list_(c, action="promote")] == ["3", "1"]
            assert [entry.subject for entry in audit.list_(c, since=begin + timedelta(days=3))] == ["4", "3"]
            for unknown in ("audit_99", "audit_", "audit_x", "9", f"audit_{10**25}"):
                with pytest.raises(NotFoundError, match="audit trail"):
                    audit.list_(c, after=unknown)
            with pytest.raises(InvalidRequestError, match="there are promote, rollback"):
                audit.list_(c, action="dance")


def test_acts_over_the_api_are_kept_under_their_key(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "server") as server:
        server.add_version(1)
        server.add_version(2)
        key, token = keys.new("ops", [Scope.ADMIN])
        server.store.write(lambda c: keys.insert(c, key))
        http = server.http
        http.headers["authorization"] = f"Bearer {token}"
        asked = {"reason": "try it", "canary_share": 0.25}
        begun = http.post(f"/v1/versions/{POLICY}@2/promote", json=asked)
        assert begun.status_code == 200, begun.text
        assert (begun.json()["action"], begun.json()["canary"], begun.json()["canary_share"]) == (
            "canary_start",
            f"{POLICY}@2",
            0.25,
        )
        assert http.get(f"/v1/policies/{POLICY}").json()["canary"] == f"{POLICY}@2"
        assert http.get("/v1/status").json()["canary"]["share"] == 0.25
        assert "pairloop_canary_share 0.25" in http.get("/metrics").text
        guards = http.get(f"/v1/policies/{POLICY}/guards").json()
        assert (guards["version"], guards["former"], guards["broken"]) == (f"{POLICY}@2", f"{POLICY}@0", None)
        assert [reason["rule"] for reason in guards["reasons"]][:2] == ["errors", "latency"]
        stopped = http.post(f"/v1/policies/{POLICY}/canary/stop", json={"reason": "seen enough"})
        assert (stopped.status_code, stopped.json()["action"]) == (200, "canary_stop")
        assert http.post(f"/v1/policies/{POLICY}/canary/stop").status_code == 409
        for share in (0.0, 1.0, 2.0):
            assert http.post(f"/v1/versions/{POLICY}@1/promote", json={"canary_share": share}).status_code == 400
        assert http.post(f"/v1/versions/{POLICY}@1/promote").status_code == 200
        assert http.post(f"/v1/policies/{POLICY}/rollback", json={"reason": "odd"}).status_code == 200
        assert http.post("/v1/cycles").status_code == 202
        made = http.post("/v1/keys", json={"name": "second", "scopes": ["inference"]}).json()
        assert http.delete(f"/v1/keys/{made['id']}").status_code == 200
        assert http.delete(f"/v1/keys/{made['id']}").status_code == 200  # a second time changes nothing
        page = http.get("/v1/audit", params={"limit": 3}).json()
        assert page["has_more"]
        more = http.get("/v1/audit", params={"after": page["last_id"]}).json()
        found = [*page["data"], *more["data"]]
        assert [(one["action"], one["subject"], one["reason"]) for one in found] == [
            ("key_revoke", f"key:{made['id']}", "by hand, over the API"),
            ("key_create", f"key:{made['id']}", "by hand, over the API"),
            ("cycle_start", POLICY, "by hand, over the API"),
            ("rollback", f"{POLICY}@0", "odd"),
            ("promote", f"{POLICY}@1", "by hand, over the API"),
            ("canary_stop", f"{POLICY}@2", "seen enough"),
            ("canary_start", f"{POLICY}@2", "try it"),
        ]
        assert {one["actor"] for one in found} == {f"key:{key.key_id}"}
        assert http.get("/v1/audit", params={"action": "rollback"}).json()["data"][0]["details"]["previous"] == 1
        assert http.get("/v1/audit", params={"action": "dance"}).json()["error"]["param"] == "action"
        http.headers["authorization"] = f"Bearer {narrow(server)}"
        assert http.get("/v1/audit").status_code == 403


def narrow(server: RunningServer) -> str:
    key, token = keys.new("shop", [Scope.INFERENCE, Scope.TRAIN])
    server.store.write(lambda c: keys.insert(c, key))
    return token


def test_the_command_line_shows_it(tmp_path: Path) -> None:
    def run(*args: str) -> tuple[int, str]:
        done = CliRunner().invoke(pairloop, [*args, "--config", str(tmp_path / "bot")], catch_exceptions=False)
        return done.exit_code, done.output

    assert CliRunner().invoke(pairloop, ["init", str(tmp_path / "bot"), "--model", "fake"]).exit_code == 0
    assert run("audit") == (0, "nothing was done yet\n")
    assert run("keys", "create", "--name", "ops")[0] == 0
    code, text = run("audit", "--json", "--since", "1h", "--action", "key_create")
    (entry,) = json.loads(text)["audit"]
    assert (code, entry["actor"].partition(":")[0], entry["details"]["name"]) == (0, "cli", "ops")
    assert json.loads(run("audit", "--json", "--since", "2999-01-01")[1]) == {"audit": []}
    code, text = run("audit", "--since", "yesterday")
    assert (code, "neither a duration such as 7d nor a date" in text) == (2, True)
    code, text = run("canary", "stop", "--reason", "odd")
    assert (code, "no canary" in text) == (2, True)
    code, text = run("promote", "0", "--reason", "all", "--canary", "1")
    assert (code, "is not in the range 0<x<1" in text) == (2, True)
    assert run("guards") == (0, "no version is under watch\n")
