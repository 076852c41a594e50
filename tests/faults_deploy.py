"""Lives that deploy: a canary that is promoted, one that is withdrawn, a rollback by a live guard, an answer in the shadow."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection
from tests.faults_rig import SCENARIOS, Scenario, fault_config, tell_cycles, turn
from tests.loop_rig import Rig, open_rig
from tests.test_deploy import add_version

from pairloop.config import Config
from pairloop.loop import deploy
from pairloop.loop.cycle import ensure_base
from pairloop.loop.serve import ChatRequest, ChatService
from pairloop.policy.fake import FakePolicy
from pairloop.store import Store, audit, canaries, cycles, doctor, duels, traffic, versions
from pairloop.store.schema import canaries as canary_rows
from pairloop.store.schema import completions, events, groups
from pairloop.store.traffic import Counts, class_of
from pairloop.types import Alias, Cycle, CycleState, CycleStep, Duel, GroupKind, Message

SHARE = 0.2


def _answered(c: Connection, number: int, counts: Counts, *, minutes_ago: float = 0) -> None:
    at = traffic.minute_of(datetime.now(UTC) - timedelta(minutes=minutes_ago))
    traffic.put(c, "bot", number, at, f"process-{number}", counts)


def healthy(n: int) -> Counts:
    return Counts(n, 0, n // 50, Counter({class_of(40): n}), Counter({class_of(10): n}))


def failing(n: int) -> Counts:
    return Counts(0, n, 0)


def aliases(c: Connection) -> dict[str, int | None]:
    return {str(alias): versions.alias(c, "bot", alias) for alias in Alias}


# --- canaries of a cycle


def with_canary(folder: Path) -> Config:
    deploy_section = {"canary_share": SHARE, "canary_hours": 1e-9, "canary_requests": 50}
    return fault_config(folder, gate={"min_picks": 50, "max_picks": 200}, deploy=deploy_section)


def _prepare_canary(folder: Path) -> None:
    with open_rig(with_canary(folder)) as rig:
        rig.serve(40)


def _let_it_answer(counts: Callable[[int], Counts], rig: Rig) -> None:
    """Traffic of both sides, once the canary is on."""
    with rig.store.reading() as c:
        canary = canaries.current(c, "bot")
    if canary is not None:
        rig.store.write(lambda c: _answered(c, canary.champion, healthy(300)))
        rig.store.write(lambda c: _answered(c, canary.version, counts(60)))


def _tell_canary(folder: Path) -> dict[str, Any]:
    config = with_canary(folder)
    with Store.open(config) as store, store.reading() as c:
        rows = c.execute(sa.select(canary_rows).order_by(canary_rows.c.opened_at)).all()
        told = [(row.version, row.champion, row.share, row.outcome) for row in rows]
        trail = [(str(entry.action), entry.subject) for entry in audit.list_(c)]
        at = aliases(c)
    return {**tell_cycles(with_canary, folder), "canaries": told, "aliases": at, "trail": trail}


def _canary(counts: Callable[[int], Counts]) -> Scenario:
    meanwhile = partial(_let_it_answer, counts)
    return Scenario(with_canary, _prepare_canary, partial(turn, with_canary, meanwhile=meanwhile), _tell_canary)


# --- a rollback by the watch


def _prepare_rollback(folder: Path) -> None:
    with open_rig(fault_config(folder)) as rig:
        rig.store.write(lambda c: _answered(c, 0, healthy(300), minutes_ago=60))
        deploy.promote(rig.store, rig.policy, add_version(rig, 1), reason="won")
        rig.store.write(lambda c: _answered(c, 1, failing(60)))


def _live_rollback(folder: Path) -> None:
    with open_rig(fault_config(folder)) as rig:
        watch = deploy.Watch(rig.store, rig.policy, rig.loop.config)
        watch.look()
        watch.look()  # the one that came back is under no watch


def _tell_rollback(folder: Path) -> dict[str, Any]:
    with Store.open(fault_config(folder)) as store, store.reading() as c:
        return {
            "moves": [(event.action, event.number, event.previous) for event in versions.promotions(c, "bot")],
            "aliases": aliases(c),
            "trail": [(str(entry.action), entry.subject) for entry in audit.list_(c)],
            "told": sorted(c.execute(sa.select(events.c.type)).scalars()),
            "problems": [problem.text for problem in doctor.check(store)],
        }


# --- the shadow


def _shadowed(folder: Path) -> Config:
    return fault_config(folder, deploy={"shadow_share": 1.0})


def _prepare_shadow(folder: Path) -> None:
    with open_rig(_shadowed(folder)) as rig:
        add_version(rig, 1)
        now = datetime.now(UTC)

        def write(c: Connection) -> None:
            states = (CycleState.BUILDING, CycleState.TRAINING, CycleState.CHECKING, CycleState.DUELLING)
            cycles.insert(c, Cycle("cycle_1", "bot", 1, 0, "test", now, tuple(CycleStep(state, {}, now) for state in states)))
            duels.open(c, Duel("duel_1", "cycle_1", "bot", 0, 1, now))
            versions.set_alias(c, "bot", Alias.CHALLENGER, 1)

        rig.store.write(write)


def _live_shadow(folder: Path) -> None:
    """Answers until one was answered in the shadow, too; a client writes down which answers it got."""
    config = _shadowed(folder)
    policy = FakePolicy()

    async def ask(store: Store) -> None:
        chat = ChatService(store, policy, config, rng=random.Random(1))
        request = ChatRequest("bot", (Message("user", "Where is my order?"),), user="user-1")
        with (folder / "answered").open("a") as file:
            file.write(f"{(await chat.answer(request)).group.group_id}\n")
        await chat.shadows_cast()

    with Store.open(config) as store:
        ensure_base(store, policy, config)
        if not _shadows(store):
            asyncio.run(ask(store))
    policy.close()


def _shadows(store: Store) -> list[str]:
    with store.reading() as c:
        return list(c.execute(sa.select(groups.c.group_id).where(groups.c.kind == GroupKind.SHADOW.value)).scalars())


def _tell_shadow(folder: Path) -> dict[str, Any]:
    answered = (folder / "answered").read_text().split()
    with Store.open(_shadowed(folder)) as store, store.reading() as c:
        there = set(c.execute(sa.select(groups.c.group_id)).scalars())
        with_text = set(c.execute(sa.select(completions.c.group_id).where(completions.c.text != "")).scalars())
        return {
            "shadows": len(_shadows(store)),
            "answers lost": [group_id for group_id in answered if group_id not in there],
            "without an answer": sorted(there - with_text),
            "problems": [problem.text for problem in doctor.check(store)],
        }


SCENARIOS["canary"] = _canary(healthy)
SCENARIOS["withdrawn"] = _canary(failing)
SCENARIOS["rollback"] = Scenario(None, _prepare_rollback, _live_rollback, _tell_rollback)
SCENARIOS["shadow"] = Scenario(None, _prepare_shadow, _live_shadow, _tell_shadow)
