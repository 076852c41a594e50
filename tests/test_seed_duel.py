"""The live duel against the base: who is asked, what the gate makes of it, and that it ends with the duel beside it."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tests.loop_rig import Rig, open_rig
from tests.loop_rig import settings as rig_settings
from tests.server import POLICY, RunningServer, World, fake_config, user_of
from tests.test_deploy import add_cycle, add_version
from tests.test_gate import GOOD, T0, PlainReport
from tests.test_gate_plan import explain
from tests.test_migrations_forward import at
from tests.test_serve import request, service

from pairloop.config import Config, GateSection, StoreSection, parse_config
from pairloop.errors import ConfigError, ConflictError
from pairloop.loop import cycle, deploy, pairs
from pairloop.loop.cycle import Loop
from pairloop.loop.gate import against_base, decide
from pairloop.loop.schedule import Scheduler
from pairloop.statistics import at_most
from pairloop.store import Store, cycles, doctor, duels, new_id, repair, schema, versions
from pairloop.types import (
    Alias,
    Cycle,
    CycleState,
    CycleStep,
    Duel,
    DuelKind,
    DuelPick,
    GroupKind,
    Interval,
    Pool,
    SamplingParams,
    VerdictKind,
    Version,
)

Serve = Callable[..., RunningServer]


# --- what the gate makes of the picks


def crowd(wins: int, losses: int, ties: int = 0) -> list[DuelPick]:
    """One vote each, well mixed."""
    outcomes = [1] * wins + [-1] * losses + [0] * ties
    random.Random(0).shuffle(outcomes)
    return [DuelPick(str(i), outcome, T0 + timedelta(seconds=i)) for i, outcome in enumerate(outcomes)]


WON = crowd(70, 10)
DEMANDING = GateSection(require=("seed_duel",), seed_share=0.2)


def verdict(seed_votes: list[DuelPick] | None, config: GateSection = DEMANDING, report: Any = GOOD, **changes: Any) -> Any:
    return decide(report, WON, config, opened_at=T0, now=T0, seed_votes=seed_votes, **changes)


@pytest.mark.parametrize(
    ("votes", "plain", "required"),
    [
        (crowd(50, 10), "PROMOTE", "PROMOTE"),
        (crowd(40, 30), "PROMOTE", "CONTINUE"),  # not shown to be as good: the duel goes on
        (crowd(25, 0), "PROMOTE", "CONTINUE"),  # too few raters
        (crowd(0, 25), "PROMOTE", "CONTINUE"),
        (crowd(10, 50), "REJECT", "REJECT"),
        (crowd(0, 0, 60), "PROMOTE", "CONTINUE"),  # ties are neither
        ([], "PROMOTE", "CONTINUE"),
        (None, "PROMOTE", "HOLD"),  # the duel was opened without one
    ],
)
def test_who_loses_to_the_base_is_not_promoted(votes: list[DuelPick] | None, plain: str, required: str) -> None:
    assert verdict(votes, GateSection()).kind == plain
    found = verdict(votes)
    assert found.kind == required
    assert "win rate against the base" in "; ".join(reason.text for reason in found.reasons)
    if required == "CONTINUE":
        late = decide(GOOD, WON, DEMANDING, opened_at=T0, now=T0 + timedelta(hours=25), seed_votes=votes)
        full = verdict(votes, picks_made=DEMANDING.max_picks)
        assert (late.kind, full.kind) == ("HOLD", "HOLD")
        assert [reason.passed for reason in late.reasons if reason.rule == "seed_duel"] == [None]


def test_a_verifier_or_judge_that_knows_the_base_is_asked_instead() -> None:
    knows = PlainReport({**GOOD.metrics, "seed_win_rate": Interval(0.7, 0.6, 0.8, 64)})
    assert verdict(crowd(10, 50), report=knows).kind is VerdictKind.PROMOTE
    failed = PlainReport(GOOD.metrics, {"seed_win_rate": "the judge is out of reach"})
    held = verdict(crowd(50, 10), report=failed)
    assert (held.kind, "out of reach" in held.text) == (VerdictKind.HOLD, True)


def test_the_limit_is_the_configured_one() -> None:
    lenient = DEMANDING.model_copy(update={"min_seed_win_rate": 0.35})
    assert verdict(crowd(40, 30)).kind is VerdictKind.CONTINUE
    assert verdict(crowd(40, 30), lenient).kind is VerdictKind.PROMOTE


@pytest.mark.parametrize("cluster", ["rater_day", "rater"])
def test_one_rater_is_one_voice_and_the_first_word_counts(cluster: str) -> None:
    config = GateSection.model_validate({"cluster": cluster})
    loud = [DuelPick("loud", 1, T0 + timedelta(seconds=100 + i)) for i in range(50)]
    rate, tally = against_base([DuelPick("loud", -1, T0), *loud, *crowd(3, 1, 1)], config)
    assert (tally.wins, tally.losses, tally.ties, tally.raters, rate.n) == (3, 2, 1, 6, 6)
    assert rate.mean == pytest.approx(3.5 / 6)
    assert rate.lo < 0.3
    assert rate.hi > 0.8


def test_the_interval_holds_at_every_look_with_ties_half() -> None:
    """Null crowds of wins, losses and ties are looked at after every tenth vote; Wilson's interval would err in a sixth."""
    bound, rng, missed, crowds, looks = cache(lambda k, n: at_most(k, n, 0.025)), random.Random(4), 0, 300, range(10, 201, 10)
    for _ in range(crowds):
        outcomes = [rng.choice((0.0, 0.5, 1.0)) if rng.random() < 0.4 else float(rng.random() < 0.5) for _ in range(200)]
        missed += any(bound(sum(outcomes[:n]), n) < 0.5 for n in looks)
    assert missed <= 0.025 * crowds


# --- the configuration


@pytest.mark.parametrize(
    ("gate", "label", "refusal"),
    [
        ({"require": ["seed_duel"]}, {}, r"gate\.require.*seed_duel.*gate\.seed_share.*label\.verifier or label\.judge_url"),
        ({"seed_share": 0.6}, {}, "seed_share"),
        ({"seed_share": -0.1}, {}, "seed_share"),
        ({"offline": True, "seed_share": 0.2}, {"judge_url": "http://127.0.0.1:1/v1"}, "no requests to share"),
        ({"require": ["seed_duel"], "seed_share": 0.2}, {}, None),
        ({"require": ["seed_duel"]}, {"verifier": "tests.loop_rig:score"}, None),
    ],
)
def test_what_cannot_be_demanded_is_refused(gate: dict[str, Any], label: dict[str, Any], refusal: str | None) -> None:
    data = {"policy": {"model": "fake", "name": "bot"}, "gate": gate, "label": label}
    if refusal is None:
        parse_config(data)
        return
    with pytest.raises(ConfigError, match=refusal):
        parse_config(data)


# --- who is asked


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    config = fake_config(tmp_path, gate={"seed_share": 0.25})
    with World(tmp_path / "world", config=config) as world:
        yield world


def open_beside(world: World, *, champion: int = 1, challenger: int = 2) -> tuple[Duel, Duel | None]:
    """The duel of a challenger with a champion, both better than the base, and the seed duel that was opened with it."""
    found = {number: world.add_version(number) for number in (1, 2)}
    with world.store.reading() as c:
        found[0] = versions.list_(c, POLICY)[0]
    world.alias(Alias.CHAMPION, champion)
    now = datetime.now(UTC)
    steps = tuple(CycleStep(state, {}, now) for state in (CycleState.CHECKING, CycleState.DUELLING))
    world.store.write(lambda c: cycles.insert(c, Cycle("cycle_1", POLICY, 1, champion, "test", now, steps)))
    duel = deploy.open_duel(
        world.store,
        world.policy,
        cycle_id="cycle_1",
        champion=found[champion],
        challenger=found[challenger],
        beside_base=world.config.gate.seed_share > 0,
        also=lambda _c, _duel: None,
    )
    with world.store.reading() as c:
        return duel, duels.seed_of(c, duel)


def asked(world: World, n: int = 2, pool: Pool = Pool.GATE, **fields: Any) -> Counter[tuple[str | None, tuple[int, ...]]]:
    """Of 400 requests: by the duel, and the versions in their order."""
    chat = service(world)

    async def plans() -> Counter[tuple[str | None, tuple[int, ...]]]:
        found = [await chat.plan(request(user=user_of(pool), n=n, **fields)) for _ in range(400)]
        return Counter((plan.group.duel_id, plan.versions) for plan in found)

    return asyncio.run(plans())


def test_a_share_of_the_duels_requests_is_against_the_base_with_sides_by_coin(world: World) -> None:
    duel, seed = open_beside(world)
    assert seed is not None
    assert (seed.kind, seed.champion, seed.challenger, seed.cycle_id) == (DuelKind.SEED, 0, 2, duel.cycle_id)
    found = asked(world)
    assert set(found) == {(duel.duel_id, (1, 2)), (duel.duel_id, (2, 1)), (seed.duel_id, (0, 2)), (seed.duel_id, (2, 0))}
    of_seed = {sides: count for (duel_id, sides), count in found.items() if duel_id == seed.duel_id}
    assert 65 < sum(of_seed.values()) < 135  # 100 ± 4 standard deviations
    assert min(of_seed.values()) > 25
    assert set(asked(world, pool=Pool.TRAIN)) == {(None, (1, 1))}
    assert set(asked(world, n=1)) == {(None, (1,))}
    assert set(asked(world, params=SamplingParams(temperature=0.0))) == {(None, (1, 1))}  # telling


def test_where_the_base_is_the_champion_there_is_one_duel(world: World) -> None:
    duel, seed = open_beside(world, champion=0, challenger=1)
    assert seed is None
    assert set(asked(world)) == {(duel.duel_id, (0, 1)), (duel.duel_id, (1, 0))}


def test_without_a_share_there_is_none(tmp_path: Path) -> None:
    with World(tmp_path / "world") as world:
        duel, seed = open_beside(world)
        assert seed is None
        assert {duel_id for duel_id, _ in asked(world)} == {duel.duel_id}


def test_a_duel_that_lost_its_champion_takes_its_seed_duel_with_it(world: World) -> None:
    open_beside(world)
    world.alias(Alias.CHAMPION, 0)
    assert set(asked(world)) == {(None, (0, 0))}


def test_one_open_duel_of_each_kind_and_the_gates_is_the_duel(world: World) -> None:
    duel, seed = open_beside(world)
    assert seed is not None
    with world.store.reading() as c:
        assert duels.current(c, POLICY) == duel
        assert duels.opened(c, POLICY) == {DuelKind.GATE: duel, DuelKind.SEED: seed}
        assert duels.list_(c, POLICY) == [duel]
        assert set(duels.list_(c, POLICY, kind=None)) == {duel, seed}
        assert duels.number(c, duel) == 1
    for other in (duel, seed):
        twin = Duel(new_id("duel"), "cycle_1", POLICY, other.champion, 2, datetime.now(UTC), kind=other.kind)
        with pytest.raises(ConflictError, match=other.duel_id):
            world.store.write(partial(duels.open, duel=twin))


# --- how it ends


def retire(world: World, version: Version) -> None:
    deploy.retire(world.store, world.policy, version, reason="a guard broke")


def by_hand(world: World, version: Version) -> None:
    deploy.promote_by_hand(world.store, world.policy, POLICY, number=version.number, reason="trust me")


def rollback(world: World, _version: Version) -> None:
    at = datetime.now(UTC)
    moves: tuple[tuple[int, int | None], ...] = ((0, None), (1, 0))
    for number, previous in moves:
        moved = partial(versions.record_promotion, policy=POLICY, number=number, previous=previous, action="promote", reason="")
        world.store.write(partial(moved, cycle_id=None, at=at))
    deploy.rollback(world.store, POLICY, to=0, reason="complaints")


def canary_stopped(world: World, version: Version) -> None:
    deploy.start_canary(
        world.store, world.policy, world.config, number=version.number, share=0.1, reason="won", cycle_id="cycle_1"
    )
    with world.store.reading() as c:
        assert set(duels.opened(c, POLICY)) == {DuelKind.GATE, DuelKind.SEED}  # both go on with the canary
    deploy.stop_canary(world.store, POLICY, reason="a guard broke")


@pytest.mark.parametrize("end", [retire, by_hand, rollback, canary_stopped])
def test_whatever_ends_the_duel_ends_both(world: World, end: Callable[[World, Version], None]) -> None:
    open_beside(world)
    with world.store.reading() as c:
        version = versions.get(c, POLICY, 2)
    assert version is not None
    end(world, version)
    with world.store.reading() as c:
        assert duels.opened(c, POLICY) == {}
        assert versions.alias(c, POLICY, Alias.CHALLENGER) is None


def test_the_doctor_finds_and_closes_a_seed_duel_that_was_left_open(tmp_path: Path) -> None:
    with open_rig(rig_settings(tmp_path)) as rig:
        champion, challenger = add_version(rig, 1), add_version(rig, 2)
        deploy.promote_by_hand(rig.store, rig.policy, "bot", number=1, reason="better")
        cycle_id = add_cycle(rig)
        duel = deploy.open_duel(
            rig.store,
            rig.policy,
            cycle_id=cycle_id,
            champion=champion,
            challenger=challenger,
            beside_base=True,
            also=lambda _c, _duel: None,
        )
        assert doctor.check(rig.store) == []
        rig.store.write(lambda c: duels.close(c, duel.duel_id, datetime.now(UTC)))
        with rig.store.reading() as c:
            seed = duels.seed_of(c, duel)
        assert seed is not None
        assert [(problem.code, problem.subject) for problem in doctor.check(rig.store)] == [("open_duel", seed.duel_id)]
        assert len(repair.mend(rig.store, actor="test").repairs) == 1
        assert doctor.check(rig.store) == []
        with rig.store.reading() as c:
            assert duels.opened(c, "bot") == {}


# --- a whole cycle


DEMANDS: dict[str, Any] = {"require": ["seed_duel"], "seed_share": 0.5, "max_picks": 2_000}


@pytest.fixture
def spoilt(tmp_path: Path) -> Iterator[Rig]:
    """A champion that was promoted by hand though it is much worse than the base: skill -2 beside 0."""
    with open_rig(rig_settings(tmp_path, gate=DEMANDS)) as rig:
        add_version(rig, -2)
        deploy.promote_by_hand(rig.store, rig.policy, "bot", number=1, reason="it looked good")
        yield rig


def kinds(rig: Rig) -> tuple[str, str]:
    """What the gate says now without and with the rule."""
    careless = rig.loop.config.model_copy(update={"gate": GateSection(max_picks=2_000)})
    with rig.store.reading() as c:
        record = rig_cycle(rig).record(CycleState.DUELLING)
        assert record is not None
        found = [cycle.standing(c, config, rig.duel, record["report"]) for config in (careless, rig.loop.config)]
    return found[0].kind.value, found[1].kind.value


def test_who_only_beats_a_spoilt_champion_is_held(spoilt: Rig) -> None:
    """The planted fault: skill -1 beats the champion's -2, and loses to the base's 0."""
    rig, made = spoilt, 0
    rig.serve(60)
    assert cycle.run(rig.loop, trigger="test").state is CycleState.DUELLING
    with rig.store.reading() as c:
        seed = duels.seed_of(c, rig.duel)
    assert seed is not None
    while made < 1_000 and kinds(rig)[0] == "CONTINUE":
        rig.judge(50)
        made += 50
    assert kinds(rig) == ("PROMOTE", "CONTINUE")

    current, scheduler = rig_cycle(rig), Scheduler(rig.loop)
    assert scheduler._worth_a_look(current)
    to_train = pairs.count_new(rig.store, rig.loop.config)
    rig.judge(20, duel=seed)
    assert pairs.count_new(rig.store, rig.loop.config) == to_train
    assert scheduler._worth_a_look(current)  # for picks against the base, too
    assert not scheduler._worth_a_look(current)
    assert kinds(rig) == ("PROMOTE", "CONTINUE")
    now = cycle.status(rig.store, rig.loop.config).duel
    assert now is not None
    assert now.against_base is not None
    assert (now.seed_picks, now.picks) == (20, made)
    told = cycle.status(rig.store, rig.loop.config).as_json()["duel"]["against_base"]
    assert told == {**now.against_base.as_json(), "raters": 20}
    assert set(told["win_rate"]) == {"mean", "lo", "hi", "n"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in DEMANDS.items()]
    config = '[policy]\nmodel = "fake"\nname = "bot"\n[gate]\n' + "\n".join(lines)
    (rig.loop.config.state_dir / "pairloop.toml").write_text(config, encoding="utf-8")
    assert "says nothing before 30 raters" in explain(rig.loop.config.state_dir)

    short = rig_settings(rig.loop.config.state_dir, gate={**DEMANDS, "max_picks": made})
    held = cycle.run(Loop(rig.store, rig.policy, short, "tester:0"), trigger="test")
    assert held.state is CycleState.HELD
    assert "says nothing before 30 raters" in held.steps[-1].record["reason"]
    assert cycle.kept_against_base(held) == now.against_base
    assert rig.champion == 1
    with rig.store.reading() as c:
        assert duels.opened(c, "bot") == {}


def rig_cycle(rig: Rig) -> Cycle:
    with rig.store.reading() as c:
        found = cycles.current(c, "bot")
    assert found is not None
    return found


# --- on the wire


def test_nobody_is_told_that_the_base_answered_before_the_pick(serve: Serve, tmp_path: Path) -> None:
    config = fake_config(tmp_path, gate={"seed_share": 0.5})
    server = serve(config=config)
    duel, seed = open_beside(server)
    assert seed is not None
    judge, replies = user_of(Pool.GATE), dict[str | None, Any]()
    while set(replies) != {duel.duel_id, seed.duel_id}:
        reply = server.chat(n=2, user=judge)
        group = server.group(reply.json()["id"])
        assert group.kind is GroupKind.DUEL
        replies[group.duel_id] = reply
    shapes = [shape(reply.json()) for reply in replies.values()]
    assert shapes[0] == shapes[1]  # nothing says which duel it is, nor who is who
    assert all(
        "@" not in reply.text and not [name for name in reply.headers if "version" in name] for reply in replies.values()
    )
    inference = replies[seed.duel_id].json()["id"]
    assert "versions" not in server.http.get(f"/v1/chat/completions/{inference}").json()
    picked = server.http.post("/v1/preferences", json={"inference_id": inference, "chosen_index": 0, "rater_id": judge})
    assert sorted(picked.json()["versions"]) == [f"{POLICY}@0", f"{POLICY}@2"]
    listed = {one["id"]: one for one in server.http.get("/v1/duels").json()["data"]}
    assert {name: (one["kind"], one["champion"], one["picks"]) for name, one in listed.items()} == {
        duel.duel_id: ("gate", f"{POLICY}@1", 0),
        seed.duel_id: ("seed", f"{POLICY}@0", 1),
    }
    (point,) = server.http.get("/v1/status").json()["curve"]
    assert point["version"] == 2
    assert point["met_base"]["votes"] == 1


def shape(body: dict[str, Any]) -> Any:
    """What a reply says beside its own id, time and texts."""
    return {name: body[name] for name in ("model", "object", "system_fingerprint")} | {"keys": sorted(body)}


# --- from the release before


def test_duels_of_the_release_before_are_the_gates(blank_url: str, tmp_path: Path) -> None:
    config = Config(state_dir=tmp_path, store=StoreSection(database=blank_url))
    before = at(config.database_url, "0009")["duels"]
    with Store.open(config) as store, store.reading() as c:
        assert {row.duel_id: row.kind for row in c.execute(sa.select(schema.duels))} == dict.fromkeys(
            (row["duel_id"] for row in before), "gate"
        )
        assert len(duels.list_(c, "bot")) == len(before)
