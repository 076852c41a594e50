"""The store: one writer that acknowledges after the commit, many readers, and values that come out as they went in."""

from __future__ import annotations

import dataclasses
import sqlite3
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection
from tests.store_rows import (
    BOT,
    NOW,
    Blocked,
    a_cycle,
    a_dataset,
    a_group,
    a_run,
    put_groups,
    read,
)
from tests.stores import open_store, somebody_else

from pairloop.config import Config
from pairloop.errors import ConflictError, InvalidRequestError, StoreError
from pairloop.store import (
    Store,
    cycles,
    datasets,
    feedback,
    groups,
    new_group_id,
    new_id,
    runs,
)
from pairloop.types import (
    Completion,
    Feedback,
    FinishReason,
    Group,
    GroupKind,
    Label,
    Message,
    Pool,
    RunStatus,
    SamplingParams,
    Source,
    ToolCall,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One store for all examples of a property; each example writes under its own ids."""
    with open_store(tmp_path_factory.mktemp("shared") / "artifacts") as opened:
        yield opened


def test_two_threads_lose_nothing_and_acknowledge_after_the_commit(tmp_path: Path) -> None:
    unseen: list[str] = []
    with Store.open(Config(state_dir=tmp_path)) as store:

        def write_500(thread: int) -> None:
            asked = sa.text("SELECT 1 FROM groups WHERE group_id = :group_id")
            with somebody_else(store) as second:
                for number in range(500):
                    group_id = f"{thread}-{number}"
                    store.write(partial(groups.insert, group=a_group(group_id)))
                    if second.execute(asked, {"group_id": group_id}).first() is None:
                        unseen.append(group_id)

        threads = [threading.Thread(target=write_500, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert unseen == []
        assert read(store, groups.count, BOT) == 1000


def test_a_function_that_raises_is_rolled_back_alone(store: Store) -> None:
    def half(c: Connection) -> None:
        groups.insert(c, a_group("half"))
        raise ZeroDivisionError("mine")

    blocked = Blocked(store)
    futures: list[Future[Any]] = [
        store.submit(lambda c: groups.insert(c, a_group("before"))),
        store.submit(half),
        store.submit(lambda c: groups.insert(c, a_group("before"))),
        store.submit(lambda c: groups.insert(c, a_group("after"))),
    ]
    blocked.release()
    assert futures[0].result() is None
    with pytest.raises(ZeroDivisionError, match="mine"):
        futures[1].result()
    with pytest.raises(ConflictError, match="group_id"):
        futures[2].result()
    assert futures[3].result() is None
    assert read(store, groups.get, "before") is not None
    assert read(store, groups.get, "half") is None
    assert read(store, groups.get, "after") is not None


def test_waiting_functions_share_one_commit(tmp_path: Path) -> None:
    with Store.open(Config(state_dir=tmp_path)) as store:
        seen: list[int] = []

        def committed() -> int:
            with somebody_else(store) as c:
                return groups.count(c, BOT)

        def insert_and_look(c: Connection, name: str) -> None:
            groups.insert(c, a_group(name))
            seen.append(committed())

        blocked = Blocked(store)
        futures = [store.submit(partial(insert_and_look, name=f"g{n}")) for n in range(20)]
        blocked.release()
        for future in futures:
            future.result()
        # Until the last of the twenty had run, no other connection saw the first: one transaction for all.
        assert seen == [0] * 20
        assert committed() == 20


@pytest.mark.sqlite("a limit of its file")
def test_a_full_disk_is_a_store_error_and_the_writer_goes_on(store: Store) -> None:
    put_groups(store, a_group("small"))
    pages = store.write(lambda c: c.exec_driver_sql("PRAGMA page_count").scalar_one())
    store.write(lambda c: c.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}").scalar_one())
    blocked = Blocked(store)
    batch = {
        "first": store.submit(lambda c: groups.insert(c, a_group("first"))),
        "huge": store.submit(lambda c: groups.insert(c, a_group("huge", answers=("x" * 1_000_000,)))),
        "last": store.submit(lambda c: groups.insert(c, a_group("last"))),
    }
    blocked.release()
    stored = {name for name, future in batch.items() if future.exception() is None}
    refused = {name: future.exception() for name, future in batch.items() if name not in stored}
    assert "huge" in refused
    assert all(isinstance(error, StoreError) and "full" in str(error) for error in refused.values())
    for name in batch:  # what was acknowledged is there, what was refused is not
        assert (read(store, groups.get, name) is not None) == (name in stored)
    store.write(lambda c: c.exec_driver_sql(f"PRAGMA max_page_count = {pages + 10_000}").scalar_one())
    put_groups(store, a_group("with room again", answers=("x" * 1_000_000,)))


@pytest.mark.sqlite("its busy timeout; PostgreSQL's is in test_postgres.py")
def test_a_locked_database_is_a_store_error_on_the_whole_batch_and_the_writer_goes_on(tmp_path: Path) -> None:
    with Store.open(Config(state_dir=tmp_path)) as store:
        store.write(lambda c: c.exec_driver_sql("PRAGMA busy_timeout = 20").scalar_one())
        other = sqlite3.connect(tmp_path / "pairloop.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        refused = [store.submit(partial(groups.insert, group=a_group(f"r{n}"))) for n in range(3)]
        for future in refused:
            with pytest.raises(StoreError, match="locked"):
                future.result()
        other.execute("COMMIT")
        put_groups(store, a_group("free again"))
        assert read(store, groups.count, BOT) == 1
        other.close()


def test_close_finishes_what_waits_and_refuses_more(tmp_path: Path) -> None:
    config = Config(state_dir=tmp_path)
    store = Store.open(config)
    blocked = Blocked(store)
    futures = [store.submit(partial(groups.insert, group=a_group(f"g{n}"))) for n in range(50)]
    closing = threading.Thread(target=store.close)
    closing.start()
    blocked.release()
    closing.join()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(StoreError, match="closed"):
        store.submit(lambda c: groups.count(c, BOT))
    store.close()
    with Store.open(config) as again:
        assert read(again, groups.count, BOT) == 50


def test_a_cancelled_write_is_not_done(store: Store) -> None:
    blocked = Blocked(store)
    future = store.submit(lambda c: groups.insert(c, a_group("cancelled")))
    assert future.cancel()
    blocked.release()
    put_groups(store, a_group("other"))
    assert read(store, groups.get, "cancelled") is None


def test_waiting_for_a_write_inside_a_write_is_refused_instead_of_hanging(store: Store) -> None:
    with pytest.raises(RuntimeError, match="waits for itself"):
        store.write(lambda _c: store.write(lambda c: groups.count(c, BOT)))


def test_a_function_that_commits_by_itself_fails_and_hangs_nobody(store: Store) -> None:
    blocked = Blocked(store)
    futures = [store.submit(lambda c: c.commit()), store.submit(partial(groups.insert, group=a_group("same batch")))]
    blocked.release()
    with pytest.raises(StoreError, match="nothing of this was stored"):
        futures[1].result()
    assert isinstance(futures[0].exception(), StoreError)
    put_groups(store, a_group("after"))
    assert read(store, groups.count, BOT) == 1


def test_readers_cannot_write_and_see_one_snapshot(store: Store) -> None:
    with pytest.raises(StoreError, match=r"read-?only"), store.reading() as c:
        groups.insert(c, a_group())
    with store.reading() as c:
        assert groups.count(c, BOT) == 0
        put_groups(store, a_group())
        assert groups.count(c, BOT) == 0
    assert read(store, groups.count, BOT) == 1


def test_stores_of_tests_are_apart(tmp_path: Path) -> None:
    with open_store(tmp_path / "artifacts") as one, open_store(tmp_path / "artifacts") as two:
        put_groups(one, a_group())
        assert read(two, groups.count, BOT) == 0


def float32(value: float) -> float:
    (narrow,) = struct.unpack("<f", struct.pack("<f", value))
    return float(narrow)


texts = st.text(max_size=40)
words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
"""What clients say in columns of plain text: a NUL is refused at the door."""
times = st.datetimes(
    min_value=datetime(1, 1, 3),
    max_value=datetime(9999, 12, 29),
    timezones=st.integers(-23, 23).map(lambda hours: timezone(timedelta(hours=hours))),
)
ids32 = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5).map(tuple)
logps = st.lists(st.floats(width=32, allow_nan=False), max_size=5).map(tuple)
maps = st.dictionaries(texts, texts, max_size=3)
completion_values = st.builds(
    Completion,
    text=texts,
    token_ids=ids32,
    logps=logps,
    version=st.none() | st.integers(0, 10_000),
    finish_reason=st.sampled_from(FinishReason),
)
tool_calls = st.lists(st.builds(ToolCall, id=texts, name=texts, arguments=texts), max_size=2).map(tuple)
messages = st.builds(Message, role=texts, content=texts, tool_calls=tool_calls, tool_call_id=st.none() | texts)
group_values = st.builds(
    Group,
    group_id=st.builds(new_group_id),
    policy=st.just("property"),
    kind=st.sampled_from(GroupKind),
    pool=st.sampled_from(Pool),
    prompt=texts | st.lists(messages, max_size=3).map(tuple),
    completions=st.lists(completion_values, max_size=3).map(tuple),
    created_at=times,
    prompt_token_ids=ids32,
    sampling=st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 9999),
        temperature=st.floats(0, 2),
        top_p=st.floats(0, 1),
        stop=st.lists(texts, max_size=2).map(tuple),
        seed=st.none() | st.integers(),
    ),
    user=st.none() | words,
    conversation_id=st.none() | words,
    parent_group_id=st.none() | words,
    parent_index=st.none() | st.integers(0, 9),
    duel_id=st.none(),
    metadata=maps,
)
feedback_values = st.builds(
    Feedback,
    feedback_id=st.builds(new_id, st.just("feedback")),
    group_id=st.just("of property"),
    metric=words,
    source=st.sampled_from(Source),
    rater_id=words,
    created_at=times,
    label=st.none() | st.sampled_from(Label),
    choice_index=st.none() | st.integers(0, 9),
    value=st.none() | st.booleans() | texts | st.floats(allow_nan=False, allow_infinity=False),
    text=st.none() | words,
    shown_order=st.permutations(range(3)).map(tuple),
    latency_ms=st.none() | st.integers(0, 2**62),
    revision=st.just(0),
    tags=maps,
)


@settings(max_examples=60, deadline=None)
@given(group=group_values)
def test_groups_come_out_as_they_went_in(shared: Store, group: Group) -> None:
    put_groups(shared, group)
    found = read(shared, groups.get, group.group_id)
    answers = (dataclasses.replace(one, text=one.text.replace("\0", groups.NO_NUL)) for one in group.completions)
    assert found == dataclasses.replace(group, completions=tuple(answers))
    assert found.created_at.utcoffset() == timedelta(0)


@settings(max_examples=60, deadline=None)
@given(row=feedback_values)
def test_feedback_comes_out_as_it_went_in(shared: Store, row: Feedback) -> None:
    if read(shared, groups.get, row.group_id) is None:
        put_groups(shared, a_group(row.group_id))
    written, duplicate = shared.write(lambda c: feedback.insert(c, row))
    found = read(shared, feedback.get, row.feedback_id)
    assert not duplicate
    assert found == written == dataclasses.replace(row, revision=written.revision)
    assert type(found.value) is type(row.value)
    assert shared.write(lambda c: feedback.insert(c, row)) == (written, True)


@given(pair=st.tuples(times, times))
def test_times_sort_as_text_as_they_do_as_times(pair: tuple[datetime, datetime]) -> None:
    from pairloop.store.columns import UtcDateTime

    dialect = sa.create_engine("sqlite://").dialect
    early, late = (UtcDateTime().process_bind_param(value, dialect) for value in sorted(pair))
    assert early is not None
    assert late is not None
    assert early <= late
    assert len(early) == len(late) == 27


def test_logps_are_float32(store: Store) -> None:
    put_groups(store, a_group("g", completions=(Completion("a", (1,), (-0.1,), 0),)))
    assert read(store, groups.get, "g").completions[0].logps == (float32(-0.1),)


def test_a_time_without_a_timezone_is_refused(store: Store) -> None:
    with pytest.raises(sa.exc.StatementError, match="no timezone"):
        put_groups(store, a_group(created_at=datetime(2026, 1, 1)))


def test_half_a_surrogate_pair_is_the_callers_error(store: Store) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        put_groups(store, a_group(answers=("\ud83d",)))


def test_a_runs_numbers_that_json_cannot_hold_become_null(store: Store) -> None:
    store.write(lambda c: cycles.insert(c, a_cycle()))
    store.write(lambda c: datasets.insert(c, a_dataset("data_1"), feedback_seq=0, cycle_id=None, pairs=()))
    store.write(lambda c: runs.insert(c, a_run()))
    result = {"loss": float("nan"), "steps": [1.0, float("inf")], "nested": {"ok": 0.5}}
    store.write(lambda c: runs.end(c, "run_1", RunStatus.SYSTEM_ERROR, result, "loss is NaN", NOW))
    assert read(store, runs.get, "run_1").result == {"loss": None, "steps": [1.0, None], "nested": {"ok": 0.5}}
