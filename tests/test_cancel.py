"""A cycle cancelled by hand: while it trains, while it duels, and what whoever moves it finds out."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.loop_rig import Rig, open_rig, settings
from tests.server import RunningServer, World, fake_config
from tests.test_cli import run as invoke
from tests.waiting import PATIENCE_S, until

from pairloop.errors import ConflictError, NotFoundError
from pairloop.loop import cycle, deploy, train
from pairloop.loop.cycle import Loop
from pairloop.policy.fake import FakePolicy
from pairloop.store import audit, cycles, duels, new_id, runs, versions
from pairloop.types import Alias, Cycle, CycleState, Run, RunStatus, Version

LONG = {"epochs": 50, "batch_size": 1}
"""Tens of thousands of steps: seconds, even for the fake policy."""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with open_rig(settings(tmp_path, train=LONG, schedule={"min_pairs": 30, "lease": "60s"})) as opened:
        yield opened


def newest(rig: Rig) -> Cycle:
    with rig.store.reading() as c:
        return cycles.list_(c, "bot")[0]


def run_of(rig: Rig) -> Run | None:
    with rig.store.reading() as c:
        found = cycles.list_(c, "bot")
        return runs.for_cycle(c, found[0].cycle_id) if found else None


@pytest.mark.slow
def test_a_training_that_is_cancelled_stops_and_leaves_the_champion(rig: Rig) -> None:
    rig.serve(800)
    ended: list[Cycle] = []
    turning = threading.Thread(target=lambda: ended.append(cycle.run(rig.loop, trigger="test")))
    turning.start()
    until(lambda: (run := run_of(rig)) and run.progress.get("step", 0) > 0)
    cancelled = cycle.cancel(rig.store, newest(rig).cycle_id, reason="wrong rate", actor="tester")
    turning.join(PATIENCE_S)
    assert not turning.is_alive()
    assert ended == [cancelled]
    assert cancelled.state is CycleState.HELD
    assert cancelled.steps[-1].record == {"reason": "cancelled: wrong rate", "cancelled": True}
    run = run_of(rig)
    assert run is not None
    assert (run.status, run.error) == (RunStatus.CANCELLED, "cancelled: wrong rate")
    assert 0 < run.progress["step"] < run.progress["of"]
    folder = train.folder_of(rig.loop.config, run)
    assert not (folder / "checkpoints").exists()
    assert rig.champion == 0
    with rig.store.reading() as c:
        assert [version.number for version in versions.list_(c, "bot")] == [0]
        (entry,) = audit.list_(c, limit=10, action=audit.AuditAction.CYCLE_CANCEL)
    assert (entry.actor, entry.reason, entry.details["was"]) == ("tester", "wrong rate", "training")


def test_a_duel_that_is_cancelled_is_over_and_no_new_cycle_begins_in_its_name(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path, evaluate={"prompts": 8})) as rig:
        rig.serve(60)
        duelling = cycle.run(rig.loop, trigger="test")
        assert duelling.state is CycleState.DUELLING
        assert 1 in rig.policy.loaded()
        cancelled = cycle.cancel(rig.store, duelling.cycle_id, reason="enough", actor="tester", policy=rig.policy)
        assert cancelled.state is CycleState.HELD
        assert cancelled.steps[-1].record["version"] == 1
        assert 1 not in rig.policy.loaded()
        with rig.store.reading() as c:
            assert duels.current(c, "bot") is None
            assert versions.alias(c, "bot", Alias.CHALLENGER) is None
            assert versions.promotions(c, "bot")[-1].action == "retire"
        # A scheduler that saw it open a moment ago looks again at this cycle, and begins none.
        assert cycle.run(rig.loop, trigger="test", only=duelling.cycle_id) == cancelled
        assert newest(rig).number == 1
        with pytest.raises(ConflictError, match="has ended already, as held"):
            cycle.cancel(rig.store, duelling.cycle_id, reason="again", actor="tester")
        with pytest.raises(NotFoundError):
            cycle.cancel(rig.store, new_id("cycle"), reason="which", actor="tester")
        assert cycle.run(rig.loop, trigger="the next").number == 2


def test_a_version_that_was_promoted_by_hand_meanwhile_goes_on_serving(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path, evaluate={"prompts": 8})) as rig:
        rig.serve(60)
        duelling = cycle.run(rig.loop, trigger="test")
        with rig.store.reading() as c:
            made = versions.get(c, "bot", 1)
        assert made is not None
        deploy.promote(rig.store, rig.policy, made, reason="by hand")
        with pytest.raises(ConflictError, match="was promoted by hand"):
            cycle.cancel(rig.store, duelling.cycle_id, reason="enough", actor="tester", policy=rig.policy)
        assert 1 in rig.policy.loaded()
        assert rig.champion == 1


def test_it_is_cancelled_over_http_and_by_the_command_line(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "server", config=fake_config(tmp_path / "server")) as server:
        server.add_version(1)
        duel = server.open_duel(1)
        reply = server.http.post(f"/v1/cycles/{duel.cycle_id}/cancel", json={"reason": "enough"})
        assert reply.status_code == 200
        assert reply.json()["state"] == "held"
        assert reply.json()["steps"][-1]["record"]["reason"] == "cancelled: enough"
        assert server.http.post(f"/v1/cycles/{duel.cycle_id}/cancel").status_code == 409
        assert server.http.post("/v1/cycles/cycle_9/cancel").status_code == 404
    (tmp_path / "pairloop.toml").write_text('[policy]\nmodel = "fake"\n', encoding="utf-8")
    told = invoke("cycle", "cancel", "--reason", "x", "--config", str(tmp_path)).output
    assert "no cycle of" in told


class Stubborn(FakePolicy):
    """An engine with an error that nobody foresaw: the first time, version 1 does not go."""

    refusals = 1

    def unload(self, number: int) -> None:
        if self.refusals and number == 1:
            self.refusals -= 1
            raise RuntimeError("out of luck")
        super().unload(number)


def test_what_other_processes_ended_is_unloaded_once_and_again_where_that_failed(tmp_path: Path) -> None:
    with World(tmp_path / "server", policy=Stubborn()) as here:
        made: dict[int, Version] = {}
        unloader = cycle.Unloader(here.store, here.policy, here.config, again_s=0.0)
        for number, state in ((1, CycleState.HELD), (2, CycleState.REJECTED), (3, CycleState.PROMOTED)):
            made[number] = here.add_version(number)
            here.policy.load(made[number])
            here.close_duel(here.open_duel(number), state)
        here.alias(Alias.CHAMPION, 3)
        here.policy.load(here.add_version(4))
        here.open_duel(4)  # the next cycle is on already, and its challenger stays
        unloader.look()
        assert here.policy.loaded() == {0, 1, 3, 4}, "one that failed keeps none of the others"
        unloader.look()
        assert here.policy.loaded() == {0, 3, 4}, "and is tried again"
        here.policy.load(made[1])
        unloader.look()
        assert here.policy.loaded() == {0, 1, 3, 4}, "whoever asks for it by number has it again"


def test_a_server_that_turns_no_cycles_lets_go_of_what_a_worker_cancelled(tmp_path: Path) -> None:
    config = fake_config(tmp_path / "server", schedule={"poll": "0.1s"})
    with RunningServer(tmp_path / "server", config=config) as server:
        server.add_version(1)
        duel = server.open_duel(1)
        assert server.chat(model="support-bot@1").status_code == 200
        assert server.policy.loaded() == {0, 1}
        cycle.cancel(server.store, duel.cycle_id, reason="enough", actor="tester")  # as the command line does
        until(lambda: server.policy.loaded() == {0})


@pytest.mark.slow
def test_a_server_lets_go_of_the_challenger_that_the_command_line_cancelled(tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {"evaluate": {"prompts": 8}, "schedule": {"enabled": False, "poll": "0.1s"}}
    with RunningServer(tmp_path / "server", config=fake_config(tmp_path / "server", **sections), turning=True) as server:
        Rig(Loop(server.store, server.policy, server.config, "test:1"), random.Random(0)).serve(60)

        def state() -> str:
            return str(server.http.get("/v1/cycles").json()["data"][0]["state"])

        server.http.post("/v1/cycles")
        until(lambda: bool(server.http.get("/v1/cycles").json()["data"]) and state() == "duelling")
        assert server.policy.loaded() == {0, 1}
        database = server.store.url.render_as_string(hide_password=False)
        (tmp_path / "pairloop.toml").write_text(
            f'[policy]\nmodel = "fake"\n[store]\ndatabase = "{database}"\n', encoding="utf-8"
        )
        told = invoke("cycle", "cancel", "--reason", "enough", "--config", str(tmp_path))
        assert (told.exit_code, told.output) == (0, "cycle 1: held\n")
        until(lambda: server.policy.loaded() == {0})
        # Whoever asks for it by number has it again, for as long as others do not need the room.
        assert server.chat(model="support-bot@1").status_code == 200
        looked = server.http.get("/v1/status").json()["scheduler"]["looked_at"]
        until(lambda: server.http.get("/v1/status").json()["scheduler"]["looked_at"] > looked)
        assert server.policy.loaded() == {0, 1}
