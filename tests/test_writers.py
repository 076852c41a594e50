"""Two processes' worth of stores on one database, both writing: nothing is doubled, skipped or held twice."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Connection
from tests.loop_rig import Rig, open_rig, settings
from tests.store_rows import BOT, NOW, a_cycle, a_group, a_pick, a_version, put_groups, put_picks, read

from pairloop.config import Config
from pairloop.errors import ConflictError
from pairloop.loop import cycle, deploy
from pairloop.loop.cycle import Loop
from pairloop.loop.jobs.ownership import claim
from pairloop.policy.fake import FakePolicy, write_skill
from pairloop.store import Store, cycles, doctor, duels, feedback, files, groups, jobs, leases, triggers, versions
from pairloop.store.jobs import Job, JobStatus
from pairloop.types import Alias, CycleState, CycleStep, GroupKind, VersionKind

PATIENCE_S = 60.0


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Store, Store]]:
    config = Config(state_dir=tmp_path)
    with Store.open(config) as one, Store.open(config) as two:
        yield one, two


def at_once(*acts: Callable[[], None]) -> None:
    """Run the functions in threads that start together; the first error of one of them is raised."""
    start, problems = threading.Barrier(len(acts)), []

    def run(act: Callable[[], None]) -> None:
        start.wait()
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - raised below, in the test's own thread
            problems.append(error)

    threads = [threading.Thread(target=run, args=(act,), daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a writer hangs"
    if problems:
        raise problems[0]


def test_a_lease_has_one_holder_and_each_change_of_hands_a_higher_token(both: tuple[Store, Store]) -> None:
    inside: list[str] = []
    tokens: list[int] = []

    def hold(store: Store, owner: str) -> None:
        taken = 0
        while taken < 15:
            token = store.write(lambda c: leases.acquire(c, "cycle:bot", owner, now=NOW, ttl_s=60))
            if token is None:
                continue
            inside.append(owner)
            assert inside == [owner], "two holders"
            assert read(store, leases.holder, "cycle:bot") == owner
            tokens.append(token)
            taken += 1
            inside.remove(owner)
            store.write(lambda c: leases.release(c, "cycle:bot", owner))

    at_once(*(partial(hold, store, f"owner-{number}-{n}") for number, store in enumerate(both) for n in range(2)))
    assert tokens == sorted(tokens)
    assert len(set(tokens)) == len(tokens) == 60


def test_numbers_are_given_once_and_without_gaps(both: tuple[Store, Store]) -> None:
    both[0].write(lambda c: versions.insert(c, a_version(0)))

    def make(store: Store) -> None:
        for _ in range(20):
            store.write(lambda c: versions.insert(c, a_version(versions.next_number(c, BOT))))

    def turn(store: Store) -> None:
        for _ in range(10):
            begun = store.write(_begin)
            if begun is not None:
                ended = CycleStep(CycleState.FAILED, {}, NOW)
                store.write(partial(cycles.step, cycle_id=begun, step=ended))

    at_once(*(partial(make, store) for store in both), *(partial(turn, store) for store in both))
    assert [one.number for one in read(both[0], versions.list_, BOT)] == list(range(41))
    numbers = [one.number for one in read(both[0], cycles.list_, BOT)]
    assert numbers == list(range(len(numbers), 0, -1))
    assert len(numbers) >= 10


def _begin(c: Connection) -> str | None:
    if cycles.current(c, BOT) is not None:
        return None
    made = a_cycle(cycles.next_number(c, BOT))
    cycles.insert(c, made)
    return made.cycle_id


def test_revisions_are_told_apart_and_a_pick_sent_to_both_is_one_row(both: tuple[Store, Store]) -> None:
    put_groups(both[0], a_group("g"))
    answers: list[bool] = []

    def send(store: Store, name: str) -> None:
        for number in range(20):
            put_picks(store, a_pick("g", feedback_id=f"{name}-{number}"))
            answers.append(store.write(partial(feedback.insert, row=a_pick("g", "same", feedback_id=f"same-{number}")))[1])

    at_once(*(partial(send, store, f"{n}-{number}") for n, store in enumerate(both) for number in range(2)))
    rows = read(both[0], feedback.history, "g")
    assert [row.revision for row in rows if row.rater_id == "rita"] == list(range(80))
    same = [row for row in rows if row.rater_id == "same"]
    assert sorted(row.feedback_id for row in same) == sorted(f"same-{number}" for number in range(20))
    assert [row.revision for row in same] == list(range(20))
    assert sorted(answers) == [False] * 20 + [True] * 60


def test_who_reads_on_from_a_sequence_number_misses_no_row(both: tuple[Store, Store]) -> None:
    """What a cycle takes as new since the last snapshot: rows must not become visible behind a number that was seen."""
    writing = threading.Event()
    seen: list[str] = []
    kinds = [GroupKind.TRAIN]

    def write(store: Store, name: str) -> None:
        for number in range(15):
            group = f"{name}-{number}"

            def insert(c: Connection, group: str = group) -> None:
                groups.insert(c, a_group(group))
                feedback.insert(c, a_pick(group))

            store.write(insert)

    def follow() -> None:
        after, more = 0, True
        while more:
            more = not writing.is_set()
            found, after = read(both[0], feedback.labelled_since, BOT, after_seq=after, kinds=kinds)
            seen.extend(one.group.group_id for one in found)

    follower = threading.Thread(target=follow)
    follower.start()
    try:
        at_once(*(partial(write, store, f"{n}-{number}") for n, store in enumerate(both) for number in range(2)))
    finally:
        writing.set()
        follower.join()
    assert len(seen) == len(set(seen)) == 60


def test_a_job_is_taken_by_one_worker_and_a_trigger_once(both: tuple[Store, Store]) -> None:
    both[0].write(partial(files.insert, file=_file(both[0])))
    for number in range(12):
        job = Job(f"ftjob-{number:02}", JobStatus.QUEUED, BOT, BOT, 0, "file-1", {"type": "dpo"}, 0, NOW)
        both[0].write(partial(jobs.insert, job=job))
    took: list[str] = []
    fired: list[str] = []

    def work(store: Store, owner: str) -> None:
        loop = Loop(store, FakePolicy(), Config(), owner)
        while (job := claim(loop, owner, [JobStatus.QUEUED])) is not None:
            took.append(job.job_id)
            store.write(lambda c: triggers.put(c, BOT, "now", NOW))
            reason = store.write(lambda c: triggers.take(c, BOT))
            fired.extend([] if reason is None else [reason])
        loop.policy.close()

    at_once(*(partial(work, store, f"host-{n}:{number}/x") for n, store in enumerate(both) for number in range(2)))
    assert sorted(took) == [f"ftjob-{number:02}" for number in range(12)]
    assert 1 <= len(fired) <= 12


def _file(store: Store) -> files.StoredFile:
    path = str(store.artifacts.root / "rows.jsonl")
    return files.StoredFile(
        "file-1", "rows.jsonl", files.Purpose.FINE_TUNE, 1, "0", path, files.FileStatus.PROCESSED, None, NOW
    )


def test_promotions_by_hand_follow_one_another(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path)) as rig, _second(rig) as other:
        for number in (1, 2):
            made = tmp_path / f"skill-{number}"
            made.mkdir()
            write_skill(made, number)
            version = a_version(number, kind=VersionKind.FULL, path=str(made))
            rig.store.write(partial(versions.insert, version=version))
        refused: list[ConflictError] = []

        def promote(one: Rig, number: int) -> None:
            with one.store.reading() as c:
                version = versions.get(c, BOT, number)
            assert version is not None
            try:
                deploy.promote(one.store, one.policy, version, reason="by hand")
            except ConflictError as error:
                refused.append(error)

        at_once(*(partial(promote, one, number) for one in (rig, other) for number in (1, 2)))
        with rig.store.reading() as c:
            moves = versions.promotions(c, BOT)
            champion = versions.alias(c, BOT, Alias.CHAMPION)
        assert [move.previous for move in moves] == [0, *(move.number for move in moves[:-1])]
        assert champion == moves[-1].number
        assert len(moves) + len(refused) == 4


@contextmanager
def _second(rig: Rig) -> Iterator[Rig]:
    """Another process's rig on the same database; its owner is this process, so that neither takes the other for dead."""
    with open_rig(rig.loop.config, owner=f"{socket.gethostname()}:{os.getpid()}", seed=1) as other:
        yield other


@pytest.mark.slow
@pytest.mark.postgres
def test_two_loops_turn_one_cycle_at_a_time(tmp_path: Path) -> None:
    owner = f"{socket.gethostname()}:{os.getpid()}"
    with open_rig(settings(tmp_path), owner=owner) as rig, _second(rig) as other:
        rig.serve(60)
        ended: list[int] = []

        def turn(one: Rig) -> None:
            while not ended:
                try:
                    done = cycle.run(one.loop, trigger="test")
                except ConflictError:  # the other one moves it
                    continue
                if done.state is CycleState.DUELLING:
                    with one.store.reading() as c:
                        duel = duels.current(c, BOT)
                    if duel is not None:  # else the other one has ended it since
                        one.judge(20, duel=duel)
                else:
                    ended.append(done.number)

        at_once(partial(turn, rig), partial(turn, other))
        with rig.store.reading() as c:
            found = cycles.list_(c, "bot")
            moves = versions.promotions(c, "bot")
        assert [(one.number, one.state) for one in found if one.state is not CycleState.NOTHING_TO_TRAIN] == [
            (1, CycleState.PROMOTED)
        ]
        assert [(move.number, move.action) for move in moves] == [(1, "promote")]
        assert doctor.check(rig.store) == []
