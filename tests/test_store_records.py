"""The query modules of the loop: duels, versions, datasets, cycles, runs, leases, triggers."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection
from tests.store_rows import (
    BOT,
    NOW,
    a_cycle,
    a_dataset,
    a_group,
    a_pick,
    a_run,
    a_version,
    minutes,
    put_groups,
    put_picks,
    read,
)

from pairloop.errors import ConflictError, NotFoundError
from pairloop.store import (
    Store,
    cycles,
    datasets,
    duels,
    feedback,
    leases,
    new_group_id,
    new_id,
    runs,
    triggers,
    verdicts,
    versions,
)
from pairloop.store.groups import ID_CHUNK
from pairloop.store.schema import dataset_pairs, pair_feedback, pair_groups
from pairloop.types import (
    Alias,
    CycleState,
    CycleStep,
    Duel,
    GroupKind,
    Label,
    LabelledGroup,
    Pool,
    Reason,
    RunStatus,
    Verdict,
    VerdictKind,
)


def picks_of(c: Connection, duel_id: str) -> list[LabelledGroup]:
    return list(duels.picks(c, duel_id))


def test_duels_one_at_a_time_with_their_picks(store: Store) -> None:
    store.write(lambda c: cycles.insert(c, a_cycle()))
    duel = Duel("duel_1", "cycle_bot_1", BOT, 0, 1, NOW)
    store.write(lambda c: duels.open(c, duel))
    assert read(store, duels.current, BOT) == duel == read(store, duels.get, "duel_1")
    with pytest.raises(ConflictError, match="duel_1"):
        store.write(lambda c: duels.open(c, Duel("duel_2", "cycle_bot_1", BOT, 0, 2, NOW)))
    fields: dict[str, Any] = {"kind": GroupKind.DUEL, "pool": Pool.GATE, "duel_id": "duel_1"}
    put_groups(store, a_group("b", 2, **fields), a_group("a", 1, **fields), a_group("c", 3, **fields), a_group("d", 0))
    put_picks(store, a_pick("b"), a_pick("a"), a_pick("d"))
    put_picks(store, a_pick("b", "bob", Label.TIE), a_pick("b", metric="comment"))
    picks = read(store, picks_of, "duel_1")
    assert [row.group.group_id for row in picks] == ["a", "b"]
    assert [(row.rater_id, row.metric) for row in picks[1].feedback] == [
        ("rita", "preference"),
        ("bob", "preference"),
        ("rita", "comment"),
    ]
    assert read(store, duels.count_picks, "duel_1") == 3
    store.write(lambda c: duels.close(c, "duel_1", minutes(9)))
    store.write(lambda c: duels.close(c, "duel_1", minutes(10)))
    assert read(store, duels.get, "duel_1").closed_at == minutes(9)
    assert read(store, duels.current, BOT) is None
    with pytest.raises(NotFoundError):
        store.write(lambda c: duels.close(c, "duel_9", NOW))
    store.write(lambda c: duels.open(c, Duel("duel_2", "cycle_bot_1", BOT, 0, 2, minutes(11))))
    assert [row.duel_id for row in read(store, duels.list_, BOT)] == ["duel_2", "duel_1"]
    assert [row.duel_id for row in read(store, duels.list_, BOT, limit=1)] == ["duel_2"]


def test_a_duels_picks_are_those_made_first_whatever_is_revised(store: Store) -> None:
    store.write(lambda c: cycles.insert(c, a_cycle()))
    store.write(lambda c: duels.open(c, Duel("duel_1", "cycle_bot_1", BOT, 0, 1, NOW)))
    put_groups(store, a_group("g", kind=GroupKind.DUEL, pool=Pool.GATE, duel_id="duel_1"), a_group("h"))
    (first,) = put_picks(store, a_pick("g", label=Label.A))
    before = read(store, picks_of, "duel_1")
    (revised,) = put_picks(store, a_pick("g", label=Label.B))
    assert revised.revision == 1
    assert read(store, feedback.history, "g") == [first, revised]
    assert read(store, picks_of, "duel_1") == before
    assert before[0].feedback == (first,)
    _, second = put_picks(store, a_pick("h", label=Label.A), a_pick("h", label=Label.B))
    trained, _ = read(store, feedback.labelled_since, BOT, after_seq=0, kinds=[GroupKind.TRAIN])
    assert [row.feedback for row in trained] == [(second,)]


def test_the_latest_verdict_is_of_the_newest_cycle_that_has_one(store: Store) -> None:
    assert read(store, verdicts.latest, BOT) is None
    spoken: dict[int, list[VerdictKind]] = {1: [VerdictKind.HOLD], 2: [VerdictKind.CONTINUE, VerdictKind.REJECT], 3: []}
    for number, kinds in spoken.items():
        started = a_cycle(number)
        store.write(partial(cycles.insert, cycle=started))
        for kind in kinds:
            given, at = Verdict(kind, ()), minutes(number)
            store.write(partial(verdicts.insert, cycle_id=started.cycle_id, duel_id=None, verdict=given, at=at))
        store.write(partial(cycles.step, cycle_id=started.cycle_id, step=CycleStep(CycleState.HELD, {}, NOW)))
    latest = read(store, verdicts.latest, BOT)
    assert latest == ("cycle_bot_2", None, minutes(2), Verdict(VerdictKind.REJECT, ()))
    assert read(store, verdicts.latest, "another") is None


def test_versions_count_up_and_aliases_move(store: Store) -> None:
    assert read(store, versions.next_number, BOT) == 0
    for number in (0, 1, 2):
        store.write(partial(versions.insert, version=a_version(number)))
    assert read(store, versions.next_number, BOT) == 3
    assert read(store, versions.get, BOT, 1) == a_version(1)
    assert read(store, versions.get, BOT, 9) is None
    assert read(store, versions.list_, BOT) == [a_version(0), a_version(1), a_version(2)]
    with pytest.raises(ConflictError, match="versions"):
        store.write(lambda c: versions.insert(c, a_version(1)))
    with pytest.raises(ConflictError, match=r"(?i)foreign key"):
        store.write(lambda c: versions.insert(c, a_version(3, parent=8)))
    assert read(store, versions.alias, BOT, Alias.CHAMPION) is None
    for number in (0, 1):
        store.write(partial(versions.set_alias, policy=BOT, alias=Alias.CHAMPION, number=number))
        assert read(store, versions.alias, BOT, Alias.CHAMPION) == number
    with pytest.raises(NotFoundError, match="bot@7"):
        store.write(lambda c: versions.set_alias(c, BOT, Alias.CHAMPION, 7))
    store.write(lambda c: versions.set_alias(c, BOT, Alias.CHALLENGER, 2))
    store.write(lambda c: versions.set_alias(c, BOT, Alias.CHALLENGER, None))
    assert read(store, versions.alias, BOT, Alias.CHALLENGER) is None
    assert read(store, versions.policies) == [BOT]


def test_promotions_are_a_history(store: Store) -> None:
    store.write(lambda c: versions.insert(c, a_version(0)))
    store.write(lambda c: versions.insert(c, a_version(1)))
    moves: list[tuple[int, int | None, versions.PromotionAction]] = [
        (0, None, "promote"),
        (1, 0, "promote"),
        (0, 1, "rollback"),
    ]
    for number, previous, action in moves:
        store.write(
            partial(
                versions.record_promotion,
                policy=BOT,
                number=number,
                previous=previous,
                action=action,
                reason="why",
                cycle_id=None,
                at=NOW,
            )
        )
    history = read(store, versions.promotions, BOT)
    assert [(row.number, row.previous, row.action) for row in history] == moves
    assert history[0] == versions.Promotion(BOT, 0, None, "promote", "why", None, NOW)


def test_datasets_keep_their_lineage(store: Store) -> None:
    put_groups(store, a_group("g"), a_group("h"))
    one, two = (pick.feedback_id for pick in put_picks(store, a_pick("g"), a_pick("h")))
    store.write(lambda c: cycles.insert(c, a_cycle(1)))
    first = [("pair_1", ["g"], [one])]
    store.write(lambda c: datasets.insert(c, a_dataset("data_1", 1), feedback_seq=1, cycle_id="cycle_bot_1", pairs=first))
    # A held cycle's pairs train again; the second snapshot adds a group and a pick to the first pair.
    second = [("pair_1", ["g", "h"], [one, two]), ("pair_2", ["h"], [two, two])]
    store.write(lambda c: datasets.insert(c, a_dataset("data_2", 2), feedback_seq=2, cycle_id=None, pairs=second))
    assert read(store, datasets.lineage, "pair_1") == (["g", "h"], sorted([one, two]))
    assert read(store, datasets.lineage, "pair_2") == (["h"], [two])
    assert read(store, datasets.lineage, "pair_9") == ([], [])
    assert read(store, datasets.containing_feedback, one) == ["data_1", "data_2"]
    assert read(store, datasets.containing_feedback, "nobody") == []
    assert read(store, datasets.get, "data_1") == a_dataset("data_1", 1)
    assert read(store, datasets.get, "data_9") is None
    assert [row.dataset_id for row in read(store, datasets.list_, BOT)] == ["data_2", "data_1"]
    lost = [("pair_3", ["g"], ["nobody"])]
    with pytest.raises(ConflictError, match=r"(?i)foreign key"):
        store.write(lambda c: datasets.insert(c, a_dataset("data_3"), feedback_seq=2, cycle_id=None, pairs=lost))
    assert read(store, datasets.get, "data_3") is None


def test_lineage_may_be_a_stream_longer_than_what_is_held_at_a_time(store: Store) -> None:
    put_groups(store, a_group("g"))
    (one,) = (pick.feedback_id for pick in put_picks(store, a_pick("g")))
    names = [f"pair_{n:04d}" for n in range(2 * ID_CHUNK + 1)]
    for dataset_id in ("data_1", "data_2"):  # all of them are known the second time
        stream = ((name, ["g"], [one]) for name in (*names, names[0]))  # a pair may come again
        store.write(lambda c, d=dataset_id, s=stream: datasets.insert(c, a_dataset(d), feedback_seq=1, cycle_id=None, pairs=s))  # type: ignore[misc]
    with store.reading() as c:
        for table, links in ((dataset_pairs, 2), (pair_groups, 1), (pair_feedback, 1)):
            found = list(c.execute(sa.select(table.c.pair_id).order_by("pair_id")).scalars())
            assert found == sorted(names * links)


def put_dataset(store: Store, n: int, cycle_id: str | None) -> None:
    store.write(lambda c: datasets.insert(c, a_dataset(f"data_{n}", n), feedback_seq=10 * n, cycle_id=cycle_id, pairs=()))


def test_used_evidence_follows_the_lineage(store: Store) -> None:
    assert read(store, datasets.used_seq, BOT, 0) == 0
    for n in range(1, 5):
        put_dataset(store, n, None)
    parents = {0: None, 1: 0, 2: 1, 3: 0, 4: 2}
    for number, parent in parents.items():
        made_of = f"data_{number}" if number in (1, 2, 3) else None  # 4: nobody knows of what
        store.write(partial(versions.insert, version=a_version(number, parent=parent, dataset_id=made_of)))
    assert [read(store, datasets.used_seq, BOT, number) for number in parents] == [0, 10, 20, 30, 20]
    assert read(store, datasets.used_seq, BOT, 9) == 0
    assert read(store, datasets.used_seq, "other", 2) == 0


def test_the_last_dataset_of_a_cycle_is_one_that_it_built_or_trained_on(store: Store) -> None:
    store.write(partial(cycles.insert, cycle=a_cycle(1)))
    put_dataset(store, 2, None)
    assert read(store, datasets.last_of_a_cycle, BOT) is None
    put_dataset(store, 1, "cycle_bot_1")
    assert read(store, datasets.last_of_a_cycle, BOT) == (10, minutes(1))
    store.write(partial(runs.insert, run=replace(a_run("by_hand"), dataset_id="data_2", cycle_id=None)))
    assert read(store, datasets.last_of_a_cycle, BOT) == (10, minutes(1))
    store.write(partial(runs.insert, run=replace(a_run(), dataset_id="data_2")))
    assert read(store, datasets.last_of_a_cycle, BOT) == (20, minutes(2))
    assert read(store, datasets.last_of_a_cycle, "other") is None


def test_cycles_one_at_a_time_step_by_step(store: Store) -> None:
    assert read(store, cycles.next_number, BOT) == 1
    store.write(lambda c: cycles.insert(c, a_cycle(1)))
    assert read(store, cycles.current, BOT) == a_cycle(1) == read(store, cycles.get, "cycle_bot_1")
    with pytest.raises(ConflictError, match="one cycle at a time"):
        store.write(lambda c: cycles.insert(c, a_cycle(2)))
    store.write(lambda c: cycles.insert(c, a_cycle(1, policy="other")))
    step = CycleStep(CycleState.TRAINING, {"run_id": "r"}, minutes(1))
    store.write(lambda c: cycles.step(c, "cycle_bot_1", step))
    found = read(store, cycles.current, BOT)
    assert found.steps == (*a_cycle(1).steps, step)
    assert found.record(CycleState.TRAINING) == {"run_id": "r"}
    store.write(lambda c: cycles.step(c, "cycle_bot_1", CycleStep(CycleState.HELD, {}, minutes(2))))
    assert read(store, cycles.current, BOT) is None
    with pytest.raises(ConflictError, match="has ended"):
        store.write(lambda c: cycles.step(c, "cycle_bot_1", step))
    with pytest.raises(NotFoundError):
        store.write(lambda c: cycles.step(c, "cycle_9", step))
    with pytest.raises(ValueError, match="first step"):
        store.write(lambda c: cycles.insert(c, dataclasses.replace(a_cycle(2), steps=())))
    assert read(store, cycles.next_number, BOT) == 2
    store.write(lambda c: cycles.insert(c, a_cycle(2)))
    assert [row.number for row in read(store, cycles.list_, BOT)] == [2, 1]
    assert [row.number for row in read(store, cycles.list_, BOT, limit=1)] == [2]


def test_verdicts_keep_their_reasons(store: Store) -> None:
    store.write(lambda c: cycles.insert(c, a_cycle()))
    reasons = (Reason("e_value", None, "e = 3.1 of 20", 3.1, 20.0), Reason("length", True, "1.02 of 1.4"))
    going = Verdict(VerdictKind.CONTINUE, reasons, 3.1, 12, 4, 3, 19)
    done = Verdict(VerdictKind.PROMOTE, (), float("inf"), 70, 4, 3, 70)
    store.write(lambda c: verdicts.insert(c, "cycle_bot_1", None, going, NOW))
    store.write(lambda c: verdicts.insert(c, "cycle_bot_1", None, done, NOW))
    assert read(store, verdicts.for_cycle, "cycle_bot_1") == [(NOW, going), (NOW, done)]
    assert read(store, verdicts.for_cycle, "cycle_9") == []


def test_runs_beat_and_end_for_their_owner_only(store: Store) -> None:
    store.write(lambda c: cycles.insert(c, a_cycle()))
    store.write(lambda c: datasets.insert(c, a_dataset("data_1"), feedback_seq=0, cycle_id=None, pairs=()))
    store.write(lambda c: runs.insert(c, a_run()))
    assert read(store, runs.get, "run_1") == a_run()

    def beat(owner: str, run_id: str = "run_1") -> None:
        step = {"step": 7}
        store.write(lambda c: runs.heartbeat(c, run_id, owner=owner, at=minutes(1), lease_expires_at=minutes(2), progress=step))

    beat("me")
    beaten = read(store, runs.get, "run_1")
    assert beaten == dataclasses.replace(a_run(), heartbeat_at=minutes(1), lease_expires_at=minutes(2), progress={"step": 7})
    with pytest.raises(ConflictError, match="held by me"):
        beat("someone else")
    with pytest.raises(NotFoundError):
        beat("me", "run_9")
    store.write(lambda c: runs.end(c, "run_1", RunStatus.SYSTEM_ERROR, {}, "killed", minutes(3)))
    ended = read(store, runs.get, "run_1")
    assert (ended.status, ended.error, ended.heartbeat_at) == (RunStatus.SYSTEM_ERROR, "killed", minutes(3))
    with pytest.raises(ConflictError, match="system_error"):
        beat("me")
    with pytest.raises(ConflictError):
        store.write(lambda c: runs.end(c, "run_1", RunStatus.SUCCEEDED, {}, None, minutes(4)))
    store.write(lambda c: runs.insert(c, a_run("run_2", attempt=2)))
    assert read(store, runs.for_cycle, "cycle_bot_1").run_id == "run_2"
    assert read(store, runs.for_cycle, "cycle_9") is None
    assert [run.run_id for run in read(store, runs.list_, BOT)] == ["run_2", "run_1"]


def test_leases_have_one_owner_and_rising_tokens(store: Store) -> None:
    def acquire(owner: str, at: float) -> int | None:
        return store.write(lambda c: leases.acquire(c, "cycle:bot", owner, now=minutes(at), ttl_s=60))

    assert acquire("a", 0) == 1
    assert acquire("b", 0.5) is None
    assert acquire("a", 0.5) == 1  # renewed until 1.5
    assert acquire("b", 1.4) is None
    assert acquire("b", 1.5) == 2  # expired
    assert acquire("a", 1.6) is None
    store.write(lambda c: leases.release(c, "cycle:bot", "a"))  # not the owner
    assert acquire("a", 1.6) is None
    store.write(lambda c: leases.release(c, "cycle:bot", "b"))
    assert acquire("b", 1.6) == 3  # never reused, not even by the same owner


def test_one_of_many_threads_gets_the_lease(store: Store) -> None:
    futures = [
        store.submit(partial(leases.acquire, name="cycle:bot", owner=f"worker {n}", now=NOW, ttl_s=60)) for n in range(20)
    ]
    assert sorted(token is None for token in (future.result() for future in futures)) == [False] + [True] * 19


def test_one_pending_trigger_per_policy(store: Store) -> None:
    assert store.write(lambda c: triggers.take(c, BOT)) is None
    store.write(lambda c: triggers.put(c, BOT, "every", NOW))
    store.write(lambda c: triggers.put(c, BOT, "min_pairs", minutes(1)))
    store.write(lambda c: triggers.put(c, "other", "cron", NOW))
    assert read(store, triggers.peek, BOT) == "min_pairs"
    assert store.write(lambda c: triggers.take(c, BOT)) == "min_pairs"
    assert store.write(lambda c: triggers.take(c, BOT)) is None
    assert read(store, triggers.peek, "other") == "cron"


def test_ids_sort_by_time_and_carry_their_noun() -> None:
    many = [new_id("feedback") for _ in range(50)]
    assert many == sorted(many)
    assert all(re.fullmatch(r"feedback_[0-9a-f]{12}7[0-9a-f]{19}", one) for one in many)
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", new_group_id())
