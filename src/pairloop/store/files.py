"""Uploaded files and files of results: rows here, their contents beside the artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from pairloop.errors import NotFoundError
from pairloop.store import artifacts
from pairloop.store.schema import files


class Purpose(StrEnum):
    """What a file is for; results are written by jobs alone."""

    FINE_TUNE = "fine-tune"
    RESULTS = "fine-tune-results"


class FileStatus(StrEnum):
    """``error``: its first row is no JSON; a job would say so of every row."""

    UPLOADED = "uploaded"
    PROCESSED = "processed"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file. ``path`` is absolute; ``deleted_at`` where the content is gone and only what jobs remember is left."""

    file_id: str
    filename: str
    purpose: Purpose
    size: int
    sha256: str
    path: str
    status: FileStatus
    status_details: str | None
    created_at: datetime
    deleted_at: datetime | None = None


def insert(c: Connection, file: StoredFile) -> None:
    c.execute(
        sa.insert(files),
        {
            "file_id": file.file_id,
            "filename": file.filename,
            "purpose": file.purpose.value,
            "bytes": file.size,
            "sha256": file.sha256,
            "path": artifacts.to_row(c, file.path),
            "status": file.status.value,
            "status_details": file.status_details,
            "created_at": file.created_at,
            "deleted_at": None,
        },
    )


def get(c: Connection, file_id: str, *, deleted: bool = False) -> StoredFile | None:
    """The file; one that was deleted only where asked for."""
    statement = sa.select(files).where(files.c.file_id == file_id)
    if not deleted:
        statement = statement.where(files.c.deleted_at.is_(None))
    row = c.execute(statement).first()
    return None if row is None else _file(c, row)


def list_(
    c: Connection, *, limit: int | None = None, after: str | None = None, purpose: str | None = None, newest_first: bool = True
) -> list[StoredFile]:
    """At most ``limit`` files that follow ``after``; NotFoundError where there is no such file."""
    statement = sa.select(files).where(files.c.deleted_at.is_(None))
    if after is not None:
        if get(c, after, deleted=True) is None:
            raise NotFoundError(f"no file {after!r}", param="after")
        statement = statement.where(files.c.file_id < after if newest_first else files.c.file_id > after)
    if purpose is not None:
        statement = statement.where(files.c.purpose == purpose)
    order = files.c.file_id.desc() if newest_first else files.c.file_id
    return [_file(c, row) for row in c.execute(statement.order_by(order).limit(limit))]


def forget(c: Connection, file_ids: Sequence[str], at: datetime) -> None:
    """Mark files as deleted; the caller removes their contents after the commit."""
    c.execute(sa.update(files).where(files.c.file_id.in_(file_ids)).values(deleted_at=at))


def _file(c: Connection, row: Row[Any]) -> StoredFile:
    return StoredFile(
        file_id=row.file_id,
        filename=row.filename,
        purpose=Purpose(row.purpose),
        size=row.bytes,
        sha256=row.sha256,
        path=artifacts.from_row(c, row.path),
        status=FileStatus(row.status),
        status_details=row.status_details,
        created_at=row.created_at,
        deleted_at=row.deleted_at,
    )
