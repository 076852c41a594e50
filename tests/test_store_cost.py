"""What may change in the store, and that no query slows down as rows pile up."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
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
    put_groups,
)

from pairloop.store import (
    Store,
    cycles,
    datasets,
    duels,
    feedback,
    groups,
    leases,
    runs,
    stored,
    triggers,
    verdicts,
    versions,
)
from pairloop.types import (
    Alias,
    Completion,
    CycleState,
    CycleStep,
    Duel,
    GroupKind,
    Label,
    Pool,
    RunStatus,
    Verdict,
    VerdictKind,
)

MAY_CHANGE = {
    ("aliases", "number"),
    ("leases", "owner"),
    ("leases", "token"),
    ("leases", "expires_at"),
    ("triggers", "reason"),
    ("triggers", "created_at"),
    ("triggers", "is_asked"),
    ("runs", "status"),
    ("runs", "heartbeat_at"),
    ("runs", "lease_expires_at"),
    ("runs", "progress"),
    ("runs", "result"),
    ("runs", "error"),
    ("duels", "closed_at"),
    ("stored_completions", "metadata"),
    ("stored_completions", "is_listed"),
    ("stored_completions", "deleted_at"),
}
ERASED = {
    *(("groups", column) for column in ("prompt", "prompt_hash", "prompt_token_ids", "metadata")),
    *(("completions", column) for column in ("text", "token_ids", "logps", "answer_key", "finish_reason")),
    *(("feedback", column) for column in ("text", "tags", "value")),
    ("marks", "reason"),
    ("audit", "reason"),
}
"""What a recorded erasure takes from the evidence: the texts, never who answered."""
MAY_BE_DELETED = {"aliases", "triggers", "removed_artifacts", "samples", "stored_metadata", "stored_replies", "gold_items"}


def write_everything(c: Connection) -> None:
    """Every function that writes evidence, each with something to change where it can change anything."""
    cycles.insert(c, a_cycle())
    cycles.step(c, "cycle_bot_1", CycleStep(CycleState.DUELLING, {}, NOW))
    duels.open(c, Duel("duel_1", "cycle_bot_1", BOT, 0, 1, NOW))
    verdicts.insert(c, "cycle_bot_1", "duel_1", Verdict(VerdictKind.HOLD, ()), NOW)
    duels.close(c, "duel_1", NOW)
    groups.insert(c, a_group("g"))
    groups.insert(c, a_group("streamed", answers=()))
    groups.finish(c, "streamed", (Completion("a"),))
    stored.insert(c, a_group("g", metadata={"a": "b"}))
    stored.replace_metadata(c, "g", {"c": "d"})
    stored.delete(c, "g", NOW)
    one, _ = feedback.insert(c, a_pick("g"))
    two, _ = feedback.insert(c, a_pick("g", label=Label.B))
    for name in ("data_1", "data_2"):
        pairs = [("pair_1", ["g"], [one.feedback_id, two.feedback_id])]
        datasets.insert(c, a_dataset(name), feedback_seq=2, cycle_id=None, pairs=pairs)
    runs.insert(c, a_run())
    runs.heartbeat(c, "run_1", owner="me", at=NOW, lease_expires_at=NOW, progress={})
    runs.end(c, "run_1", RunStatus.SUCCEEDED, {}, None, NOW)
    for number in (0, 1):
        versions.insert(c, a_version(number))
        versions.set_alias(c, BOT, Alias.CHAMPION, number)
    versions.set_alias(c, BOT, Alias.CHAMPION, None)
    versions.record_promotion(c, BOT, number=1, previous=0, action="promote", reason="", cycle_id=None, at=NOW)
    for owner in ("a", "b"):
        leases.acquire(c, "cycle", owner, now=NOW, ttl_s=0)
        triggers.put(c, BOT, owner, NOW)
    leases.release(c, "cycle", "b")
    triggers.take(c, BOT)


@pytest.mark.sqlite("its authorizer")
def test_evidence_is_only_ever_inserted(store: Store) -> None:
    """SQLite itself reports each table and column that a statement would change, while everything that writes runs."""
    changed: set[tuple[str, str]] = set()
    deleted: set[str] = set()

    def watch(action: int, table: str | None, column: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_UPDATE:
            changed.add((str(table), str(column)))
        elif action == sqlite3.SQLITE_DELETE:
            deleted.add(str(table))
        return sqlite3.SQLITE_OK

    def run_watched(c: Connection) -> None:
        connection = c.connection.driver_connection
        assert isinstance(connection, sqlite3.Connection)
        connection.set_authorizer(watch)
        write_everything(c)
        connection.set_authorizer(None)

    store.write(run_watched)
    assert changed - {("sqlite_sequence", "seq")} == MAY_CHANGE | ERASED
    assert deleted == MAY_BE_DELETED


def test_no_code_of_ours_updates_or_deletes_evidence() -> None:
    erasing_people = "erasures.py"  # an erasure of a person, which is recorded, takes rows
    sources = (path for path in Path(groups.__file__).parent.glob("*.py") if path.name != erasing_people)
    found = {match for path in sources for match in re.findall(r"sa\.(?:update|delete)\(\s*(\w+)", path.read_text())}
    assert found - {
        "webhook_cursors",
        "webhook_deliveries",
        "aliases",
        "leases",
        "triggers",
        "runs",
        "duels",
        "canaries",
        "traffic",
        "stored_completions",
        "stored_metadata",
        "keys",
        "stored_replies",
        "files",
        "jobs",
        "removed_artifacts",
        "gold_items",
        "reservations",
        "accounts",
        "account_rows",
        "account_table",
        "key_table",
        "sessions",
        "saved_views",
        "set_aside",
    } == {
        "groups",
        "completions",
        "feedback",
        "marks",
        "audit",
        "samples",
    }
    erasing = Path(groups.__file__).read_text().split("def erase")[1].split("\ndef ")[0]
    assert erasing.count("sa.update(") == 4, "texts are erased in one place"


def plans(store: Store, call: Callable[[Connection], object]) -> list[str]:
    """SQLite's query plan for every select that ``call`` runs (written rows are rolled back)."""
    statements: list[tuple[str, Any]] = []

    def collect(_c: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        if not many and statement.startswith("SELECT"):
            statements.append((statement, parameters))

    def run(c: Connection) -> list[str]:
        sa.event.listen(c, "before_cursor_execute", collect)
        with c.begin_nested() as savepoint:
            call(c)
            savepoint.rollback()
        sa.event.remove(c, "before_cursor_execute", collect)
        return [
            str(row[3])
            for statement, parameters in statements
            for row in c.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        ]

    return store.write(run)


PER_REQUEST: dict[str, Callable[[Connection], object]] = {
    "groups.insert": lambda c: groups.insert(c, a_group()),
    "groups.finish": lambda c: groups.finish(c, "streamed", (Completion("a"),)),
    "groups.get": lambda c: groups.get(c, "g"),
    "groups.latest_answer": lambda c: groups.latest_answer(c, BOT, "ann", "yes"),
    "feedback.insert": lambda c: feedback.insert(c, a_pick("g")),
    "feedback.get": lambda c: feedback.get(c, "f"),
    "feedback.for_group": lambda c: feedback.for_group(c, "g"),
    "feedback.max_seq": lambda c: feedback.max_seq(c, BOT),
    "feedback.recent": lambda c: feedback.recent(c, BOT, 5),
    "duels.current": lambda c: duels.current(c, BOT),
    "versions.alias": lambda c: versions.alias(c, BOT, Alias.CHAMPION),
    "versions.get": lambda c: versions.get(c, BOT, 1),
    "cycles.current": lambda c: cycles.current(c, BOT),
    "runs.for_cycle": lambda c: runs.for_cycle(c, "cycle_1"),
    "datasets.used_seq": lambda c: datasets.used_seq(c, BOT, 1),
    "datasets.last_of_a_cycle": lambda c: datasets.last_of_a_cycle(c, BOT),
    "datasets.lineage": lambda c: datasets.lineage(c, "pair_1"),
    "datasets.containing_feedback": lambda c: datasets.containing_feedback(c, "f"),
    "feedback.labelled_since": lambda c: feedback.labelled_since(c, BOT, after_seq=5, kinds=[GroupKind.TRAIN]),
    "feedback.count_new_picks": lambda c: feedback.count_new_picks(c, BOT, after_seq=5, pool=Pool.TRAIN),
    "duels.picks": lambda c: list(duels.picks(c, "duel_1")),
    "duels.count_picks": lambda c: duels.count_picks(c, "duel_1"),
    "verdicts.latest": lambda c: verdicts.latest(c, BOT),
    "stored.insert": lambda c: stored.insert(c, a_group("streamed", metadata={"a": "b"})),
    "stored.get": lambda c: stored.get(c, "g"),
    "stored.page": lambda c: stored.page(c, BOT, after="f", limit=5),
    "stored.page newest": lambda c: stored.page(c, BOT, limit=5, newest_first=True),
    "stored.page of a model": lambda c: stored.page(c, BOT, model="bot@1", after="f", limit=5),
    "stored.page with metadata": lambda c: stored.page(c, BOT, metadata={"a": "b", "c": "d"}, after="f", limit=5),
    "stored.replace_metadata": lambda c: stored.replace_metadata(c, "g", {"c": "d"}),
    "stored.delete": lambda c: stored.delete(c, "g", NOW),
    "groups.recent_prompts": lambda c: groups.recent_prompts(c, BOT, pool=Pool.GATE, limit=5),
}


@pytest.mark.sqlite("its query plans")
@pytest.mark.parametrize("name", PER_REQUEST)
def test_no_hot_query_scans_a_table(store: Store, name: str) -> None:
    put_groups(store, a_group("g"), a_group("streamed", answers=()))
    plan = plans(store, PER_REQUEST[name])
    assert [line for line in plan if line.startswith("SCAN")] == []
    if name not in ("groups.insert", "stored.insert", "stored.delete"):  # which ask nothing
        assert any(line.startswith("SEARCH") for line in plan)


SORTED_BY_INDEX = (
    "groups.latest_answer",
    "feedback.recent",
    "cycles.current",
    "datasets.last_of_a_cycle",
    "groups.recent_prompts",
    "stored.page",
    "stored.page newest",
    "stored.page of a model",
    "stored.page with metadata",
)


@pytest.mark.sqlite("its query plans")
@pytest.mark.parametrize("name", SORTED_BY_INDEX)
def test_the_newest_is_read_off_an_index_and_not_sorted(store: Store, name: str) -> None:
    lines = [line for line in plans(store, PER_REQUEST[name]) if "USE TEMP B-TREE FOR ORDER BY" in line]
    assert lines == []


@pytest.mark.sqlite("its query plans")
def test_the_labelled_since_query_starts_from_the_new_rows(store: Store) -> None:
    plan = plans(store, PER_REQUEST["feedback.labelled_since"])
    assert any("ix_feedback_policy_seq (policy=? AND seq>? AND seq<?)" in line for line in plan)
    assert any(line.startswith("SEARCH groups USING INDEX") and "group_id=?" in line for line in plan)
