"""Backup: a snapshot of the database and all that it names, taken while everybody goes on, whole or absent.

What an earlier backup in the same folder has copied is not copied again. A backup appears by a rename, once all that it names
is on disk; a killed one leaves nothing that is listed, and what it copied already is found by the next.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pairloop import __version__, faults
from pairloop.errors import ConflictError, StoreError, UnavailableError
from pairloop.store import audit, contents, files, transfer
from pairloop.store.archive import DATABASE, SHARED, Archive, ArchivedFile, Manifest, paths
from pairloop.store.artifacts import MANIFEST, ROOT_OPTION, Artifacts, flush, sha256_of
from pairloop.store.audit import AuditAction
from pairloop.store.contents import NamedArtifact
from pairloop.store.database import reader_engine, writer_engine
from pairloop.store.files import StoredFile
from pairloop.store.store import Store

_MAKING = ".making"
_PRUNED = ".pruned"
_LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class Taken:
    """A new backup. ``copied`` and ``found``: artifacts and uploads; ``pruned``: names of the backups that were removed."""

    path: Path
    manifest: Manifest
    copied: int
    found: int
    pruned: Sequence[str]


def take(store: Store, folder: Path, *, actor: str, keep: int | None = None) -> Taken:
    """Back the store up into ``folder``; with ``keep`` only so many of the newest backups stay there.

    ``actor``: who asked for it, as in the audit trail, which tells of it once it is there.

    What is broken or gone in the store itself is named in the manifest as missing, and does not stop the backup. ConflictError
    while another backup into this folder runs; StoreError where something cannot be read or written: then no backup appears.
    """
    folder = folder.resolve()
    with _failing(folder), _alone(folder):
        taken_at = datetime.now(UTC)
        making = folder / _MAKING
        making.mkdir(mode=0o700)  # people's words
        try:
            transfer.export(store.url, making / DATABASE)
            faults.reach("backup.database_copied")
            copies = _copy_contents(store, making / DATABASE, Artifacts(folder / SHARED))
            manifest = _manifest(store, making / DATABASE, copies, taken_at)
            faults.reach("backup.before_seal")
            _write(making / MANIFEST, manifest.as_text())
            target = folder / f"{taken_at:%Y-%m-%dT%H-%M-%S.%fZ}"
            faults.reach("backup.before_rename")
            making.rename(target)
            faults.reach("backup.after_rename")
            flush(folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        pruned = _prune(folder, keep) if keep is not None else []
    details = {"missing": len(copies.missing), "pruned": pruned}
    store.write(
        lambda c: audit.record(c, AuditAction.BACKUP, actor=actor, subject=str(target), reason="by hand", details=details)
    )
    return Taken(target, manifest, copies.copied, copies.found, pruned)


@dataclass(slots=True)
class _Copies:
    artifacts: dict[str, str] = field(default_factory=dict)
    files: dict[str, ArchivedFile] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    copied: int = 0
    found: int = 0

    def count(self, *, is_there: bool) -> None:
        self.copied, self.found = self.copied + (not is_there), self.found + is_there


def _copy_contents(store: Store, database: Path, shared: Artifacts) -> _Copies:
    """Copy what the snapshot's rows name and ``shared`` does not have."""
    engine = reader_engine(transfer.sqlite_url(database))
    engine.update_execution_options(**{ROOT_OPTION: store.artifacts.root})
    with engine.connect() as c:
        named, uploads = contents.artifacts(c), files.list_(c)
    engine.dispose()
    copies = _Copies()
    for artifact in {shared.path(one.hash): one for one in named}.values():
        is_there = _has(shared, artifact.hash)
        if not is_there and (problem := _copy_artifact(store, artifact, shared)) is not None:
            copies.missing.append(f"{artifact.owner}: {problem}")
            continue
        path = shared.path(artifact.hash)
        copies.artifacts[path.name] = sha256_of(path / MANIFEST)
        copies.count(is_there=is_there)
        faults.reach("backup.after_artifact")
    for upload in uploads:
        path = shared.root / "files" / upload.file_id
        is_there = path.is_file() and sha256_of(path) == upload.sha256
        if not is_there and (problem := _copy_upload(store, upload, shared)) is not None:
            if not _deleted_meanwhile(store, upload, database):
                copies.missing.append(f"file {upload.file_id}: {problem}")
            continue
        copies.files[upload.file_id] = ArchivedFile(upload.sha256, upload.size)
        copies.count(is_there=is_there)
        faults.reach("backup.after_upload")
    return copies


def _has(shared: Artifacts, artifact_hash: str) -> bool:
    """True where an earlier backup has it, unchanged since: what rots on the backup's disk is copied anew."""
    try:
        shared.verify(artifact_hash)
    except UnavailableError:
        raise
    except StoreError:
        return False
    return True


def _copy_artifact(store: Store, artifact: NamedArtifact, shared: Artifacts) -> str | None:
    """Copy it, whole; what is wrong with the store's own, where something is."""
    source = store.artifacts.path(artifact.hash)
    if artifact.path != source:
        return f"{artifact.path} is not among the store's artifacts"
    try:
        store.artifacts.verify(artifact.hash)
    except UnavailableError:  # an outage: a backup without it would pass for a whole one
        raise
    except StoreError as error:
        return str(error)
    publish_copy(store.artifacts.local(source), shared)
    return None


def publish_copy(source: Path, target: Artifacts) -> None:
    """Copy a whole artifact's folder into another folder of artifacts, with what its manifest says."""
    manifest = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
    target.publish(source, {key: value for key, value in manifest.items() if key not in ("hash", "files")})


def _copy_upload(store: Store, upload: StoredFile, shared: Artifacts) -> str | None:
    if not store.artifacts.has_file(upload.path, upload.size):
        return f"{upload.path} is not there whole"
    with store.artifacts.local(upload.path).open("rb") as source:
        copy, _, sha256 = shared.keep_file(upload.file_id, source, limit=upload.size)
    if sha256 != upload.sha256:
        copy.unlink()
        return f"{upload.path} is not what was uploaded"
    return None


def _deleted_meanwhile(store: Store, upload: StoredFile, database: Path) -> bool:
    """True where the file was deleted after the snapshot; then the snapshot's row says so, too."""
    with store.reading() as c:
        now = files.get(c, upload.file_id, deleted=True)
    if now is None or now.deleted_at is None:
        return False
    engine = writer_engine(transfer.sqlite_url(database), "off")
    with engine.begin() as c:
        files.forget(c, [upload.file_id], now.deleted_at)
    engine.dispose()
    transfer.as_one_file(database)
    return True


def _manifest(store: Store, database: Path, copies: _Copies, taken_at: datetime) -> Manifest:
    with closing(sqlite3.connect(database)) as raw:
        damage = [line for (line,) in raw.execute("PRAGMA quick_check") if line != "ok"]
    if damage:
        raise StoreError(f"{store.name}: is damaged, so no backup was made of it: {damage[0]}; see `pairloop doctor`")
    engine = reader_engine(transfer.sqlite_url(database))
    with engine.connect() as c:
        rows, revision = transfer.count_rows(c), transfer.revision(c)
    engine.dispose()
    return Manifest(
        taken_at=taken_at,
        pairloop=__version__,
        revision=revision,
        source=store.url.get_backend_name(),
        database=ArchivedFile(sha256_of(database), database.stat().st_size),
        rows=rows,
        artifacts=copies.artifacts,
        files=copies.files,
        missing=tuple(copies.missing),
    )


def _prune(folder: Path, keep: int) -> list[str]:
    """Remove all but the newest backups, and what none of those needs. StoreError where one of them cannot be read."""
    there = paths(folder)
    needed = [Archive(path).manifest for path in there[-keep:]]
    pruned = [path.name for path in there[:-keep]]
    for name in pruned:
        (folder / name).rename(folder / f"{_PRUNED}-{name}")  # at once, so that no half of it is ever listed
    faults.reach("backup.pruned")
    _remove_pruned(folder)
    shared = folder / SHARED
    kept = {name for manifest in needed for name in manifest.artifacts} | {"tmp", "files"}
    for path in shared.iterdir():
        if path.name not in kept:
            shutil.rmtree(path)
    uploads = {file_id for manifest in needed for file_id in manifest.files}
    for path in (shared / "files").glob("*"):
        if path.name not in uploads:
            path.unlink()
    return pruned


def _remove_pruned(folder: Path) -> None:
    for path in folder.glob(f"{_PRUNED}-*"):
        shutil.rmtree(path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system frees when its holder dies; what a dead holder left is removed."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / _LOCK).open("a") as file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConflictError(f"{folder}: another backup into this folder is running; one at a time") from error
        shutil.rmtree(folder / _MAKING, ignore_errors=True)
        _remove_pruned(folder)
        yield


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    flush(path)
    flush(path.parent)


@contextmanager
def _failing(folder: Path) -> Iterator[None]:
    try:
        yield
    except UnavailableError as error:  # an outage, or the disk is full: another try may succeed
        raise UnavailableError(f"{folder}: no backup was made: {error}") from error
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"{folder}: no backup was made: {error}") from error
