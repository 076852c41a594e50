"""What operators set of the schedule while everything runs goes before the file, for every process, and is on the record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from sqlalchemy import Connection
from tests.loop_rig import open_rig, settings
from tests.server import POLICY, RunningServer, fake_config
from tests.stores import database_of, open_beside
from tests.waiting import until

from pairloop.cli import pairloop
from pairloop.config import SCHEDULE_SETTINGS, Config, ScheduleSection, parse_config, with_settings
from pairloop.errors import ConfigError, InvalidRequestError
from pairloop.loop import cycle
from pairloop.loop.schedule import Scheduler
from pairloop.redaction import Redactor
from pairloop.scaffold import write_config
from pairloop.store import Store, audit, cycles, doctor, schedules, triggers
from pairloop.store.audit import AuditAction
from pairloop.store.keys import Scope
from pairloop.store.schema import metadata, schedule_changes
from pairloop.types import Cycle, CycleState
from pairloop.web.pages.cadence import cadence_of
from pairloop.web.scopes import scopes_of

EVIL = "<script>alert('x')</script>"
PATH = f"/v1/schedules/{POLICY}"
FILE = {"min_pairs": 100_000, "every": "6h"}
BAD = (
    ("every", "5 parsecs", "write for example 90s"),
    ("every", "9999999w", "longer than ten years"),
    ("cron", "every morning", "write minute, hour"),
    ("cron", "0 0 31 4,6 *", "day-of-month"),
    ("cron", "0 0 */31 2 1#5", "no such time comes"),  # a fifth Monday that is the first of the month
    ("cron", "0 " * 200, "at most 200 characters"),
    ("min_pairs", -1, "greater than or equal to 0"),
    ("min_pairs", 10**30, "less than or equal to"),
)


@pytest.mark.parametrize(("key", "value", "told"), BAD)
def test_what_the_file_may_not_say_nobody_may_set(key: str, value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=f"schedule.{key}: .*{told}"):
        parse_config({"schedule": {key: value}})
    with pytest.raises(InvalidRequestError, match=f"{key}: .*{told}") as refused:
        with_settings(ScheduleSection(), {key: value})
    assert refused.value.param == key


def test_what_is_one_process_own_cannot_be_set_for_all() -> None:
    for key in ("lease", "poll", "jobs", "nonsense"):
        with pytest.raises(InvalidRequestError, match="there are enabled, every, cron, min_pairs"):
            with_settings(ScheduleSection(), {key: "1s"})


VALUES = {
    "enabled": st.booleans(),
    "every": st.sampled_from([None, "90m", "1d"]),
    "cron": st.sampled_from([None, "0 3 * * *"]),
    "min_pairs": st.integers(0, 3),
}
STEPS = st.one_of(
    st.fixed_dictionaries({}, optional=VALUES).filter(bool),
    st.sets(st.sampled_from(SCHEDULE_SETTINGS)).map(frozenset),
)


@cache
def tables() -> sa.Engine:
    """A database in memory, made once."""
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    metadata.create_all(engine, tables=[metadata.tables[name] for name in ("audit", "triggers", "schedule_changes")])
    return engine


@budget(max_examples=25, deadline=None)
@given(st.lists(STEPS, max_size=6))
def test_the_newest_of_a_setting_holds_and_each_change_is_one_entry(steps: list[dict[str, Any] | frozenset[str]]) -> None:
    config, model, entries = parse_config({"schedule": {"min_pairs": 2}}), dict[str, Any](), 0
    with tables().connect() as c, c.begin() as attempt:
        for step in steps:
            before = dict(model)
            if isinstance(step, dict):
                schedules.set_(c, config, step, actor="cli:ada", reason="set")
                model |= step
            else:
                schedules.reset(c, config, step, actor="cli:ada", reason="reset")
                model = {key: value for key, value in model.items() if step and key not in step}
            entries += model != before
            found = schedules.current(c, config)
            assert {key: one.value for key, one in found.set_here.items()} == model
            assert found.section == with_settings(config.schedule, model)
            assert len(audit.list_(c)) == entries
        attempt.rollback()


def look(scheduler: Scheduler) -> None:
    """Have the scheduler look once more, to the end."""
    before = scheduler.status()["looked_at"]
    scheduler.notify()
    until(lambda: scheduler.status()["looked_at"] != before)


def newest(store: Store, policy: str = "bot") -> Cycle | None:
    with store.reading() as c:
        return next(iter(cycles.list_(c, policy, 1)), None)


def setting(config: Config, **values: Any) -> Callable[[Connection], Any]:
    return lambda c: schedules.set_(c, config, values, actor="cli:ada", reason="test")


def test_two_schedulers_follow_what_a_third_process_sets(tmp_path: Path) -> None:
    """One cycle begins, once, when somebody lowers the threshold elsewhere; none while it is paused."""
    config = settings(tmp_path, schedule={"poll": "0.05s", "min_pairs": 100_000}, train={"min_pairs": 1_000})
    with open_rig(config) as rig:
        rig.serve(60)
        other, operator = open_beside(rig.store), open_beside(rig.store)
        both = [Scheduler(rig.loop), Scheduler(cycle.Loop(other, rig.policy, config, "tester:1"))]
        operator.write(setting(config, enabled=False, min_pairs=30))
        for scheduler in both:
            scheduler.start()
        try:
            for scheduler in both:
                look(scheduler)
                look(scheduler)
            assert newest(rig.store) is None
            assert cycle.status(rig.store, config).text.endswith("new pairs; the schedule is paused")
            operator.write(lambda c: schedules.reset(c, config, ["enabled"], actor="cli:ada", reason="test"))
            ended = until(lambda: (one := newest(rig.store)) and one.state.is_terminal and one)
            assert (ended.number, ended.state) == (1, CycleState.NOTHING_TO_TRAIN)
            assert "(min_pairs = 30)" in ended.trigger
        finally:
            for scheduler in both:
                scheduler.stop()
            other.close()
            operator.close()
        assert newest(rig.store) == ended
        assert [scheduler.status()["error"] for scheduler in both] == [None, None]


def test_what_fell_due_under_the_old_schedule_does_not_begin_under_the_new_one(tmp_path: Path) -> None:
    config = settings(tmp_path, schedule={"min_pairs": 30})
    with open_rig(config) as rig:
        rig.serve(60)
        scheduler = Scheduler(rig.loop)
        scheduler._keep_trigger()
        with rig.store.reading() as c:
            assert "(min_pairs = 30)" in str(triggers.peek(c, "bot"))
        rig.store.write(setting(config, enabled=False))
        assert scheduler._due() is None
        scheduler._keep_trigger()
        assert scheduler._due() is None
        scheduler.trigger("by hand")
        rig.store.write(setting(config, min_pairs=40))
        assert scheduler._due() == "by hand", "what somebody asked for is kept"


def test_a_pause_that_comes_while_the_scheduler_looks_is_kept_to(tmp_path: Path) -> None:
    config = settings(tmp_path, schedule={"min_pairs": 30})

    class Paused(Scheduler):
        """Somebody pauses the schedule between its look and its write."""

        def _due_by(self, section: ScheduleSection) -> str | None:
            reason = super()._due_by(section)
            rig.store.write(setting(config, enabled=False))
            return reason

    with open_rig(config) as rig:
        rig.serve(60)
        Paused(rig.loop)._keep_trigger()
        with rig.store.reading() as c:
            assert triggers.peek(c, "bot") is None


def test_the_doctor_finds_a_setting_that_this_version_does_not_take(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with Store.open(config) as store:
        store.write(setting(config, every="1h"))
        store.write(lambda c: c.execute(sa.update(schedule_changes).values(value="5 parsecs")))
        with store.reading() as c:
            found = schedules.current(c, config)
        assert (found.section, len(found.unusable)) == (config.schedule, 1)
        assert [(one.code, one.subject) for one in doctor.check(store)] == [("unusable_setting", "bot every")]
        store.write(lambda c: c.execute(sa.update(schedule_changes).values(setting="of_tomorrow")))
        store.write(lambda c: schedules.reset(c, config, ["of_tomorrow"], actor="cli:ada", reason="not yet"))
        assert doctor.check(store) == []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("settings")
    with RunningServer(folder, config=fake_config(folder, schedule=FILE)) as running:
        yield running
        running.http.post(f"{PATH}/reset")


@pytest.fixture
def fresh(server: RunningServer) -> RunningServer:
    server.http.post(f"{PATH}/reset")
    return server


def entries(server: RunningServer, action: AuditAction) -> list[audit.AuditEntry]:
    with server.store.reading() as c:
        return audit.list_(c, action=action)


def test_it_is_set_looked_at_and_taken_back_over_the_api(fresh: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh.store, "redactor", Redactor.of(fresh.config))
    known = len(entries(fresh, AuditAction.SCHEDULE_SET))
    looked = fresh.http.post(PATH, json={"cron": "0 3 * * *", "every": None, "dryrun": True}).json()
    assert (looked["dryrun"], looked["every"], len(looked["runs"])) == (True, None, 3)
    assert looked["runs"][1] - looked["runs"][0] == 86_400
    assert fresh.http.get(PATH).json()["every"] == "6h"
    headers = {"idempotency-key": "set-once"}
    body = {"every": None, "min_pairs": 300, "reason": f"jo@shop.example: {EVIL}"}
    told = [fresh.http.post(PATH, json=body, headers=headers).json() for _ in range(2)]
    assert told[0] == told[1]
    found = fresh.http.get(PATH).json()
    assert (found["every"], found["min_pairs"], found["next_run_at"]) == (None, 300, None)
    assert found["settings"]["min_pairs"]["origin"] == "set"
    assert found["settings"]["min_pairs"]["file_value"] == 100_000
    assert (found["settings"]["cron"]["origin"], found["settings"]["every"]["file_value"]) == ("default", "6h")
    assert (
        fresh.http.post(PATH, json=body).json()["settings"]["min_pairs"]["set_at"] == found["settings"]["min_pairs"]["set_at"]
    )
    (entry, *before) = entries(fresh, AuditAction.SCHEDULE_SET)
    assert len(before) == known, "what is so already is not recorded"
    assert entry.details == {"every": {"old": "6h", "new": None}, "min_pairs": {"old": 100_000, "new": 300}}
    assert (entry.actor, entry.subject, entry.reason) == ("address:127.0.0.1", POLICY, f"[EMAIL]: {EVIL}")
    back = fresh.http.post(f"{PATH}/reset", json={"settings": ["min_pairs"], "reason": "jo@shop.example: over"}).json()
    assert (back["min_pairs"], back["every"]) == (100_000, None)
    entry = entries(fresh, AuditAction.SCHEDULE_RESET)[0]
    assert (entry.details, entry.reason) == ({"min_pairs": {"old": 300, "new": 100_000}}, "[EMAIL]: over")


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        *(({key: value}, key, told) for key, value, told in BAD if value != 10**30 and value != "0 " * 200),
        ({"min_pairs": "300"}, "min_pairs", "integer"),
        ({"enabled": None}, "enabled", "bool"),
        ({"lease": "1s"}, "lease", ""),
        ({"reason": "no setting"}, "body", "name at least one of enabled, every, cron, min_pairs"),
    ],
)
def test_a_bad_value_is_refused_by_name(fresh: RunningServer, body: dict[str, Any], param: str, told: str) -> None:
    for asked in (body, {**body, "dryrun": True}):
        refused = fresh.http.post(PATH, json=asked)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        assert told in refused.json()["error"]["message"]
    assert {one["origin"] for one in fresh.http.get(PATH).json()["settings"].values()} == {"file", "default"}


def test_only_operators_set_it_and_other_policies_have_none(fresh: RunningServer) -> None:
    assert scopes_of("POST", PATH) == scopes_of("POST", f"{PATH}/reset") == scopes_of("GET", "/schedule") == {Scope.OPERATE}
    for path in ("/v1/schedules/nobody", "/v1/schedules/nobody/reset"):
        assert fresh.http.post(path, json={}).status_code == 404
    assert fresh.http.post(f"{PATH}/reset", json={"settings": ["lease"]}).json()["error"]["param"] == "settings"


def test_every_reader_follows_and_a_process_that_starts_later_does_too(fresh: RunningServer) -> None:
    fresh.http.post(PATH, json={"min_pairs": 300, "reason": EVIL})
    later = open_beside(fresh.store)
    assert cycle.status(later, fresh.config).min_pairs == 300
    assert fresh.http.get("/v1/status").json()["pairs"]["needed"] == 300
    assert "pairloop_schedule_min_pairs 300" in fresh.http.get("/metrics").text
    page = fresh.http.get("/schedule").text
    assert "0 of 300" in page
    assert EVIL not in page
    assert "address:127.0.0.1" in page
    assert "Back to the file" in page
    assert "or at 300 pairs" in fresh.http.get("/home").text
    later.write(setting(fresh.config, enabled=False))
    later.close()
    fresh.app.state.context.board.forget()
    home = fresh.http.get("/home").text
    assert "The schedule is paused" in home
    assert "paused<small>" in home
    status = fresh.http.get("/v1/status").json()
    assert (status["scheduler"], status["pairs"]["needed"]) == ({}, None)
    assert "pairloop_schedule_enabled 0.0" in fresh.http.get("/metrics").text
    paused = fresh.http.get("/schedule").text
    assert "Resume the schedule" in paused
    assert "Pause the schedule" not in paused.split('id="edit"')[1].split("<dialog")[0]


@pytest.mark.parametrize(
    ("every", "cron", "kind"),
    [
        (None, None, "none"),
        ("6h", None, "every"),
        ("6h", "0 3 * * *", "both"),
        (None, "5 * * * *", "hourly"),
        (None, "5 3 * * *", "daily"),
        (None, "5 3 * * 0", "weekly"),
        (None, "5 * * * 1", "cron"),
        (None, "5 3 1 * *", "cron"),
        (None, "*/5 * * * *", "cron"),
    ],
)
def test_a_clock_is_said_as_people_say_it(every: str | None, cron: str | None, kind: str) -> None:
    found = cadence_of(ScheduleSection(every=every, cron=cron))
    assert found.kind == kind
    if kind in ("daily", "weekly"):
        assert (found.time, found.day) == ("03:05", 1 if kind == "daily" else 0)


def test_the_command_line_sets_pauses_and_takes_back(tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {"policy": {"model": "fake"}, "store": database_of(tmp_path / "bot")}
    sections["privacy"] = {"redact": "patterns"}
    path = str(write_config(tmp_path / "bot", sections))

    def run(*words: str, code: int = 0) -> Any:
        done = CliRunner().invoke(pairloop, ["schedule", *words, "--config", path, "--json"])
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    assert run("show")["settings"]["min_pairs"]["origin"] == "default"
    assert (
        run("set", "--every", "6h", "--cron", "none", "--min-pairs", "50", "--reason", "x")["settings"]["every"]["value"]
        == "6h"
    )
    assert run("pause", "--reason", "ada@shop.example wants it")["settings"]["enabled"]["reason"] == "[EMAIL] wants it"
    assert run("show")["enabled"] is False
    assert run("resume", "--reason", "x")["settings"]["enabled"]["origin"] == "default"
    assert "5 parsecs" in run("set", "--every", "5 parsecs", "--reason", "x", code=2)["error"]["message"]
    assert "--min-pairs" in run("set", "--reason", "x", code=2)["error"]["message"]
    shown = CliRunner().invoke(pairloop, ["schedule", "reset", "--reason", "x", "--config", path])
    assert "The next cycle begins at 500 new pairs" in shown.stdout
