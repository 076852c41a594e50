"""Restore: a backup becomes the store of a configuration, whole or not at all; what was there is moved aside, never deleted.

All that is to be done to the rows (migrations, leases of processes that are gone, sessions, revocations and erasures since
the backup) is done to a copy of the backup's database beside the target; the last step puts that copy in place, by a rename
or in one transaction.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from pairloop import faults
from pairloop.config import Config, override
from pairloop.errors import ConfigError, ConflictError, StoreError
from pairloop.store import audit, doctor, erasures, revocations, transfer
from pairloop.store.archive import ASIDE, Archive, Manifest, beside, remove_staged, staged
from pairloop.store.artifacts import flush, sha256_of
from pairloop.store.audit import AuditAction
from pairloop.store.backup import publish_copy
from pairloop.store.database import describe, failing_as_store_error, parse_url, reader_engine
from pairloop.store.doctor import Problem
from pairloop.store.erasures import Erasure
from pairloop.store.jobs import JobStatus
from pairloop.store.schema import jobs, leases, reservations, runs, sessions
from pairloop.store.store import Store
from pairloop.types import RunStatus

AfterRestore = Callable[[Store, Config], None]
"""Told of a restored store before anybody sees it: what must hold although the backup is older, such as erasures."""

_SIDE_FILES = ("-wal", "-shm")


@dataclass(frozen=True, slots=True)
class Restored:
    """``aside``: where the former database lies. ``copied``, ``found``: artifacts and uploads. ``problems``: the doctor's.

    ``revocations``: how many keys and accounts stay as they became since the backup; None where no database could tell.
    """

    path: Path
    manifest: Manifest
    database: str
    aside: str | None
    copied: int
    found: int
    revocations: int | None
    problems: Sequence[Problem]


def restore(
    archive: Archive, config: Config, *, actor: str, force: bool = False, after: Sequence[AfterRestore] = ()
) -> Restored:
    """Put the backup in the place that ``config`` names; with ``force`` also where there is data, which is moved aside.

    ``actor``: who asked for it, as in the audit trail.

    StoreError naming every file of the backup that was changed, or where a newer pairloop wrote it; ConflictError where the
    target has data, or a process that uses it. Then nothing was changed.
    """
    url = parse_url(config.database_url)
    if not url.database:
        raise ConfigError(f"store.database: {config.database_url!r} names no database that a backup could be restored into")
    _refuse_newer(archive)
    if problems := archive.problems():
        raise StoreError(f"{archive.path}: this backup is not whole, nothing was restored:\n" + "\n".join(problems))
    if _is_sqlite(config) and _file_of(config).exists():
        _refuse_open(_file_of(config))
    is_taken = _has_data(config)
    if is_taken and not force:
        raise ConflictError(
            f"{describe(url)}: holds data already; --force moves it aside (nothing is deleted) and restores {archive.path.name}"
        )
    with _staged(archive, config) as staging:
        with Store.open(staging) as store:
            copied, found = _copy_contents(archive, store)
            faults.reach("restore.contents_copied")
            store.write(_forget_owners)
            store.write(_forget_visits)
            held = _hold_revocations(store, config)
            faults.reach("restore.revoked")
            store.write(partial(_record, archive=archive, actor=actor))
            for act in after:
                act(store, config)
        transfer.as_one_file(_file_of(staging))
        faults.reach("restore.before_aside")
        aside = _put_in_place(_file_of(staging), config, is_taken=is_taken)
    faults.reach("restore.in_place")
    with Store.open(config) as store:
        left = doctor.check(store)
    return Restored(archive.path, archive.manifest, describe(url), aside, copied, found, held, left)


def known_erasures(config: Config) -> list[Erasure]:
    """Those that the database in the configured place tells of, which a restore is about to replace; none where it cannot."""
    with _former(config) as engine:
        if engine is None:
            return []
        try:
            with engine.connect() as c:
                return erasures.list_(c)
        except SQLAlchemyError:  # damaged, or older than erasures
            return []


@contextmanager
def _former(config: Config) -> Iterator[Engine | None]:
    """The database in the configured place, to be read; None where there is none."""
    if _is_sqlite(config) and not _file_of(config).exists():
        yield None
        return
    engine = reader_engine(parse_url(config.database_url))
    try:
        yield engine
    finally:
        engine.dispose()


def _hold_revocations(store: Store, config: Config) -> int | None:
    """What was revoked since stays so; read at the last moment, for a command line may revoke beside."""
    with _former(config) as engine:
        former = None if engine is None else revocations.read(engine)
    return None if former is None else store.write(partial(revocations.hold, former=former))


def _refuse_newer(archive: Archive) -> None:
    known, made = transfer.known_revisions(), archive.manifest
    if made.revision not in known:
        raise StoreError(
            f"{archive.path}: pairloop {made.pairloop} made it, with schema revision {made.revision!r}; this one goes up to "
            f"{max(known)!r}: upgrade pairloop. Nothing was restored."
        )


def _has_data(config: Config) -> bool:
    url = parse_url(config.database_url)
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
        return False
    engine = reader_engine(url)
    try:
        with failing_as_store_error(describe(url)), engine.connect() as c:
            return transfer.has_rows(c)
    except StoreError:
        if not _is_sqlite(config):
            raise
        return True  # a damaged file is what restores are for; it goes aside as it is
    finally:
        engine.dispose()


@contextmanager
def _staged(archive: Archive, config: Config) -> Iterator[Config]:
    """The configuration of a store whose database is a copy of the backup's, beside the target; gone at the end."""
    path = staged(parse_url(config.database_url), config.state_dir)
    assert path is not None, "a configuration has a state directory, and a database in memory was refused"
    with failing_as_store_error(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_staged(path)
        shutil.copyfile(archive.database, path)
    try:
        yield override(config, {"store": {"database": transfer.sqlite_url(path).render_as_string()}})
    finally:
        remove_staged(path)


def _copy_contents(archive: Archive, store: Store) -> tuple[int, int]:
    """Artifacts and uploads of the backup that the store's own folder does not have whole: how many, and how many it had."""
    copied = found = 0
    for name in archive.manifest.artifacts:
        if store.artifacts.is_whole(name):
            found += 1
        else:
            publish_copy(archive.artifacts.path(name), store.artifacts)
            copied += 1
    for file_id, entry in archive.manifest.files.items():
        path = store.artifacts.root / "files" / file_id
        if store.artifacts.has_file(path, entry.bytes) and sha256_of(store.artifacts.local(path)) == entry.sha256:
            found += 1
        else:
            with archive.upload(file_id).open("rb") as source:
                store.artifacts.keep_file(file_id, source, limit=entry.bytes)
            copied += 1
    return copied, found


def _forget_owners(c: Connection) -> None:
    """The processes that held leases, runs and jobs are gone: whoever comes next goes on at once."""
    now = datetime.now(UTC)
    c.execute(sa.update(leases).values(owner=None))
    c.execute(sa.update(runs).where(runs.c.status == RunStatus.RUNNING.value).values(lease_expires_at=now))
    running = jobs.c.status == JobStatus.RUNNING.value
    c.execute(sa.update(jobs).where(running).values(status=JobStatus.QUEUED.value))
    c.execute(sa.update(jobs).where(jobs.c.owner.is_not(None)).values(owner=None, lease_expires_at=None))


def _forget_visits(c: Connection) -> None:
    """Nobody is signed in, who has logged out since the backup least of all; and no comparison is held for anybody."""
    c.execute(sa.delete(sessions))
    c.execute(sa.delete(reservations).where(reservations.c.done_at.is_(None)))


def _record(c: Connection, archive: Archive, actor: str) -> None:
    details = {"taken_at": archive.manifest.taken_at.isoformat(), "pairloop": archive.manifest.pairloop}
    audit.record(c, AuditAction.RESTORE, actor=actor, subject=archive.path.name, reason="by hand", details=details)


def _put_in_place(made: Path, config: Config, *, is_taken: bool) -> str | None:
    """The last step; where the former database lies now."""
    name = f"before-restore-{datetime.now(UTC):%Y%m%dT%H%M%S-%fZ}"  # its own also where two restores follow within a second
    url = parse_url(config.database_url)
    if not _is_sqlite(config):
        schema = name.replace("-", "_").lower() if is_taken else None
        transfer.load(made, url, aside=schema)
        return f"schema {schema}" if schema else None
    target = _file_of(config)
    aside = _set_aside(target, name) if target.exists() else None
    faults.reach("restore.set_aside")
    os.replace(made, target)
    flush(target.parent)
    return None if aside is None else str(aside)


def _set_aside(path: Path, suffix: str) -> Path:
    """Give the file a second name; its first one is taken over in the next step, so that it never is nobody's."""
    _refuse_open(path)
    aside = path.with_name(f"{path.name}.{suffix}")
    for side in _SIDE_FILES:  # of a damaged file only: its log must not be read into the restored one
        if path.with_name(path.name + side).exists():
            path.with_name(path.name + side).rename(aside.with_name(aside.name + side))
    try:
        os.link(path, aside)
    except OSError:  # a file system without hard links
        _copy_aside(path, aside)
    return aside


def _copy_aside(path: Path, aside: Path) -> None:
    """Copied, and not renamed: a restore that is killed then must not leave a place where a new store would begin."""
    copy = path.with_name(beside(path).name + ASIDE)
    with failing_as_store_error(str(aside)):
        shutil.copyfile(path, copy)
        flush(copy)
        copy.rename(aside)


def _refuse_open(path: Path) -> None:
    """ConflictError where another process has the SQLite file open: leaving WAL mode takes everybody else's absence."""
    try:
        with closing(sqlite3.connect(path, timeout=1.0)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.OperationalError as error:
        raise ConflictError(f"{path}: a process has it open ({error}); stop the server and its workers first") from error
    except sqlite3.DatabaseError:
        return  # damaged: it goes aside as it is


def _is_sqlite(config: Config) -> bool:
    return parse_url(config.database_url).get_backend_name() == "sqlite"


def _file_of(config: Config) -> Path:
    return Path(str(parse_url(config.database_url).database)).resolve()
