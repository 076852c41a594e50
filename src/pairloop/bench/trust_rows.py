"""Databases of a wished size: groups and picks by the hundred thousand, made inside SQLite from one real group."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Connection, Table

from pairloop.store import groups
from pairloop.store.schema import completions, feedback
from pairloop.store.schema import groups as group_table
from pairloop.types import Completion, FinishReason, Group, GroupKind, Message, Pool

_NUMBERS = "WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i + 1 < {end})"
_AT = "strftime('%Y-%m-%dT%H:%M:%f', '2026-01-01', n.i || ' seconds') || '000Z'"
_GROUP_ID = "printf('chatcmpl-%036d', n.i)"


def group_id(number: int) -> str:
    """The id of the group of this number."""
    return f"chatcmpl-{number:036d}"


def add_groups(c: Connection, policy: str, first: int, end: int, *, picked: bool = False) -> None:
    """Groups ``first`` to ``end`` - 1 of two answers each, a second apart; ``picked``: with a pick each."""
    template = _template(policy, f"template-{first}")
    groups.insert(c, template)
    new_hash = "lower(hex(randomblob(16)))"
    changed = {
        "group_id": _GROUP_ID,
        "created_at": _AT,
        "user": "printf('customer-%d', n.i % 1000)",
        "prompt_hash": new_hash,
        "answer_key": new_hash,
    }
    numbers = _NUMBERS.format(first=first, end=end)
    for table in (group_table, completions):
        columns = [column.name for column in table.columns]
        values = ", ".join(changed.get(name, f't."{name}"') for name in columns)
        copied = f"SELECT {values} FROM n CROSS JOIN {table.name} t WHERE t.group_id = ?"
        c.exec_driver_sql(f"{numbers} INSERT INTO {_into(table, columns)} {copied}", (template.group_id,))
    if picked:
        _add_picks(c, policy, numbers)


def _add_picks(c: Connection, policy: str, numbers: str) -> None:
    values = {
        "feedback_id": "printf('feedback_%032d', n.i)",
        "group_id": _GROUP_ID,
        "policy": f"'{policy}'",
        "metric": "'preference'",
        "source": "'human'",
        "rater_id": "printf('customer-%d', n.i % 1000)",
        "label": "'A'",
        "choice_index": "-1",
        "shown_order": "'[0, 1]'",
        "revision": "0",
        "tags": "'{}'",
        "created_at": _AT,
    }
    into = _into(feedback, list(values))
    c.exec_driver_sql(f"{numbers} INSERT INTO {into} SELECT {', '.join(values.values())} FROM n")


def _into(table: Table, columns: list[str]) -> str:
    names = ", ".join(f'"{name}"' for name in columns)
    return f"{table.name} ({names})"


def _template(policy: str, group_id: str) -> Group:
    """What a chat request with two short answers leaves."""
    answers = tuple(
        Completion(
            text=f"Your order left our warehouse on Monday, and should be with you by Thursday at the latest ({side}).",
            token_ids=tuple(range(60)),
            logps=tuple(-0.5 for _ in range(60)),
            version=0,
            finish_reason=FinishReason.STOP,
        )
        for side in "ab"
    )
    question = Message("user", "Where is my order? I have been waiting for it since Monday, and nobody answers the telephone.")
    return Group(
        group_id, policy, GroupKind.TRAIN, Pool.TRAIN, (question,), answers, datetime.now(UTC), tuple(range(40)), user="nobody"
    )
