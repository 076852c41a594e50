"""The ledger of erasures: one line each in ``erasures.jsonl`` of the state directory, only ever appended.

It stands outside of the database, so that a backup that is restored can be told what must not come back with it. A person's
line holds a salted hash of the id: nobody can be read out of it, and a restored row is matched by hashing its user.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from pairloop.config import Config
from pairloop.errors import StoreError
from pairloop.store import new_id
from pairloop.store.erasures import Erasure, hashed
from pairloop.store.subjects import untagged

FILE = "erasures.jsonl"


@dataclass(frozen=True, slots=True)
class Entry:
    """One erasure: of a person (``hashes`` of the ids they were known by) or of one stored completion (``group_id``)."""

    erasure_id: str
    salt: str
    hashes: tuple[str, ...]
    group_id: str | None
    reason: str
    created_at: datetime

    def is_about(self, subject: str) -> bool:
        return any(hashed(self.salt, name) in self.hashes for name in {subject, untagged(subject)})


def path_of(config: Config) -> Path:
    return config.state_dir / FILE


def entry_about(subjects: Sequence[str], reason: str) -> Entry:
    """A new entry about a person."""
    salt = secrets.token_hex(16)
    hashes = tuple(hashed(salt, subject) for subject in subjects)
    return Entry(new_id("erasure"), salt, hashes, None, reason, datetime.now(UTC))


def entry_about_completion(group_id: str) -> Entry:
    """A new entry about a stored completion that its client deleted."""
    return Entry(new_id("erasure"), "", (), group_id, "deleted by a client", datetime.now(UTC))


def entry_of(erasure: Erasure) -> Entry:
    """The entry as far as a database's row tells of it."""
    one = erasure
    return Entry(one.erasure_id, one.salt, (one.subject_hash,), None, one.reason, one.created_at)


def append(config: Config, entry: Entry) -> None:
    """Write the line durably. StoreError where the disk does not take it."""
    path = path_of(config)
    line = json.dumps({**asdict(entry), "created_at": entry.created_at.isoformat()}) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}; nothing was erased") from error


def read(path: Path) -> list[Entry]:
    """All entries in their order; none where there is no file. StoreError naming the line that is none.

    A last line without its end was never promised to anybody: it is passed over.
    """
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            data = json.loads(line)
            at = datetime.fromisoformat(data["created_at"])
            entries.append(Entry(**{**data, "hashes": tuple(data["hashes"]), "created_at": at}))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}:{number}: not a line of the ledger of erasures: {type(error).__name__}") from error
    return entries


def _whole_lines(path: Path) -> Iterable[bytes]:
    return (line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n"))
