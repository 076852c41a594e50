"""A backup on disk: what it says about itself, and whether that is so.

A folder of backups holds ``<time>/{database.sqlite, manifest.json}`` of each, and ``artifacts/``, which they share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from sqlalchemy.engine import URL

from pairloop.errors import NotFoundError, StoreError
from pairloop.store.artifacts import MANIFEST, Artifacts, sha256_of

DATABASE = "database.sqlite"
ASIDE = "-aside"
"""Of a restore without hard links: the copy of the former database, until it has its name."""
SHARED = "artifacts"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class ArchivedFile:
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup holds.

    ``taken_at``: all that was acknowledged before is in it. ``revision``: of the database's schema. ``source``: which database
    it was. ``artifacts``: by folder, the SHA-256 of its manifest, which names the hashes of its files. ``files``: uploads, by
    id. ``missing``: what was broken or gone in the store itself, in words.
    """

    taken_at: datetime
    pairloop: str
    revision: str
    source: str
    database: ArchivedFile
    rows: Mapping[str, int]
    artifacts: Mapping[str, str]
    files: Mapping[str, ArchivedFile]
    missing: tuple[str, ...] = ()

    def as_text(self) -> str:
        """JSON of one spelling, sealed with its own hash: a single other bit shows."""
        content = {"format": FORMAT, **asdict(self), "taken_at": self.taken_at.isoformat()}
        return _spelled({**content, "seal": _seal(content)})

    @classmethod
    def parse(cls, text: str, where: Path) -> Self:
        """The manifest that ``as_text`` wrote; StoreError naming the file where it is another format or was changed."""
        try:
            content = json.loads(text)
            seal, version = content.pop("seal"), content.pop("format")
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise StoreError(f"{where}: was changed: it is no manifest of a backup") from error
        if version != FORMAT:
            raise StoreError(f"{where}: a backup of format {version}; this pairloop reads {FORMAT}: upgrade pairloop")
        content = {"format": version, **content}
        if seal != _seal(content) or text != _spelled({**content, "seal": seal}):
            raise StoreError(f"{where}: was changed: its content does not match its seal")
        return cls._of(content)

    @classmethod
    def _of(cls, content: Mapping[str, Any]) -> Self:
        return cls(
            taken_at=datetime.fromisoformat(content["taken_at"]),
            pairloop=content["pairloop"],
            revision=content["revision"],
            source=content["source"],
            database=ArchivedFile(**content["database"]),
            rows=content["rows"],
            artifacts=content["artifacts"],
            files={file_id: ArchivedFile(**entry) for file_id, entry in content["files"].items()},
            missing=tuple(content["missing"]),
        )


class Archive:
    """One backup."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        try:
            text = (self.path / MANIFEST).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path / MANIFEST}: cannot be read: {error}") from error
        self.manifest = Manifest.parse(text, self.path / MANIFEST)
        self.artifacts = Artifacts(self.path.parent / SHARED)

    @classmethod
    def find(cls, path: Path) -> Self:
        """The backup at ``path``, or the newest one in the folder ``path``; NotFoundError where there is none."""
        if (path / MANIFEST).exists():
            return cls(path)
        there = paths(path)
        if not there:
            raise NotFoundError(f"{path}: no backup, and no folder of backups; `pairloop backup` makes one")
        return cls(there[-1])

    @property
    def database(self) -> Path:
        return self.path / DATABASE

    def upload(self, file_id: str) -> Path:
        """Where the content of an uploaded file lies."""
        return self.artifacts.root / "files" / file_id

    def has(self, artifact_hash: str) -> bool:
        """True where the backup holds this artifact, as it was published."""
        name = self.artifacts.path(artifact_hash).name
        return name in self.manifest.artifacts and not self._artifact_problems(name, self.manifest.artifacts[name])

    def has_upload(self, file_id: str, sha256: str) -> bool:
        """True where the backup holds this file with this content."""
        entry = self.manifest.files.get(file_id)
        return entry is not None and entry.sha256 == sha256 and not _changed(self.upload(file_id), entry)

    def problems(self, known: dict[object, list[str]] | None = None) -> list[str]:
        """What is no longer as it was written, by its path; reads everything.

        ``known`` holds what was found about what backups share, so that a list of them reads it once.
        """
        known = {} if known is None else known
        found = _changed(self.database, self.manifest.database)
        for name, manifest_sha256 in self.manifest.artifacts.items():
            if (name, manifest_sha256) not in known:
                known[name, manifest_sha256] = self._artifact_problems(name, manifest_sha256)
            found += known[name, manifest_sha256]
        for file_id, entry in self.manifest.files.items():
            if (file_id, entry) not in known:
                known[file_id, entry] = _changed(self.upload(file_id), entry)
            found += known[file_id, entry]
        return found

    def _artifact_problems(self, name: str, manifest_sha256: str) -> list[str]:
        manifest = self.artifacts.path(name) / MANIFEST
        if manifest.is_file() and sha256_of(manifest) != manifest_sha256:
            return [f"{manifest}: was changed since the backup"]  # it must not accuse the files that it names
        try:
            self.artifacts.verify(name)
        except StoreError as error:
            return [str(error)]
        return []


def staged(url: URL, state_dir: Path | None) -> Path | None:
    """Where a restore makes what is to become the database at ``url``; one that was killed leaves it there.

    Beside a database that is a file, else in the state directory of whoever restores; None where there is no such place.
    """
    if url.get_backend_name() == "sqlite":
        return beside(Path(url.database).resolve()) if url.database else None
    return None if state_dir is None else beside(state_dir.resolve() / DATABASE)


def beside(database: Path) -> Path:
    return database.with_name(f"{database.name}.restoring")


def remove_staged(path: Path) -> None:
    """Remove it, and what lies beside it."""
    for suffix in ("", "-wal", "-shm", ASIDE):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def paths(folder: Path) -> list[Path]:
    """The backups in a folder, oldest first: none of what is being made or removed."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and (path / MANIFEST).exists())


def _changed(path: Path, entry: ArchivedFile) -> list[str]:
    if not path.is_file():
        return [f"{path}: is missing"]
    if path.stat().st_size != entry.bytes or sha256_of(path) != entry.sha256:
        return [f"{path}: was changed since the backup"]
    return []


def _spelled(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_spelled(content).encode()).hexdigest()
