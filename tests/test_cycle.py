"""The cycle on the fake policy, with a real store and the real training child: whole turns, their ends, and resuming."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection
from tests.loop_rig import Picker, Rig, better, coin, open_rig, settings, worse

from pairloop.config import Config
from pairloop.errors import ConfigError, ConflictError
from pairloop.loop import cycle, deploy
from pairloop.loop.cycle.context import CycleLease
from pairloop.policy.fake import FakePolicy, quality
from pairloop.policy.protocols import SampleRequest
from pairloop.store import cycles, datasets, doctor, duels, leases, runs, triggers, verdicts, versions
from pairloop.types import Alias, Completion, Cycle, CycleState, Group, Label, Pool, RunStatus, VerdictKind

S = CycleState


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return settings(tmp_path)


@pytest.fixture
def rig(config: Config) -> Iterator[Rig]:
    with open_rig(config) as opened:
        yield opened


def turn(rig: Rig, trigger: str = "test") -> Cycle:
    return cycle.run(rig.loop, trigger=trigger)


def duel_out(rig: Rig, picker: Picker = better, *, at_most: int = 300) -> Cycle:
    """Picks in waves, with a look after each, until the duel ends."""
    done = turn(rig)
    made = 0
    while done.state is S.DUELLING and made < at_most:
        rig.judge(20, picker)
        made += 20
        done = turn(rig)
    return done


def states(done: Cycle) -> list[CycleState]:
    return [step.state for step in done.steps]


def last_verdict(rig: Rig, done: Cycle) -> VerdictKind:
    with rig.store.reading() as c:
        return verdicts.for_cycle(c, done.cycle_id)[-1][1].kind


# --- whole cycles


def test_two_cycles_from_picks_to_a_better_champion(rig: Rig) -> None:
    for number in (1, 2):
        rig.serve(60)
        done = turn(rig, "30 new pairs")
        assert done.state is S.DUELLING
        assert rig.duel.challenger == number
        assert rig.champion == number - 1
        done = duel_out(rig)
        assert states(done) == [S.BUILDING, S.TRAINING, S.CHECKING, S.DUELLING, S.PROMOTED]
        assert done.number == number
        assert done.trigger == "30 new pairs"
        assert rig.champion == number
        assert "e-value" in done.steps[-1].record["reason"]
    with rig.store.reading() as c:
        line = versions.list_(c, "bot")
        assert [version.parent for version in line] == [None, 0, 1]
        assert [json.loads((Path(v.path) / "fake.json").read_text())["skill"] for v in line[1:]] == [1, 2]
        assert [(p.action, p.number, p.previous) for p in versions.promotions(c, "bot")] == [
            ("promote", 1, 0),
            ("promote", 2, 1),
        ]
        assert versions.alias(c, "bot", Alias.CHALLENGER) is None
        assert duels.current(c, "bot") is None
        told = verdicts.for_cycle(c, cycles.list_(c, "bot")[0].cycle_id)
    assert [verdict.kind for _, verdict in told] == [VerdictKind.CONTINUE, VerdictKind.PROMOTE]  # not one row per look
    assert told[-1][1].raters >= 50
    assert doctor.check(rig.store) == []


def test_random_picks_hold_and_their_data_stay_usable(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path, gate={"max_picks": 100})) as rig:
        _random_picks_hold(rig)


def _random_picks_hold(rig: Rig) -> None:
    rig.serve(60, train=coin)
    done = duel_out(rig, coin)
    assert done.state is S.HELD
    assert last_verdict(rig, done) is VerdictKind.HOLD
    assert "undecided after 100 picks" in done.steps[-1].record["reason"]
    assert rig.champion == 0
    assert rig.policy.loaded() == {0}
    with rig.store.reading() as c:
        assert versions.promotions(c, "bot")[-1].action == "retire"
        first = datasets.list_(c, "bot")[0]
    rig.serve(20)
    turn(rig)
    with rig.store.reading() as c:
        second = datasets.list_(c, "bot")[0]
    assert second.n_train > first.n_train  # the held round's pairs are still on-policy for the champion


def test_a_worse_challenger_is_rejected_by_the_duel(rig: Rig) -> None:
    rig.serve(60)
    done = duel_out(rig, worse)
    assert done.state is S.REJECTED
    assert "the champion is better" in done.steps[-1].record["reason"]
    assert rig.champion == 0


def test_a_failed_guardrail_rejects_before_any_traffic(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path, gate={"max_kl_to_base": 0.001})) as rig:
        rig.serve(60)
        done = turn(rig)
        assert states(done) == [S.BUILDING, S.TRAINING, S.CHECKING, S.REJECTED]
        assert "KL to the base" in done.steps[-1].record["reason"]
        with rig.store.reading() as c:
            assert duels.list_(c, "bot") == []
            assert versions.alias(c, "bot", Alias.CHALLENGER) is None
        assert last_verdict(rig, done) is VerdictKind.REJECT


def test_without_picks_there_is_nothing_to_train(rig: Rig) -> None:
    assert turn(rig).state is S.NOTHING_TO_TRAIN
    rig.serve(2, train=lambda *_: Label.TIE)
    record = turn(rig).steps[-1].record
    assert record["reason"].startswith("no new usable pairs: ")
    assert record["dropped"]["tie"] == 2
    assert record["counts"]["feedback_rows"] == 2
    assert record["labels"]["labelled"] == 0
    rig.serve(3)  # fewer than train.min_pairs
    done = turn(rig)
    assert states(done) == [S.BUILDING, S.TRAINING, S.NOTHING_TO_TRAIN]
    rig.serve(40, train=None, gate=None)
    assert turn(rig).state is S.NOTHING_TO_TRAIN


def test_an_offline_duel_promotes_without_traffic(tmp_path: Path) -> None:
    config = settings(tmp_path, gate={"offline": True}, label={"verifier": "tests.loop_rig:score"})
    with open_rig(config) as rig:
        rig.serve(600, train=None, gate=None)  # nobody picks: the verifier labels
        done = turn(rig)
        assert states(done) == [S.BUILDING, S.TRAINING, S.CHECKING, S.PROMOTED]
        tally = done.steps[-1].record["offline_duel"]
        assert tally["wins"] > tally["losses"]
        assert tally["errors"] == 0
        assert tally["prompts"] == 120
        assert done.steps[1].record["labels"]["labelled"] == 720
        assert rig.champion == 1


def test_an_offline_duel_that_ends_undecided_holds(tmp_path: Path) -> None:
    config = settings(tmp_path, gate={"offline": True}, label={"verifier": "tests.loop_rig:score"})
    with open_rig(config) as rig:
        rig.serve(60, train=None, gate=None)
        done = turn(rig)
        assert done.state is S.HELD
        assert "no more than 12 picks" in done.steps[-1].record["reason"]


def score_what_is_not_bad(_messages: list[dict[str, str]], completion: str) -> float:
    """A verifier that fails on the worst answers."""
    if quality(completion) < 10:
        raise ValueError("cannot parse that")
    return float(quality(completion))


def test_an_offline_duel_whose_verifier_fails_holds(tmp_path: Path) -> None:
    config = settings(tmp_path, gate={"offline": True}, label={"verifier": "tests.test_cycle:score_what_is_not_bad"})
    with open_rig(config) as rig:
        rig.serve(600, train=None, gate=None)
        done = turn(rig)
        assert done.state is S.HELD
        record = done.steps[-1].record
        assert record["offline_duel"]["wins"] > record["offline_duel"]["losses"]  # the rest would promote
        assert "an error is HOLD, never PROMOTE (the first: " in record["reason"]
        assert "score_what_is_not_bad raised ValueError (test_cycle.py:" in record["reason"]
        assert last_verdict(rig, done) is VerdictKind.HOLD
        assert rig.champion == 0


# --- moves by hand


def test_the_restored_champion_is_the_next_parent(rig: Rig) -> None:
    rig.serve(60)
    assert duel_out(rig).state is S.PROMOTED
    deploy.rollback(rig.store, "bot", reason="answers got odd", policy=rig.policy)
    assert rig.champion == 0
    rig.serve(60)
    done = duel_out(rig)
    assert done.parent == 0
    assert done.state is S.PROMOTED
    assert rig.champion == 2
    with rig.store.reading() as c:
        assert [version.parent for version in versions.list_(c, "bot")] == [None, 0, 0]


def test_a_promotion_by_hand_ends_the_duel_as_promoted(rig: Rig) -> None:
    rig.serve(60)
    assert turn(rig).state is S.DUELLING
    deploy.promote_by_hand(rig.store, rig.policy, "bot", number=1, reason="we are sure")
    done = turn(rig)
    assert done.state is S.PROMOTED
    assert "by hand" in done.steps[-1].record["reason"]
    assert rig.champion == 1


def test_a_rollback_during_the_duel_holds_the_challenger(rig: Rig) -> None:
    rig.serve(60)
    assert duel_out(rig).state is S.PROMOTED
    rig.serve(60)
    assert turn(rig).state is S.DUELLING
    deploy.rollback(rig.store, "bot", reason="wrong answers")
    done = turn(rig)
    assert done.state is S.HELD
    assert rig.champion == 0
    assert doctor.check(rig.store) == []


def test_a_champion_that_changed_while_training_holds_the_challenger(rig: Rig) -> None:
    rig.serve(60)
    assert duel_out(rig).state is S.PROMOTED
    rig.serve(60)
    checking = stop_before(rig, S.CHECKING)
    assert checking.state is S.CHECKING
    deploy.rollback(rig.store, "bot", reason="wrong answers")
    done = turn(rig)
    assert done.state is S.HELD
    assert "the champion became version 0" in done.steps[-1].record["reason"]


def stop_before(rig: Rig, state: CycleState) -> Cycle:
    """Run until the cycle has entered ``state``, and stop there."""

    def entered() -> bool:
        with rig.store.reading() as c:
            current = cycles.current(c, "bot")
        return current is not None and current.state is state

    return cycle.run(rig.loop, trigger="test", should_stop=entered)


def test_a_held_version_promoted_by_hand_does_not_train_on_its_picks_again(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path, gate={"max_picks": 100})) as rig:
        rig.serve(60, train=coin)
        assert duel_out(rig, coin).state is S.HELD
        deploy.promote_by_hand(rig.store, rig.policy, "bot", number=1, reason="we are sure")
        done = turn(rig)
        assert (done.parent, done.state) == (1, S.NOTHING_TO_TRAIN)
        assert done.steps[-1].record["reason"] == "no new usable pairs: no new feedback"


def test_a_state_directory_can_be_moved(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path / "here")) as rig:
        rig.serve(60)
        assert duel_out(rig).state is S.PROMOTED
        rig.serve(60)
        assert turn(rig).state is S.DUELLING
    shutil.move(tmp_path / "here", tmp_path / "there")
    with open_rig(settings(tmp_path / "there")) as rig:
        assert rig.policy.loaded() == {0, 1, 2}
        assert doctor.check(rig.store) == []
        assert duel_out(rig).state is S.PROMOTED
        assert _trained_on(rig)
        rig.serve(60)
        assert turn(rig).state is S.DUELLING  # trained on a parent that came along
        with rig.store.reading() as c:
            paths = [version.path for version in versions.list_(c, "bot")[1:]]
            paths += [dataset.path for dataset in datasets.list_(c, "bot")]
        assert {Path(path).parent for path in paths} == {tmp_path / "there" / "artifacts"}


# --- failures


def test_a_failure_ends_the_cycle_and_says_whose_fault_it_is(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path)) as rig:
        rig.serve(60)
        assert duel_out(rig).state is S.PROMOTED  # with adapters
        full = settings(tmp_path, policy={"method": "full"})
        other = cycle.Loop(rig.store, rig.policy, full, "tester:1")
        rig.serve(60)
        done = cycle.run(other, trigger="test")
        assert done.state is S.FAILED
        record = done.steps[-1].record
        assert (record["stage"], record["error_kind"]) == ("training", "user_error")
        assert "policy.method" in record["error"]
        with pytest.raises(ConfigError, match=r"policy\.method"):
            cycle.ensure_base(rig.store, rig.policy, full)
        assert duel_out(rig).state is S.PROMOTED  # its picks were not lost


def test_an_engine_that_broke_holds_instead_of_promoting(rig: Rig) -> None:
    rig.serve(60)
    stop_before(rig, S.CHECKING)
    rig.policy.close()
    done = turn(rig)
    assert done.state is S.HELD
    assert "the engine is closed" in done.steps[-1].record["reason"]


class ClosesAt(FakePolicy):
    """An engine that is closed under the cycle, when version 1 is first asked for so many tokens."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self._max_tokens = max_tokens
        self.stopped = False

    def sample(self, request: SampleRequest) -> Future[tuple[Completion, ...]]:
        if request.version == 1 and request.params.max_tokens == self._max_tokens:
            self.stopped = True
            self.close()
        return super().sample(request)


@pytest.mark.parametrize("during", ["the report", "the probe"])
def test_an_engine_that_closes_because_the_loop_stops_decides_nothing(rig: Rig, during: str) -> None:
    rig.serve(60)
    stop_before(rig, S.CHECKING)
    closing = ClosesAt(rig.loop.config.evaluate.max_tokens if during == "the report" else 8)
    cycle.ensure_base(rig.store, closing, rig.loop.config)
    loop = cycle.Loop(rig.store, closing, rig.loop.config, "tester:1")
    done = cycle.run(loop, trigger="test", should_stop=lambda: closing.stopped)
    assert closing.stopped
    assert done.state is S.CHECKING
    assert turn(rig).state is S.DUELLING


def test_an_unforeseen_error_is_recorded(rig: Rig) -> None:
    rig.serve(60)
    stop_before(rig, S.TRAINING)
    cycle.record_failure(rig.loop, ZeroDivisionError("division by zero"))
    with rig.store.reading() as c:
        done = cycles.list_(c, "bot")[0]
    assert done.state is S.FAILED
    assert done.steps[-1].record["error"] == "ZeroDivisionError"
    assert done.steps[-1].record["error_kind"] == "system_error"


# --- one at a time


def test_a_second_cycle_at_the_same_time_is_refused(rig: Rig) -> None:
    with CycleLease(rig.loop), pytest.raises(ConflictError, match="one at a time"):
        turn(rig)
    rig.serve(60)
    assert turn(rig).state is S.DUELLING  # and no lease is held while it duels
    with rig.store.reading() as c:
        assert leases.holder(c, "cycle:bot") is None


def hold(rig: Rig, owner: str, *, ttl_s: float = 60.0) -> None:
    now = datetime.now(UTC)
    assert rig.store.write(lambda c: leases.acquire(c, "cycle:bot", owner, now=now, ttl_s=ttl_s)) is not None


def test_a_holder_that_died_is_not_waited_for(rig: Rig) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    hold(rig, f"{socket.gethostname()}:{gone.pid}/lease_x")
    assert turn(rig).state is S.NOTHING_TO_TRAIN
    hold(rig, f"{socket.gethostname()}:{os.getpid()}/lease_of_an_earlier_process_with_my_id")
    assert turn(rig).state is S.NOTHING_TO_TRAIN
    hold(rig, f"{socket.gethostname()}:{os.getppid()}/lease_y")  # alive
    with pytest.raises(ConflictError, match="lease_y"):
        turn(rig)


def test_a_holder_elsewhere_is_waited_for_until_its_lease_ran_out(rig: Rig) -> None:
    hold(rig, "another-host:1/lease_x")
    with pytest.raises(ConflictError, match="another-host"):
        turn(rig)
    past = datetime.now(UTC) - timedelta(minutes=2)
    rig.store.write(lambda c: leases.acquire(c, "cycle:bot", "another-host:1/lease_x", now=past, ttl_s=60))
    assert turn(rig).state is S.NOTHING_TO_TRAIN


def test_an_owner_that_lost_its_lease_writes_nothing(rig: Rig) -> None:
    def usurp(c: Connection) -> None:
        leases.release(c, "cycle:bot", str(leases.holder(c, "cycle:bot")))
        leases.acquire(c, "cycle:bot", "another-host:1/lease_x", now=datetime.now(UTC), ttl_s=60)

    with CycleLease(rig.loop) as lease:
        rig.store.write(usurp)
        with pytest.raises(ConflictError, match="took it over"):
            rig.store.write(lease.check)
        with pytest.raises(ConflictError, match="one at a time"):
            turn(rig)


def test_stopping_while_training_leaves_a_run_that_goes_on(rig: Rig) -> None:
    rig.serve(60)

    def training() -> bool:
        with rig.store.reading() as c:
            current = cycles.current(c, "bot")
            return current is not None and runs.for_cycle(c, current.cycle_id) is not None

    stopped = cycle.run(rig.loop, trigger="test", should_stop=training)
    assert stopped.state is S.TRAINING
    with rig.store.reading() as c:
        run = runs.for_cycle(c, stopped.cycle_id)
    assert run is not None
    assert run.status is RunStatus.RUNNING
    done = turn(rig)
    assert done.cycle_id == stopped.cycle_id
    assert done.state is S.DUELLING


# --- kill -9 at every write


@pytest.mark.slow
def test_killed_at_any_write_the_cycle_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """The lease, each step with what it records, the run, the version: dead right before each of them is written."""
    prepared = tmp_path / "prepared"
    config = settings(prepared, gate={"offline": True}, label={"verifier": "tests.loop_rig:score"}, evaluate={"prompts": 8})
    with open_rig(config) as rig:
        rig.serve(20, gate_n=200)
    here = Path(__file__)
    command = [sys.executable, str(here.with_name("dying_loop.py")), config.model_dump_json(), str(prepared)]
    path = os.pathsep.join([str(here.parents[1]), *filter(None, sys.path)])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lives = [json.loads(line) for line in done.stdout.splitlines()]
    print(f"{sum(life['died'] for life in lives)} deaths, each resumed")
    assert sum(life["died"] for life in lives) >= 8
    for life in lives:
        assert life["cycles"] == [["building", "training", "checking", "promoted"]], life
        assert (life["versions"], life["moves"], life["problems"]) == (2, ["promote"], []), life


# --- status and base


def test_status_tells_where_the_loop_stands(rig: Rig) -> None:
    config = rig.loop.config
    fresh = cycle.status(rig.store, config)
    assert (fresh.state, fresh.text, fresh.champion, fresh.duel) == ("idle", "idle, 0 new pairs of 30", 0, None)
    rig.serve(40)
    assert cycle.status(rig.store, config).new_pairs >= 30
    turn(rig)
    rig.judge(10)
    rig.store.write(lambda c: triggers.put(c, "bot", "by hand", datetime.now(UTC)))
    live = cycle.status(rig.store, config)
    assert cycle.status(rig.store, config, earlier=live).duel is live.duel
    assert live.state == "duelling"
    assert live.duel is not None
    assert live.text == f"duelling, 10 picks, about {live.duel.to_go} to go"
    assert live.duel.to_go >= 40
    assert (live.pending, live.challenger, live.number, live.new_pairs) == ("by hand", 1, 1, 0)
    assert live.progress == (10, 10 + live.duel.to_go)
    rig.judge(1)
    seen = cycle.status(rig.store, config, earlier=live).duel
    assert seen is not None
    assert seen.picks == 11
    duel_out(rig)
    after = cycle.status(rig.store, config)
    assert (after.last_cycle, after.last_state, after.champion, after.staleness) == (1, "promoted", 1, 1)
    assert after.last_verdict is not None
    assert after.last_verdict.verdict.kind is VerdictKind.PROMOTE
    assert (after.last_verdict.cycle, after.last_verdict.version) == (1, 1)
    assert after.pending == "by hand"


def test_status_as_json_carries_the_duel_the_clock_and_the_reasons(rig: Rig) -> None:
    rig.serve(40)
    turn(rig)
    rig.judge(10)
    live = json.loads(json.dumps(cycle.status(rig.store, rig.loop.config).as_json(), allow_nan=False))
    assert (live["policy"], live["state"], live["number"], live["min_pairs"]) == ("bot", "duelling", 1, 30)
    duel = live["duel"]
    assert (duel["picks"], duel["wins"] + duel["losses"] + duel["ties"]) == (10, 10)
    assert live["progress"] == {"done": 10, "of": 10 + duel["to_go"]}
    assert duel["win_rate"]["mean"] == (duel["wins"] + duel["ties"] / 2) / 10
    assert live["run"]["status"] == "succeeded"
    assert datetime.fromisoformat(live["since"]) <= datetime.now(UTC)
    last = live["last_verdict"]
    assert (last["cycle"], last["version"], last["verdict"]["kind"]) == (1, 1, "CONTINUE")
    assert {"duel", "length_ratio"} <= {reason["rule"] for reason in last["verdict"]["reasons"]}
    assert {"new_pairs", "next_run_at", "staleness", "pending"} <= set(live)


def test_status_tells_how_far_the_training_is(rig: Rig) -> None:
    rig.serve(60)

    def training() -> bool:
        with rig.store.reading() as c:
            current = cycles.current(c, "bot")
            return current is not None and runs.for_cycle(c, current.cycle_id) is not None

    assert cycle.run(rig.loop, trigger="test", should_stop=training).state is S.TRAINING
    stopped = cycle.status(rig.store, rig.loop.config)
    assert stopped.run is not None
    run = stopped.run
    deadline = datetime.now(UTC) + timedelta(minutes=1)
    rig.store.write(
        lambda c: runs.heartbeat(
            c, run.run_id, owner=run.owner, at=datetime.now(UTC), lease_expires_at=deadline, progress={"step": 3, "of": 12}
        )
    )
    seen = cycle.status(rig.store, rig.loop.config)
    assert (seen.state, seen.progress, seen.text) == ("training", (3, 12), "training, step 3 of 12")
    assert seen.as_json()["run"] == {"id": run.run_id, "status": "running", "step": 3, "of": 12}


def test_a_new_cycle_uses_up_the_pending_trigger(rig: Rig) -> None:
    rig.store.write(lambda c: triggers.put(c, "bot", "by hand", datetime.now(UTC)))
    turn(rig)
    with rig.store.reading() as c:
        assert triggers.peek(c, "bot") is None


def test_another_base_model_is_refused(rig: Rig, tmp_path: Path) -> None:
    model = tmp_path / "other-model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).write_text("{}")
    with pytest.raises(ConfigError, match=r"begin a new policy\.name on the new model"):
        cycle.ensure_base(rig.store, rig.policy, settings(tmp_path, policy={"model": str(model)}))
    same = settings(tmp_path, policy={"model": str(model), "name": "second"})
    assert cycle.ensure_base(rig.store, rig.policy, same).number == 0
    (model / "model.safetensors").write_text("{ }")  # other weights under the same name
    with pytest.raises(ConfigError, match="is not the model"):
        cycle.ensure_base(rig.store, rig.policy, same)


def test_a_restart_in_mid_duel_loads_both_sides(rig: Rig) -> None:
    rig.serve(60)
    turn(rig)
    fresh = FakePolicy()
    cycle.ensure_base(rig.store, fresh, rig.loop.config)
    assert fresh.loaded() == {0, 1}
    fresh.close()


def test_the_duels_votes_are_never_trained_on(rig: Rig) -> None:
    rig.serve(60)
    duel_out(rig)
    turn(rig)
    with rig.store.reading() as c:
        assert cycles.list_(c, "bot")[0].state is S.NOTHING_TO_TRAIN
    assert {group.pool for group in _trained_on(rig)} == {Pool.TRAIN}


def _trained_on(rig: Rig) -> list[Group]:
    from pairloop.formats import snapshot
    from pairloop.store import groups

    with rig.store.reading() as c:
        dataset = datasets.list_(c, "bot")[-1]
        pairs = list(snapshot.read(Path(dataset.path) / "train.jsonl"))
        found = [groups.get(c, group_id) for pair in pairs for group_id in pair.group_ids]
    assert found
    return [group for group in found if group is not None]
