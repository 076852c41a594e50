"""PostgreSQL as the store wants it: one transaction writes at a time, whoever began it, and readers see one snapshot.

A lock that each writing transaction takes first and keeps until after its commit does what SQLite's BEGIN IMMEDIATE does:
what a function read still holds when it writes, rows become visible in the order of their sequence numbers, and no
transaction is ever undone for another's sake. Group commit makes up for it: a turn writes all that waited.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL

from pairloop.errors import StoreError

WRITER_LOCK = int.from_bytes(b"pairloop", "big")
"""The number of the advisory lock; locks are the database's own, so other databases of the server are not concerned."""
LOCK_TIMEOUT_MS = 10_000
"""How long a writer waits for its turn before the database counts as locked; as SQLite's busy timeout."""
IDLE_TIMEOUT_MS = 30_000
"""When the server ends a transaction that says nothing more: its process was stopped, or its machine is gone."""
READERS = 20
"""Connections that read, per process. PostgreSQL takes 100 by default, from all processes together."""

_WAIT_FOR_THE_WRITER_LOCK = sa.text(
    "SELECT set_config('lock_timeout', :lock_timeout, true), set_config('idle_in_transaction_session_timeout', :idle, true),"
    " pg_advisory_xact_lock(:lock)"
)
# libpq's: a server that is gone is noticed within a minute, where the system's own settings take hours.
# The encoding is said because psycopg gives bytes for the texts of a database that has none.
_CONNECTING = {
    "client_encoding": "utf8",
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
}


def is_postgres(url: URL) -> bool:
    return url.get_backend_name() == "postgresql"


def writer_options(url: URL) -> dict[str, Any]:
    """For `create_engine`. READ COMMITTED whatever the server's default is: what is read after the lock is what the last
    writer left, where a snapshot of the whole transaction would be older than the lock."""
    return {"isolation_level": "READ COMMITTED", "pool_size": 1, "max_overflow": 1, **_connections(url)}


def reader_options(url: URL) -> dict[str, Any]:
    """For `create_engine`: one snapshot per transaction, and nothing can be written."""
    options = {"isolation_level": "REPEATABLE READ", "pool_size": READERS // 2, "max_overflow": READERS - READERS // 2}
    return {**options, "execution_options": {"postgresql_readonly": True}, **_connections(url)}


def one_at_a_time(engine: Engine) -> None:
    """Has every transaction of the engine wait for the writer lock, and refuse a database that cannot hold all texts."""
    values = {
        "lock": WRITER_LOCK,
        "lock_timeout": f"{LOCK_TIMEOUT_MS}ms",
        "idle": f"{IDLE_TIMEOUT_MS}ms",
    }

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        connection.execute(_WAIT_FOR_THE_WRITER_LOCK, values)


def refuse_other_encodings(connection: Connection, name: str) -> None:
    """StoreError where the database holds anything but UTF-8: some texts could not be stored, or would come back as bytes."""
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar()
    if encoding != "UTF8":
        raise StoreError(
            f"{name}: the database's encoding is {encoding}, and texts need UTF8. Make one with CREATE DATABASE … TEMPLATE "
            "template0 ENCODING 'UTF8', and name it in store.database. Nothing was changed."
        )


def _connections(url: URL) -> dict[str, Any]:
    """A connection is tried before it is used, so that a server that was started anew costs no request."""
    told = {} if url.get_driver_name() not in ("psycopg", "psycopg2") else _CONNECTING
    arguments = {"application_name": "pairloop", **told}
    return {"pool_pre_ping": True, "connect_args": {key: value for key, value in arguments.items() if key not in url.query}}
