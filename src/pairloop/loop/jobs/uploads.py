"""Files: taken in chunk by chunk, checked quickly, and deleted where no job needs them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.errors import ConflictError, InvalidRequestError, NotFoundError
from pairloop.redaction import Redactor
from pairloop.store import Store, audit, files, jobs, new_wire_id
from pairloop.store.audit import AuditAction
from pairloop.store.files import FileStatus, Purpose, StoredFile

MAX_NAME = 255
_LOOK = 1 << 20


class TooLarge(InvalidRequestError):
    """A file beyond ``serve.max_file_bytes`` (HTTP 413)."""


def upload(store: Store, config: Config, source: BinaryIO, *, filename: str, purpose: str) -> StoredFile:
    """Keep a file for training; InvalidRequestError (param ``file`` or ``purpose``) where it is none."""
    if purpose != Purpose.FINE_TUNE:
        raise InvalidRequestError(
            f"Invalid value for 'purpose': {purpose[:100]!r}; this server takes files for {Purpose.FINE_TUNE.value!r} only.",
            param="purpose",
        )
    with redacted(store.redactor if config.privacy.redact_files else None, source) as kept:
        file = keep(store, kept, filename=filename, purpose=Purpose.FINE_TUNE, limit=config.serve.max_file_bytes)
    if file.size == 0:
        store.artifacts.discard(file.path)
        raise InvalidRequestError("The file is empty; it needs at least one row of JSON.", param="file", code="empty_file")
    store.write(lambda c: files.insert(c, file))
    return file


@contextmanager
def redacted(redactor: Redactor | None, source: BinaryIO) -> Iterator[BinaryIO]:
    """``source`` without what ``redactor`` takes out of the values of each line's JSON; a line that is none is a text."""
    if redactor is None:
        yield source
        return
    with TemporaryFile() as file:
        for line in source:
            text = line.decode("utf-8", "surrogateescape")
            body = text.rstrip("\r\n")
            file.write((redactor.json_text(body) + text[len(body) :]).encode("utf-8", "surrogateescape"))
        file.seek(0)
        yield file


def keep(store: Store, source: BinaryIO, *, filename: str, purpose: Purpose, limit: int) -> StoredFile:
    """Copy ``source`` beside the artifacts, and the row that says so, which the caller inserts."""
    file_id = new_wire_id("file-")
    try:
        path, size, sha256 = store.artifacts.keep_file(file_id, source, limit=limit)
    except ValueError as error:
        raise TooLarge(f"The file has more than {limit} bytes (serve.max_file_bytes).", param="file") from error
    details = _trouble(path) if purpose is Purpose.FINE_TUNE else None
    return StoredFile(
        file_id=file_id,
        filename=_plain_name(filename),
        purpose=purpose,
        size=size,
        sha256=sha256,
        path=str(path),
        status=FileStatus.PROCESSED if details is None else FileStatus.ERROR,
        status_details=details,
        created_at=datetime.now(UTC),
    )


def keep_text(store: Store, text: str, *, filename: str) -> StoredFile:
    """A file of results; see `keep`."""
    data = text.encode()
    return keep(store, BytesIO(data), filename=filename, purpose=Purpose.RESULTS, limit=len(data))


def delete(store: Store, file_id: str, *, actor: str, reason: str) -> None:
    """Remove a file's content; ConflictError while a job that has not ended needs it, NotFoundError where there is none."""

    def mark(c: Connection) -> StoredFile:
        file = get(c, file_id)
        job = jobs.using_file(c, file_id)
        if job is not None:
            raise ConflictError(f"{file_id} is needed by {job.job_id}, which is {job.status}; cancel that job first")
        files.forget(c, [file_id], datetime.now(UTC))
        audit.record(c, AuditAction.FILE_DELETE, actor=actor, subject=file_id, reason=reason, details={"bytes": file.size})
        return file

    store.artifacts.discard(store.write(mark).path)


def get(c: Connection, file_id: str, *, param: str = "file_id") -> StoredFile:
    """The file; NotFoundError (naming ``param``) where there is none, or no more."""
    file = files.get(c, file_id)
    if file is None:
        raise NotFoundError(f"no file {file_id!r}; GET /v1/files lists those there are", param=param)
    return file


def _trouble(path: Path) -> str | None:
    """Why the first row cannot be one; None where it is JSON, or too long to look at here. A job reads the whole file."""
    with path.open("rb") as file:
        head = file.read(_LOOK)
    lines = [line for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    if not lines:
        return "the file holds no rows" if len(head) < _LOOK else None
    if lines[0].lstrip().startswith(b"[") or (len(lines) == 1 and len(head) == _LOOK):
        return None
    try:
        json.loads(lines[0])
    except (ValueError, RecursionError) as error:
        return f"the first row is not JSON: {error}"
    return None


def _plain_name(name: str) -> str:
    """The last part of a client's path, without control characters."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(character for character in last if character.isprintable())[:MAX_NAME] or "file"
