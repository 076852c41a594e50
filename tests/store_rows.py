"""Rows for the store's tests: valid by default, any field given by name."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store import (
    Store,
    feedback,
    groups,
    new_group_id,
    new_id,
)
from pairloop.store.schema import metadata
from pairloop.types import (
    Completion,
    Cycle,
    CycleState,
    CycleStep,
    Dataset,
    Feedback,
    Group,
    GroupKind,
    Label,
    Message,
    Pool,
    Run,
    RunStatus,
    Source,
    Version,
    VersionKind,
)

NOW = datetime(2026, 5, 4, 12, 0, 0, 123456, tzinfo=UTC)
BOT = "bot"


def minutes(n: float) -> datetime:
    return NOW + timedelta(minutes=n)


def a_group(name: str = "", at: float = 0, answers: tuple[str, ...] = ("yes", "no"), **other: Any) -> Group:
    return Group(
        **{
            "group_id": name or new_group_id(),
            "policy": BOT,
            "kind": GroupKind.TRAIN,
            "pool": Pool.TRAIN,
            "prompt": (Message("user", f"hello {name}"),),
            "completions": tuple(Completion(text, (1, 2), (-0.5, -0.25), version=0) for text in answers),
            "created_at": minutes(at),
            **other,
        }
    )


def a_pick(group_id: str, rater: str = "rita", label: Label | None = Label.A, at: float = 0, **other: Any) -> Feedback:
    return Feedback(
        **{
            "feedback_id": new_id("feedback"),
            "group_id": group_id,
            "metric": "preference",
            "source": Source.HUMAN,
            "rater_id": rater,
            "created_at": minutes(at),
            "label": label,
            **other,
        }
    )


def a_cycle(number: int = 1, policy: str = BOT) -> Cycle:
    first = CycleStep(CycleState.BUILDING, {"why": "test"}, NOW)
    return Cycle(f"cycle_{policy}_{number}", policy, number, 0, "manual", minutes(number), (first,))


def a_dataset(name: str, at: float = 0) -> Dataset:
    return Dataset(name, BOT, f"/artifacts/{name}", 3, 1, {"kept": 4}, {"tie": 2}, minutes(at))


def a_version(number: int, **other: Any) -> Version:
    return Version(
        **{
            "policy": BOT,
            "number": number,
            "kind": VersionKind.ADAPTER if number else VersionKind.BASE,
            "path": f"/artifacts/v{number}",
            "artifact_hash": f"hash{number}",
            "parent": 0 if number else None,
            "dataset_id": None,
            "run_id": None,
            "created_at": minutes(number),
            **other,
        }
    )


def a_run(name: str = "run_1", attempt: int = 1) -> Run:
    return Run(
        run_id=name,
        policy=BOT,
        cycle_id="cycle_bot_1",
        dataset_id="data_1",
        parent=0,
        status=RunStatus.RUNNING,
        owner="me",
        attempt=attempt,
        lease_expires_at=minutes(1),
        heartbeat_at=NOW,
        progress={"step": 0},
        result={},
        error=None,
        created_at=minutes(attempt),
    )


def put_groups(store: Store, *rows: Group) -> None:
    for future in [store.submit(partial(groups.insert, group=row)) for row in rows]:
        future.result()


def put_picks(store: Store, *rows: Feedback) -> list[Feedback]:
    return [store.write(partial(feedback.insert, row=row))[0] for row in rows]


def read(store: Store, query: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    with store.reading() as c:
        return query(c, *arguments, **named)


class Blocked:
    """Holds the writer inside a function, so that what is submitted meanwhile shares the next batch."""

    def __init__(self, store: Store) -> None:
        self._entered, self._leave = threading.Event(), threading.Event()
        self._future = store.submit(self._wait)
        assert self._entered.wait(10)

    def _wait(self, _c: Connection) -> None:
        self._entered.set()
        assert self._leave.wait(10)

    def release(self) -> None:
        self._leave.set()
        self._future.result()


def contents_of(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables but the audit trail, to which backups and restores append."""
    with store.reading() as c:
        return {
            table.name: [tuple(row) for row in c.execute(sa.select(table).order_by(*table.primary_key.columns))]
            for table in metadata.sorted_tables
            if table.name != "audit"
        }
