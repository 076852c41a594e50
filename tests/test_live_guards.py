"""Live guards: a version that is worse is taken back by itself, within a bounded number of requests; a healthy twin is not."""

from __future__ import annotations

import asyncio
import math
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.faulty_policy import FaultyPolicy, ask, service
from tests.server import POLICY, RunningServer, World, fake_config

from pairloop.config import DeploySection
from pairloop.errors import ConfigError, EngineError
from pairloop.loop import deploy, raters
from pairloop.loop.deploy import guards
from pairloop.loop.deploy.guards import Seen
from pairloop.loop.feedback import MetricValue, record_metric
from pairloop.loop.serve import Answer
from pairloop.statistics import STAKES, at_most, log_excess
from pairloop.store import audit, traffic, versions
from pairloop.store.quarantines import Action
from pairloop.store.traffic import Counts, class_of
from pairloop.types import Alias, Completion, FinishReason, SamplingParams

T0 = datetime(2026, 1, 5, tzinfo=UTC)
SECTION = DeploySection()
BROKEN = 80
"""Requests within which each planted fault is found."""


def champion(world: World) -> int | None:
    with world.store.reading() as c:
        return versions.alias(c, POLICY, Alias.CHAMPION)


def promoted(tmp_path: Path, policy: FaultyPolicy) -> World:
    """A world whose former champion answered 300 requests an hour ago, as the fake policy does, before version 1 came."""
    world = World(tmp_path / "world", config=fake_config(tmp_path), policy=policy)
    earlier = traffic.minute_of(datetime.now(UTC) - timedelta(hours=1))
    usual = Counts(300, 1, 2, Counter({class_of(40): 300}), Counter({class_of(10): 300}))
    world.store.write(lambda c: traffic.put(c, POLICY, 0, earlier, "another process", usual))
    deploy.promote(world.store, FakeProbe(world).policy, world.add_version(1), reason="won")
    return world


class FakeProbe:
    """A healthy policy to probe with: the planted faults are those that a probe does not find."""

    def __init__(self, world: World) -> None:
        self.policy = FaultyPolicy()
        with world.store.reading() as c:
            base = versions.get(c, POLICY, 0)
        assert base is not None
        self.policy.load(base)


@pytest.mark.parametrize(
    ("how", "guard"),
    [
        ("error", "errors"),
        ("slow", "latency"),
        ("long", "too_long"),
        ("refuses", "refusal"),
        pytest.param("empty", "refusal", marks=pytest.mark.slow),
    ],
)
def test_a_version_that_breaks_a_guard_is_rolled_back(tmp_path: Path, how: str, guard: str) -> None:
    with promoted(tmp_path, FaultyPolicy(1, how)) as world:
        watch = deploy.Watch(world.store, world.policy, world.config)
        watch.look()
        assert champion(world) == 1
        ask(world, BROKEN, first=1_000)
        watch.look()
        assert champion(world) == 0
        watch.look()  # the restored champion is under no watch
        with world.store.reading() as c:
            moves = versions.promotions(c, POLICY)
            entry = audit.list_(c, action="rollback")[0]
            assert versions.past_champions(moves) == [0]
        assert moves[-1].action == "rollback"
        assert moves[-1].reason.startswith("a live guard broke: ")
        assert f"{guard}: " in moves[-1].reason
        assert (entry.actor, entry.subject) == ("scheduler", f"{POLICY}@0")
        assert {one["rule"] for one in entry.details["guards"] if one["passed"] is False} >= {guard}


def test_a_healthy_twin_stays(tmp_path: Path) -> None:
    with promoted(tmp_path, FaultyPolicy()) as world:
        for i in range(8):
            ask(world, 20, first=1_000 + 20 * i)
            deploy.Watch(world.store, world.policy, world.config).look()
        assert champion(world) == 1
        with world.store.reading() as c:
            found = deploy.standing(c, world.config, datetime.now(UTC))
            assert deploy.standing(c, world.config, datetime.now(UTC) + timedelta(hours=24)) is None
        assert found is not None
        assert (found.version, found.former, found.broken) == (1, 0, None)
        assert found.answers == 160
        assert {reason.rule for reason in found.reasons if reason.passed} >= {"errors", "latency", "too_long", "too_short"}


def test_without_auto_rollback_it_is_told_and_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with promoted(tmp_path, FaultyPolicy(1)) as world:
        ask(world, BROKEN, first=1_000)
        told = fake_config(tmp_path, deploy={"auto_rollback": False})
        watch = deploy.Watch(world.store, world.policy, told)
        watch.look()
        watch.look()
        assert champion(world) == 1
        assert [record.levelname for record in caplog.records if "auto_rollback" in record.message] == ["ERROR"]


def test_an_engine_that_fails_for_everybody_is_not_the_versions_fault(tmp_path: Path) -> None:
    with promoted(tmp_path, FaultyPolicy(1)) as world:
        ask(world, BROKEN, first=1_000)
        engine = FaultyPolicy(0)  # the former champion does not answer either
        watch, now = deploy.Watch(world.store, engine, world.config), datetime.now(UTC)
        with pytest.raises(EngineError, match="kernel"):
            watch.look(now)
        engine.broken = None  # the engine is back, and what happened meanwhile is no reason to go back
        for minutes in (1, 3, 4):
            watch.look(now + timedelta(minutes=minutes))
            assert champion(world) == 1
        world.store.write(
            lambda c: traffic.put(c, POLICY, 1, traffic.minute_of(now + timedelta(minutes=9)), "later", Counts(0, BROKEN))
        )
        watch.look(now + timedelta(minutes=10))
        assert champion(world) == 0


def test_an_outage_is_forgiven_for_every_process_and_after_a_restart(tmp_path: Path) -> None:
    with promoted(tmp_path, FaultyPolicy(1)) as world:
        chat = service(world)
        ask(world, BROKEN, chat=chat, first=1_000)
        engine, now = FaultyPolicy(0), datetime.now(UTC)
        with pytest.raises(EngineError, match="kernel"):
            deploy.Watch(world.store, engine, world.config).look(now)
        ask(world, 1, chat=chat, first=2_000)  # the serving process writes its whole minute once more
        engine.broken = None
        for minutes in (0, 3):
            deploy.Watch(world.store, engine, world.config).look(now + timedelta(minutes=minutes))
            assert champion(world) == 1


def test_one_user_cannot_break_a_guard(tmp_path: Path) -> None:
    with promoted(tmp_path, FaultyPolicy(1)) as world:
        chat = service(world)
        replies = [ask(world, 1, chat=chat, first=7)[0] for _ in range(60)]
        assert not any(isinstance(reply, Answer) for reply in replies)
        deploy.Watch(world.store, world.policy, world.config).look()
        assert champion(world) == 1


@pytest.mark.parametrize("fields", [{"max_tokens": 2}, {"params": SamplingParams(stop=("a",))}])
def test_a_limit_of_the_clients_own_says_nothing_of_the_version(tmp_path: Path, fields: dict[str, Any]) -> None:
    with promoted(tmp_path, FaultyPolicy()) as world:
        replies = ask(world, BROKEN, first=1_000, **fields)
        assert all(isinstance(reply, Answer) for reply in replies)
        deploy.Watch(world.store, world.policy, world.config).look()
        assert champion(world) == 1
        with world.store.reading() as c:
            found = deploy.standing(c, world.config, datetime.now(UTC))
        assert found is not None
        assert found.answers == BROKEN  # they count, as answers that did not fail


def test_those_who_do_not_say_who_they_are_count_as_one_caller(tmp_path: Path) -> None:
    with promoted(tmp_path, FaultyPolicy(1)) as world:
        chat = service(world)
        ask(world, BROKEN, chat=chat, user=None, caller="key:1")
        deploy.Watch(world.store, world.policy, world.config).look()
        assert champion(world) == 1
        for i in range(2, 6):
            ask(world, BROKEN, chat=chat, user=None, caller=f"key:{i}")
        deploy.Watch(world.store, world.policy, world.config).look()
        assert champion(world) == 0


def test_thumbs_of_raters_in_quarantine_break_no_guard(tmp_path: Path) -> None:
    with World(tmp_path / "world", config=fake_config(tmp_path)) as world:

        def thumbs_of(who: str, n: int, *, up: bool) -> None:
            for reply in ask(world, n, user=f"{who}-{{}}"):
                assert isinstance(reply, Answer)
                thumb = MetricValue(reply.group.group_id, "thumbs", value=up, choice_index=0)
                record_metric(world.store, thumb)

        thumbs_of("good", 40, up=True)
        deploy.promote(world.store, world.policy, world.add_version(1), reason="won")
        thumbs_of("hostile", 20, up=False)

        def is_broken() -> bool:
            with world.store.reading() as c:
                found = deploy.standing(c, world.config, datetime.now(UTC))
            assert found is not None
            return found.broken is not None

        assert is_broken()
        for i in range(20):
            raters.decide(world.store, world.config, f"hostile-{i}", Action.QUARANTINE, "one campaign", actor="cli:ada")
        assert not is_broken()
        for i in range(20):
            raters.decide(world.store, world.config, f"hostile-{i}", Action.RELEASE, "a mistake", actor="cli:ada")
        assert is_broken()


def test_a_busy_store_blinds_the_guards_only_for_its_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was counted meanwhile is written once the store takes it, and counting goes on."""
    config = fake_config(tmp_path, store={"max_waiting": 1})
    with World(tmp_path / "world", config=config) as world:
        recorder, start = service(world).recorder, datetime.now(UTC) - timedelta(minutes=2)

        def answered(who: str) -> None:
            answer: Future[tuple[Completion, ...]] = Future()
            recorder.follow(0, who, answer)
            answer.set_result((Completion("hi", (1,), (-0.5,), 0, FinishReason.STOP),))

        def written() -> int:
            with world.store.reading() as c:
                found = traffic.by_minute(c, POLICY, 0, start, datetime.now(UTC) + timedelta(minutes=2))
            return sum(counts.answers for counts in found.values())

        async def once(holds: Callable[[], bool]) -> None:
            async with asyncio.timeout(20):
                while not holds():
                    await asyncio.sleep(0.01)

        async def through_a_busy_moment() -> None:
            flushing, held = asyncio.create_task(recorder.keep_flushing(every_s=0.01)), threading.Event()
            world.store.submit(lambda _: held.wait(20))
            answered("ann")
            try:
                await once(lambda: flushing.done() or "is written later" in caplog.text)
            finally:
                held.set()
            await once(lambda: flushing.done() or written() == 1)
            answered("bob")
            await once(lambda: flushing.done() or written() == 2)
            flushing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await flushing

        asyncio.run(through_a_busy_moment())


def test_a_canary_of_all_or_a_bad_pattern_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deploy.*leaves nobody to compare with"):
        fake_config(tmp_path, deploy={"canary_share": 1.0})
    with pytest.raises(ConfigError, match=r"deploy\.refusals.*not a regular expression"):
        fake_config(tmp_path, deploy={"refusals": ["("]})


# --- the statistics


def exact_excess(k: int, n: int, p: float) -> float:
    """By the definition: the mean over bets of the likelihood ratios."""
    ratios = [(p + (1 - p) * s) ** k * (1 - p - (1 - p) * s) ** (n - k) for s in STAKES]
    return math.log(sum(ratios) / len(ratios) / (p**k * (1 - p) ** (n - k)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.floats(0, 1), st.floats(0.01, 0.99))
def test_the_evidence_is_what_it_says(n: int, part: float, p: float) -> None:
    k = round(part * n)
    assert log_excess(k, n, p) == pytest.approx(exact_excess(k, n, p), abs=1e-6)
    bound = at_most(k, n, 0.01)
    assert k / n <= bound <= 1
    assert log_excess(k, n, min(1.0, p + 0.01)) <= log_excess(k, n, p) + 1e-9


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5])
def test_the_evidence_has_mean_one_where_nothing_is_wrong(p: float) -> None:
    n = 40
    chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    assert math.fsum(chance * math.exp(log_excess(k, n, p)) for k, chance in enumerate(chances)) == pytest.approx(1)


# --- a day of traffic, minute by minute, looked at again and again


def one_minute(rng: random.Random, shape: Mapping[str, float]) -> Counts:
    counts = Counts(latency=Counter(), length=Counter())
    for _ in range(rng.randrange(4)):
        if rng.random() < shape.get("errors", 0.005):
            counts.errors += 1
            continue
        counts.answers += 1
        counts.refusals += rng.random() < shape.get("refusal", 0.03)
        counts.latency[class_of(20 * shape.get("latency", 1) * math.exp(rng.gauss(0, 0.4)))] += 1
        counts.length[class_of(80 * shape.get("length", 1) * math.exp(rng.gauss(0, 0.7)))] += 1
    return counts


def answers_until_broken(seed: int, shape: Mapping[str, float], *, minutes: int) -> tuple[int, str] | None:
    """After how many requests a guard breaks, and which; looks come every 2 minutes in the first hour, then every 40."""
    rng = random.Random(seed)
    former = Seen({T0 - timedelta(minutes=i): one_minute(rng, {}) for i in range(1, 600)}, {})
    seen: dict[datetime, Counts] = {}
    for i in range(minutes):
        seen[T0 + timedelta(minutes=i)] = one_minute(rng, shape)
        if (i < 60 and i % 2 == 0) or i % 40 == 0:
            broken = guards.broken(guards.look(Seen(seen, {}), former, SECTION, T0))
            if broken is not None:
                return sum(counts.answers + counts.errors for counts in seen.values()), broken.partition(":")[0]
    return None


@pytest.mark.parametrize(
    ("shape", "rule", "within"),
    [
        ({"errors": 0.5}, "errors", 100),
        ({"latency": 3}, "latency", 300),
        ({"length": 0.25}, "too_short", 400),
        pytest.param({"errors": 0.1}, "errors", 900, marks=pytest.mark.slow),
        pytest.param({"refusal": 0.3}, "refusal", 300, marks=pytest.mark.slow),
        pytest.param({"length": 4}, "too_long", 300, marks=pytest.mark.slow),
    ],
)
def test_what_is_worse_is_found_in_time(shape: Mapping[str, float], rule: str, within: int) -> None:
    found = answers_until_broken(1, shape, minutes=720)
    assert found is not None
    assert found[1] == rule
    assert found[0] <= within


def test_what_breaks_late_is_not_hidden_behind_a_good_past() -> None:
    rng = random.Random(3)
    former = Seen({T0 - timedelta(minutes=i): one_minute(rng, {}) for i in range(1, 600)}, {})
    good = {T0 + timedelta(minutes=i): one_minute(rng, {}) for i in range(20 * 60)}
    assert guards.broken(guards.look(Seen(good, {}), former, SECTION, T0)) is None
    late = {T0 + timedelta(minutes=20 * 60 + i): one_minute(rng, {"errors": 0.5}) for i in range(40)}
    assert "errors" in str(guards.broken(guards.look(Seen(good | late, {}), former, SECTION, T0)))


def test_thumbs_that_turn_down_break_a_guard() -> None:
    def thumbs(seed: int, down: float) -> dict[datetime, tuple[int, int]]:
        rng = random.Random(seed)
        return {T0 + timedelta(minutes=i): (2, sum(rng.random() < down for _ in range(2))) for i in range(150)}

    former = Seen({}, thumbs(1, 0.2))
    reasons = {reason.rule: reason for reason in guards.look(Seen({}, thumbs(2, 0.7)), former, SECTION, T0)}
    assert reasons["thumbs"].passed is False
    assert re.search(r"\(\d+\.\d %\), more than \d+\.\d %$", reasons["thumbs"].text)
    assert reasons["errors"].passed is None  # nothing is known, so nothing is said
    same = guards.look(Seen({}, thumbs(3, 0.2)), former, SECTION, T0)
    assert guards.broken(same) is None


@pytest.mark.slow
def test_a_version_that_is_no_worse_is_rarely_taken_back() -> None:
    """All guards together, looked at all day: at most ``deploy.alpha`` = 1 % by proof, and here none of 60."""
    assert [found for seed in range(60) if (found := answers_until_broken(seed, {}, minutes=1_440)) is not None] == []


@pytest.mark.slow
def test_a_server_takes_a_failing_version_back_by_itself(tmp_path: Path) -> None:
    """A whole server with its scheduler: promoted over the API, it fails; after some requests the former champion answers."""
    policy = FaultyPolicy()
    with RunningServer(tmp_path / "server", policy=policy, turning=True) as server:
        for i in range(60):
            assert server.chat(user=f"user-{i}").status_code == 200
        server.add_version(1)
        assert server.http.post(f"/v1/versions/{POLICY}@1/promote", json={"reason": "better"}).status_code == 200
        policy.broken = 1  # from now on, as a kernel that dies under load
        until_s, failed = time.monotonic() + 60.0, 0
        while server.chat(user=f"user-{1_000 + failed}").status_code != 200:
            failed += 1
            assert time.monotonic() < until_s, "the watch took nothing back"
        assert failed >= 30
        assert champion(server) == 0
        assert server.http.get("/v1/audit").json()["data"][0]["action"] == "rollback"
