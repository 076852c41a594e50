"""Canary and shadow: who is answered by whom, what becomes of a cycle, and what stays loaded."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection
from tests.faulty_policy import ASK, FaultyPolicy, service
from tests.loop_rig import Rig, open_rig, settings, worse
from tests.server import POLICY, World, fake_config, user_of
from tests.test_deploy import add_version

from pairloop.config import Config
from pairloop.errors import ConflictError, InvalidRequestError, NotFoundError
from pairloop.loop import cycle, deploy, pairs
from pairloop.loop.cycle import ensure_base
from pairloop.loop.feedback import MetricValue, record_metric
from pairloop.loop.serve import ChatRequest, pool_of
from pairloop.store import Store, audit, canaries, feedback, groups, schema, stored, traffic, versions
from pairloop.store.canaries import Canary
from pairloop.store.traffic import Counts, class_of
from pairloop.types import Alias, Group, GroupKind, Pool, Version

SHARE = 0.3


def start(world: World, number: int = 1, *, share: float = SHARE) -> Canary:
    return deploy.start_canary(world.store, world.policy, world.config, number=number, share=share, reason="try it")


def answered_by(world: World, users: list[str], **fields: Any) -> list[set[int]]:
    """Which versions would answer each user."""

    async def plans() -> list[set[int]]:
        chat = service(world)
        return [set((await chat.plan(ChatRequest(POLICY, ASK, user=user, **fields))).versions) for user in users]

    return asyncio.run(plans())


def seen(counts: Counts, *, minutes_ago: float = 0) -> Any:
    """What is written where a version has answered so."""
    at = traffic.minute_of(datetime.now(UTC) - timedelta(minutes=minutes_ago))
    return lambda c, number, policy: traffic.put(c, policy, number, at, f"process-{number}", counts)


def healthy(n: int) -> Counts:
    return Counts(n, 0, n // 50, Counter({class_of(40): n}), Counter({class_of(10): n}))


def failing(n: int) -> Counts:
    return Counts(0, n, 0)


# --- who is answered by whom


def test_a_share_of_the_users_is_answered_by_the_canary_and_stays_so(tmp_path: Path) -> None:
    users = [f"user-{i}" for i in range(600)]
    with World(tmp_path / "world") as world:
        world.add_version(1)
        world.add_version(2)
        canary = start(world)
        first = answered_by(world, users)
        assert answered_by(world, users, n=2) == first  # sticky, and no group mixes versions
        share = sum(found == {1} for found in first) / len(users)
        assert all(found in ({0}, {1}) for found in first)
        assert 0.2 < share < 0.4  # 0.3 ± 5.3 standard deviations: each canary salts its users anew
        by_pool = Counter(pool_of(user, 0.2) for user, found in zip(users, first, strict=True) if found == {1})
        assert by_pool[Pool.TRAIN] > by_pool[Pool.GATE] > 0  # pools are left alone
        assert answered_by(world, ["user-1"], pair_allowed=True)[0] in ({0}, {1})

        deploy.stop_canary(world.store, POLICY, reason="seen enough", canary_id=canary.canary_id)
        assert answered_by(world, users[:20]) == [{0}] * 20
        start(world, 2)
        second = [{1} if found == {2} else found for found in answered_by(world, users)]
        assert second != first  # not always the same users


def test_a_canarys_groups_train_as_its_own(tmp_path: Path) -> None:
    """Its picks are one promotion away from the champion's, whether it is promoted or not; none is lost, none is mixed."""
    with World(tmp_path / "world") as world:
        world.add_version(1)
        start(world, share=0.999999)
        user = user_of(Pool.TRAIN)
        group = asyncio.run(service(world).answer(ChatRequest(POLICY, ASK, user=user, n=2))).group
        assert (group.kind, group.pool, {one.version for one in group.completions}) == (GroupKind.TRAIN, Pool.TRAIN, {1})
        with world.store.reading() as c:
            lineage = versions.list_(c, POLICY)
        assert pairs.promotions_between(lineage, 0)[1] == 1
        assert pairs.promotions_between(lineage, 1)[1] == 0


def test_a_canary_survives_a_restart_and_is_loaded_before_the_first_request(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with open_rig(config) as rig:
        add_version(rig, 1)
        deploy.start_canary(rig.store, rig.policy, config, number=1, share=SHARE, reason="try it")
    with Store.open(config) as store:
        policy = FaultyPolicy()
        ensure_base(store, policy, config)
        assert policy.loaded() == {0, 1}
        with store.reading() as c:
            canary = canaries.current(c, "bot")
            assert versions.alias(c, "bot", Alias.CANARY) == 1
        assert canary is not None
        assert (canary.version, canary.share, canary.closed_at) == (1, SHARE, None)
        policy.close()


def test_what_cannot_be_a_canary_is_refused(tmp_path: Path) -> None:
    with World(tmp_path / "world") as world:
        world.add_version(1)
        world.add_version(2)
        with pytest.raises(NotFoundError, match="has no version 9"):
            start(world, 9)
        with pytest.raises(ConflictError, match="champion already"):
            start(world, 0)
        with pytest.raises(ConflictError, match="no canary of"):
            deploy.stop_canary(world.store, POLICY, reason="none is on")
        start(world)
        with pytest.raises(ConflictError, match=rf"{POLICY}@1 is a canary already"):
            start(world, 2)
        deploy.stop_canary(world.store, POLICY, reason="make room")
        world.open_duel(2)
        with pytest.raises(ConflictError, match=rf"{POLICY}@2 is duelling"):
            start(world)


# --- by hand: the watch ends it


@pytest.mark.parametrize("counts", [healthy(60), failing(60)])
def test_the_watch_promotes_a_canary_that_lasted_and_withdraws_one_that_broke(tmp_path: Path, counts: Counts) -> None:
    config = fake_config(tmp_path, deploy={"canary_hours": 0.5, "canary_requests": 50})
    with World(tmp_path / "world", config=config) as world:
        world.add_version(1)
        start(world)
        watch = deploy.Watch(world.store, world.policy, config)
        world.store.write(lambda c: seen(healthy(300))(c, 0, POLICY))
        world.store.write(lambda c: seen(counts)(c, 1, POLICY))
        is_good = counts.errors == 0
        if is_good:
            watch.look()
            assert aliases(world.store, POLICY) == (0, 1)  # it has answered enough, but not for long enough
        watch.look(datetime.now(UTC) + timedelta(minutes=31))
        assert aliases(world.store, POLICY) == (1 if is_good else 0, None)
        with world.store.reading() as c:
            acts = [(entry.action, entry.actor, entry.subject) for entry in audit.list_(c)]
            told = set(c.execute(sa.select(schema.events.c.type)).scalars())
        assert ("guard.broken" in told, "version.promoted" in told) == (not is_good, is_good)
        ended = "promote" if is_good else "canary_stop"
        assert acts == [(ended, "scheduler", f"{POLICY}@1"), ("canary_start", "scheduler", f"{POLICY}@1")]


@pytest.mark.parametrize("counts", [healthy(60), failing(60), Counts(30, 60, 0)])
def test_a_canary_that_nobody_could_compare_goes_on(tmp_path: Path, counts: Counts) -> None:
    config = fake_config(tmp_path, deploy={"canary_hours": 0.5, "canary_requests": 50})
    with World(tmp_path / "world", config=config) as world:
        world.add_version(1)
        start(world)
        world.store.write(lambda c: seen(healthy(3))(c, 0, POLICY))  # the champion's answers are too few
        world.store.write(lambda c: seen(counts)(c, 1, POLICY))
        watch, late = deploy.Watch(world.store, world.policy, config), datetime.now(UTC) + timedelta(minutes=31)
        watch.look(late)
        assert aliases(world.store, POLICY) == (0, 1)
        world.store.write(lambda c: seen(healthy(300))(c, 0, POLICY))
        watch.look(late)
        assert aliases(world.store, POLICY) == ((0, None) if counts.errors else (1, None))


class WithdrawingPolicy(FaultyPolicy):
    """Withdraws the canary of ``store`` while version 1 is loaded, as somebody by hand does in that time."""

    store: Store | None = None

    def load(self, version: Version) -> None:
        super().load(version)
        store, self.store = self.store, None
        if store is not None and version.number == 1:
            deploy.stop_canary(store, version.policy, reason="an odd tone", actor="cli:ada")


def test_a_canary_that_is_withdrawn_while_it_is_probed_is_not_promoted(tmp_path: Path) -> None:
    config = fake_config(tmp_path, deploy={"canary_hours": 0.5, "canary_requests": 50})
    policy = WithdrawingPolicy()
    with World(tmp_path / "world", config=config, policy=policy) as world:
        world.add_version(1)
        canary = start(world)
        world.store.write(lambda c: seen(healthy(300))(c, 0, POLICY))
        world.store.write(lambda c: seen(healthy(60))(c, 1, POLICY))
        policy.store = world.store
        with pytest.raises(ConflictError, match=rf"no longer on as canary \({canary.canary_id}\)"):
            deploy.Watch(world.store, policy, config).look(datetime.now(UTC) + timedelta(minutes=31))
        assert aliases(world.store, POLICY) == (0, None)
        with world.store.reading() as c:
            assert next((entry.action, entry.actor) for entry in audit.list_(c)) == ("canary_stop", "cli:ada")


def aliases(store: Store, policy: str) -> tuple[int | None, int | None]:
    with store.reading() as c:
        return versions.alias(c, policy, Alias.CHAMPION), versions.alias(c, policy, Alias.CANARY)


# --- the cycle's own


def in_canary(rig: Rig) -> None:
    """A cycle whose version 1 has won its duel."""
    rig.serve(60)
    assert cycle.run(rig.loop, trigger="test").state == "duelling"
    rig.judge(120)
    assert cycle.run(rig.loop, trigger="test").state == "canary"
    assert aliases(rig.store, "bot") == (0, 1)


def test_a_cycle_ends_its_canary_as_the_guards_say(tmp_path: Path) -> None:
    config = settings(tmp_path, deploy={"canary_share": 0.2, "canary_hours": 1e-9, "canary_requests": 50})
    with open_rig(config) as rig:
        in_canary(rig)
        assert cycle.run(rig.loop, trigger="test").state == "canary"  # too few requests; no lease is held
        status = cycle.status(rig.store, config)
        assert status.canary is not None
        assert (status.state, status.canary.version, status.canary.answers) == ("canary", 1, 0)
        assert "version 1 is the canary of 20 % of the users, 0 of 50 requests answered" in status.text
        rig.store.write(lambda c: seen(healthy(60))(c, 1, "bot"))
        rig.store.write(lambda c: seen(healthy(300))(c, 0, "bot"))
        done = cycle.run(rig.loop, trigger="test")
        assert (done.state, rig.champion) == ("promoted", 1)
        assert done.steps[-1].record["reason"].endswith("60 requests as canary broke no guard")
        assert aliases(rig.store, "bot") == (1, None)


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=pytest.mark.slow) for how in ("guard", "duel", "by hand", "promoted by hand")]
)
def test_how_else_a_cycles_canary_ends(tmp_path: Path, how: str) -> None:
    config = settings(tmp_path, deploy={"canary_share": 0.2})
    with open_rig(config) as rig:
        in_canary(rig)

        def traffic_of_both(c: Connection) -> None:
            seen(healthy(300))(c, 0, "bot")
            seen(failing(60))(c, 1, "bot")

        match how:
            case "guard":
                rig.store.write(traffic_of_both)
            case "duel":
                rig.judge(60, worse)  # the duel goes on, and turns against it
            case "by hand":
                deploy.stop_canary(rig.store, "bot", reason="an odd tone", actor="cli:ada")
            case _:
                deploy.promote_by_hand(rig.store, rig.policy, "bot", number=1, reason="sure", actor="cli:ada")
        done = cycle.run(rig.loop, trigger="test")
        expected = {"guard": "errors: 60 of 60", "duel": "duel: the champion won", "by hand": "an odd tone"}.get(how, "sure")
        assert expected in done.steps[-1].record["reason"]
        is_promoted = how == "promoted by hand"
        assert (done.state, rig.champion) == (("promoted", 1) if is_promoted else ("rejected", 0))
        with rig.store.reading() as c:
            assert audit.list_(c)[0].action == ("promote" if is_promoted else "canary_stop")


@pytest.mark.parametrize("is_broken", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_canary_that_is_closed_during_a_look_ends_its_cycle_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_broken: bool
) -> None:
    """By the watch on a guard that broke, or by hand on one that lasted: the look has found it open."""
    config = settings(tmp_path, deploy={"canary_share": 0.2, "canary_hours": 1e-9, "canary_requests": 50})
    with open_rig(config) as rig:
        in_canary(rig)
        rig.store.write(lambda c: seen(healthy(300))(c, 0, "bot"))
        rig.store.write(lambda c: seen((failing if is_broken else healthy)(60))(c, 1, "bot"))
        stand = deploy.canary_standing

        def and_then_closed(c: Connection, config: Config, canary: Canary, now: datetime) -> deploy.Standing:
            found = stand(c, config, canary, now)
            monkeypatch.undo()
            if is_broken:
                deploy.Watch(rig.store, rig.policy, config).look()
            else:
                deploy.stop_canary(rig.store, "bot", reason="an odd tone", actor="cli:ada")
            return found

        monkeypatch.setattr(deploy, "canary_standing", and_then_closed)
        done = cycle.run(rig.loop, trigger="test")
        assert (done.state, rig.champion) == ("rejected", 0)
        assert ("errors: 60 of 60" if is_broken else "an odd tone") in done.steps[-1].record["reason"]
        assert aliases(rig.store, "bot") == (0, None)


@pytest.mark.slow
def test_a_broken_guard_ends_a_duel(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path)) as rig:
        rig.serve(60)
        assert cycle.run(rig.loop, trigger="test").state == "duelling"
        rig.store.write(lambda c: seen(healthy(300))(c, 0, "bot"))
        rig.store.write(lambda c: seen(failing(60))(c, 1, "bot"))
        done = cycle.run(rig.loop, trigger="test")
        assert done.state == "rejected"
        assert done.steps[-1].record["reason"].startswith("a live guard broke during the duel: errors: 60 of 60")
        with rig.store.reading() as c:
            told = list(c.execute(sa.select(schema.events.c.type).order_by(schema.events.c.seq)).scalars())
        assert told == ["cycle.started", "duel.opened", "cycle.ended", "guard.broken"]


@pytest.mark.slow
def test_a_cycle_waits_for_the_end_of_a_canary_by_hand(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path)) as rig:
        add_version(rig, 1)
        deploy.start_canary(rig.store, rig.policy, rig.loop.config, number=1, share=SHARE, reason="try it")
        rig.serve(60)
        assert cycle.run(rig.loop, trigger="test").state == "checking"
        deploy.stop_canary(rig.store, "bot", reason="seen enough")
        assert cycle.run(rig.loop, trigger="test").state == "duelling"


# --- what stays loaded


def test_a_rollback_under_load_loads_nothing_and_fails_no_request(tmp_path: Path) -> None:
    policy = FaultyPolicy()
    with World(tmp_path / "world", policy=policy) as world:
        for number in (1, 2):
            deploy.promote(world.store, policy, world.add_version(number), reason="better")
        chat = service(world)

        async def all_at_once() -> list[Group]:
            before = policy.loads
            asked = [asyncio.create_task(chat.answer(ChatRequest(POLICY, ASK, user=f"user-{i}"))) for i in range(60)]
            await asyncio.sleep(0)
            await asyncio.to_thread(deploy.rollback, world.store, POLICY, reason="odd", policy=policy, actor="cli:ada")
            asked += [asyncio.create_task(chat.answer(ChatRequest(POLICY, ASK, user=f"user-{i}"))) for i in range(60)]
            found = [reply.group for reply in await asyncio.gather(*asked)]
            assert policy.loads == before
            return found

        found = asyncio.run(all_at_once())
        assert {group.completions[0].version for group in found} == {1, 2}
        assert {group.completions[0].version for group in found[60:]} == {1}


@pytest.mark.parametrize(("keep_warm", "loaded"), [(0, {0, 3}), (1, {0, 2, 3})])
def test_former_champions_stay_loaded_and_are_loaded_at_the_start(tmp_path: Path, keep_warm: int, loaded: set[int]) -> None:
    config = fake_config(tmp_path, deploy={"keep_warm": keep_warm}, policy={"max_loaded": 4})
    with World(tmp_path / "world", config=config) as world:
        for number in (1, 2, 3):
            deploy.promote(world.store, world.policy, world.add_version(number), reason="better")
        for number in (4, 5, 6, 7):
            world.add_version(number)
        for selector in (*"4567", "5"):
            ask_version(world, selector)
        assert loaded <= world.policy.loaded()
        fresh = FaultyPolicy()
        ensure_base(world.store, fresh, config)
        assert fresh.loaded() == loaded
        fresh.close()


def ask_version(world: World, selector: str) -> None:
    asyncio.run(service(world).answer(ChatRequest(f"{POLICY}@{selector}", ASK)))


# --- shadow


def test_a_shadow_answers_unseen_and_leaves_no_trace_in_the_loop(tmp_path: Path) -> None:
    config = fake_config(tmp_path, deploy={"shadow_share": 1.0})
    with World(tmp_path / "world", config=config) as world:
        world.add_version(1)
        world.open_duel(1)
        chat = service(world)
        user = user_of(Pool.TRAIN)

        async def once() -> Group:
            group = (await chat.answer(ChatRequest(POLICY, ASK, user=user, n=2))).group
            await chat.shadows_cast()
            return group

        group = asyncio.run(once())
        with world.store.reading() as c:
            unseen = groups.get(c, groups.shadow_id(group.group_id))
            assert unseen is not None
            assert stored.get(c, unseen.group_id) is None
            assert groups.latest_answer(c, POLICY, user, unseen.completions[0].text) in (
                None,
                *((group.group_id, i) for i, one in enumerate(group.completions) if one.text == unseen.completions[0].text),
            )
            assert [one.group_id for one in groups.of_conversation(c, str(group.conversation_id), limit=9)] == [group.group_id]
            assert feedback.labelled_since(c, POLICY, after_seq=0, kinds=(GroupKind.TRAIN, GroupKind.HELDOUT))[0] == []
        with pytest.raises(NotFoundError, match="no inference"):
            record_metric(world.store, MetricValue(unseen.group_id, "thumbs", value=True, choice_index=0))
        with pytest.raises(InvalidRequestError, match="no stored completion"):
            asyncio.run(chat.plan(ChatRequest(POLICY, ASK, metadata={"parent": unseen.group_id})))
        assert unseen.kind is GroupKind.SHADOW
        assert [one.version for one in unseen.completions] == [1]
        assert (unseen.user, unseen.prompt, unseen.duel_id) == (group.user, group.prompt, None)
        written = chat.recorder.flush()
        assert written is not None
        written.result()
        with world.store.reading() as c:
            now = datetime.now(UTC)
            minutes = traffic.by_minute(c, POLICY, 1, now - timedelta(minutes=5), now + timedelta(minutes=1))
            found = deploy.standing(c, config, now)
        assert [(counts.answers, counts.shown) for counts in minutes.values()] == [(1, 0)]
        assert found is not None
        assert (found.version, found.answers) == (1, 0)  # answers that nobody was shown are none of the canary_requests
        world.store.write(lambda c: groups.erase(c, [group.group_id]))
        assert world.group(unseen.group_id).is_erased


def test_no_shadow_without_a_share_a_challenger_or_room(tmp_path: Path) -> None:
    for share, challenger in ((0.0, True), (1.0, False)):
        config = fake_config(tmp_path, deploy={"shadow_share": share})
        with World(tmp_path / f"world-{share}", config=config) as world:
            world.add_version(1)
            if challenger:
                world.open_duel(1)

            async def shadow_of(world: World = world) -> int | None:
                return (await service(world).plan(ChatRequest(POLICY, ASK, user=user_of(Pool.TRAIN)))).shadow

            assert asyncio.run(shadow_of()) is None
