"""Artifact folders (versions and datasets): named by their content, written elsewhere, and renamed into place.

A folder under ``root`` is whole, or it is not there: its files are flushed to disk before the rename, and a killed writer
leaves only a folder under ``root/tmp``, which nobody reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sqlalchemy import Connection

from pairloop import faults
from pairloop.errors import ArtifactError, StoreError, UnavailableError

if TYPE_CHECKING:
    from pairloop.store.checkpoints import FarCheckpoints

MANIFEST = "manifest.json"
STALE_AFTER_S = 86_400.0
"""A temporary folder in which nothing was written for so long belongs to a writer that is gone."""
_NAME_LENGTH = 32
CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Artifact:
    """A published folder; ``hash`` covers names and contents of all its files but the manifest."""

    hash: str
    path: Path
    manifest: Mapping[str, Any]


ROOT_OPTION = "pairloop_artifacts_root"
"""The execution option by which a store's connections know where its artifacts lie."""


def to_row(c: Connection, path: str) -> str:
    """An artifact's path as rows hold it: relative to the root, so that a state directory can be moved or copied."""
    root: Path | None = c.get_execution_options().get(ROOT_OPTION)
    if root is not None and Path(path).is_relative_to(root):
        return Path(path).relative_to(root).as_posix()
    return path


def from_row(c: Connection, path: str) -> str:
    """The absolute path of an artifact that a row names, under the root as it is now; an absolute path stays as it is."""
    root: Path | None = c.get_execution_options().get(ROOT_OPTION)
    return path if root is None else str(root / path)


class Artifacts:
    """The folder of published artifacts."""

    is_far = False
    """Whether reading takes a network: then what can be told from names and sizes is."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._staging = self.root / "tmp"
        with _failing_as_store_error(self.root):
            self._staging.mkdir(parents=True, exist_ok=True)
            for folder in self.stale():
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """A fresh temporary folder on the artifacts' own disk, removed at the end unless it was published."""
        with _failing_as_store_error(self.root):
            folder = Path(tempfile.mkdtemp(prefix="stage-", dir=self._staging))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, folder: Path, manifest: Mapping[str, Any]) -> Artifact:
        """Move ``folder`` (of ``stage()``) to ``root/<hash[:32]>``, with a manifest that lists each file's SHA-256 and size.

        The same content gives the same path, and the manifest that was there first. A folder from anywhere else is copied,
        and stays. StoreError where it is empty, holds links or cannot be written; ValueError where ``manifest`` sets ``hash``
        or ``files``, which are ours.
        """
        if reserved := {"hash", "files"} & manifest.keys():
            raise ValueError(f"the manifest's {sorted(reserved)} are written by publish()")
        if folder.resolve().parent != self._staging:
            with self.stage() as copy, _failing_as_store_error(folder):
                shutil.copytree(folder, copy, dirs_exist_ok=True, symlinks=True)
                return self.publish(copy, manifest)
        with _failing_as_store_error(folder):
            files = hash_files(folder)
            artifact_hash = hash_of(files)
            target = self.path(artifact_hash)
            if self._take_existing(artifact_hash):
                shutil.rmtree(folder)
            else:
                full = {**manifest, "hash": artifact_hash, "files": files}
                (folder / MANIFEST).write_text(json.dumps(full, indent=2, sort_keys=True) + "\n", encoding="utf-8")
                faults.reach("artifact.before_flush")
                flush_tree(folder)
                faults.reach("artifact.before_rename")
                folder.rename(target)
                faults.reach("artifact.after_rename")
                flush(self.root)
            return Artifact(artifact_hash, target, read_manifest(target))

    def keep_file(self, file_id: str, source: BinaryIO, *, limit: int) -> tuple[Path, int, str]:
        """Copy ``source`` to ``root/files/<file_id>``, whole or not at all; its path, size in bytes and SHA-256.

        ValueError where it has more than ``limit`` bytes; StoreError where it cannot be written.
        """
        target, digest, size = self.root / "files" / file_id, hashlib.sha256(), 0
        with self.stage() as folder, _failing_as_store_error(target):
            target.parent.mkdir(exist_ok=True)
            with (folder / file_id).open("wb") as file:
                while chunk := source.read(CHUNK):
                    size += len(chunk)
                    if size > limit:
                        raise ValueError(f"the file has more than {limit} bytes")
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            faults.reach("file.before_rename")
            (folder / file_id).rename(target)
            faults.reach("file.after_rename")
            flush(target.parent)
        return target, size, digest.hexdigest()

    def path(self, artifact_hash: str) -> Path:
        """Where the artifact with this hash lies (or would lie)."""
        return self.root / artifact_hash[:_NAME_LENGTH]

    def reach(self) -> None:
        """StoreError where the place of the artifacts cannot be reached; asked once, when a process starts."""

    def local(self, path: str | Path) -> Path:
        """The files of a version, a dataset or an upload, on this machine: to be called before they are read.

        ``path`` as rows' types have it; one that is not under the root (a base model) is given back as it is.
        """
        return self.root / path

    def hold(self, path: str | Path) -> Path:
        """As `local`, for files that are read again and again: a training's data, a version that engines have loaded."""
        return self.local(path)

    def checkpoints(self, run: str) -> FarCheckpoints | None:  # noqa: ARG002 - a folder here is not elsewhere
        """Where a run's newest checkpoint is shared with other machines; None where it is not."""
        return None

    def sharing_runs(self, *, older_than_s: float | None = None) -> dict[str, str]:  # noqa: ARG002 - see `checkpoints`
        """The runs of which a checkpoint is shared with other machines, or a part of one, each with its URL.

        With ``older_than_s`` those of which nothing was written for so long.
        """
        return {}

    def close(self) -> None:
        """Let go of what was held; a second call does nothing."""

    def address(self, path: str) -> str:
        """Where the files lie for everybody, to be shown."""
        return path

    def discard(self, path: str | Path) -> None:
        """Remove an uploaded file's content; nothing where it is gone."""
        self.local(path).unlink(missing_ok=True)

    def clear(self, path: str | Path, *, with_manifest: bool) -> bool:
        """Remove an artifact's files for good, by an erasure or because of their age; False where there was nothing."""
        folder = self.root / path
        inside = [entry for entry in folder.iterdir() if with_manifest or entry.name != MANIFEST] if folder.is_dir() else []
        for entry in inside:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        if folder.is_dir() and with_manifest:
            folder.rmdir()
        return bool(inside)

    def manifest_of(self, path: str | Path) -> dict[str, Any]:
        """What an artifact says of itself, also where its files were removed; empty where nothing is left."""
        try:
            return read_manifest(self.root / path)
        except StoreError:
            return {}

    def put_manifest(self, path: str | Path, manifest: Mapping[str, Any]) -> None:
        """Write an artifact's manifest anew, in one rename; no hash covers it."""
        with self.stage() as staged, _failing_as_store_error(self.root / path):
            (staged / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
            flush(staged / MANIFEST)
            (staged / MANIFEST).rename(self.root / path / MANIFEST)

    def has_folder(self, path: str | Path) -> bool:
        """True where something of an artifact is there."""
        return (self.root / path).is_dir()

    def has_file(self, path: str | Path, size: int) -> bool:
        """True where an uploaded file is there with so many bytes."""
        file = self.root / path
        return file.is_file() and file.stat().st_size == size

    def inspect(self, artifact_hash: str, *, deep: bool = False) -> None:  # noqa: ARG002 - here hashing costs little
        """What the doctor asks: StoreError where it is not what was published. ``deep``: reads also what is far away."""
        self.verify(artifact_hash)

    def is_whole(self, artifact_hash: str) -> bool:
        """True where every file of the manifest is there in its size; cheap, reads the manifest only."""
        path = self.path(artifact_hash)
        try:
            files = read_manifest(path)["files"]
            return all((path / name).stat().st_size == entry["bytes"] for name, entry in files.items())
        except (StoreError, OSError):
            return False

    def verify(self, artifact_hash: str) -> None:
        """Reads every file; StoreError naming the first that is missing, new or changed. Takes a hash or a folder's name."""
        path = self.path(artifact_hash)
        with _failing_as_store_error(path):
            manifest = read_manifest(path)
            found = hash_files(path)
        for name in sorted(found.keys() | manifest["files"].keys()):
            listed, actual = manifest["files"].get(name), found.get(name)
            if listed is None or actual is None or listed["sha256"] != actual["sha256"]:
                what = "is not in the manifest" if listed is None else "is missing" if actual is None else "was changed"
                text = f"{path / name}: {what}; the artifact is no longer what was published"
                raise ArtifactError(text, told=f"{name} {what}")
        if not hash_of(found).startswith(artifact_hash) or manifest["hash"] != hash_of(found):
            text = f"{path}: the content's hash is not the artifact's name; the artifact is not what was published"
            raise ArtifactError(text, told="the content's hash is another one")

    def stale(self, *, older_than_s: float = STALE_AFTER_S) -> list[Path]:
        """Temporary folders of writers that are gone."""
        now = time.time()
        return [folder for folder in sorted(self._staging.iterdir()) if now - _last_written(folder) > older_than_s]

    def leftovers(self, *, older_than_s: float = STALE_AFTER_S) -> list[str]:  # noqa: ARG002 - a rename leaves none
        """Uploads that were not finished, which nobody sees; always empty for a folder."""
        return []

    def remove_leftover(self, url: str) -> None:
        """Remove one of ``leftovers()`` or ``sharing_runs()``; ConflictError where it was finished meanwhile."""
        raise ValueError(f"{url}: is no leftover")

    def unreferenced(self, named: Collection[str], *, older_than_s: float = STALE_AFTER_S) -> list[Path]:
        """Published folders that are not among ``named``; a younger one may get its row any moment."""
        known = {*named, "tmp", "files"}
        return _old([path for path in self.root.iterdir() if path.is_dir() and path.name not in known], older_than_s)

    def unreferenced_uploads(self, file_ids: Collection[str], *, older_than_s: float = STALE_AFTER_S) -> list[Path]:
        """Contents of uploaded files that are not among ``file_ids``."""
        return _old([path for path in (self.root / "files").glob("*") if path.name not in file_ids], older_than_s)

    def set_aside(self, path: Path, why: str) -> None:
        """Move a published folder or an uploaded file to the temporary ones, which are removed after a day."""
        path.rename(Path(tempfile.mkdtemp(prefix=f"{why}-", dir=self._staging)) / path.name)

    def _take_existing(self, artifact_hash: str) -> bool:
        """True where this content is published already; what lies there broken is set aside for the new copy."""
        target = self.path(artifact_hash)
        if not target.exists():
            return False
        try:
            self.verify(artifact_hash)
        except StoreError:
            self.set_aside(target, "broken")
            return False
        os.utime(target)  # as young as its new row: whoever looks for folders without one leaves it alone
        return True


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of each file but the manifest, by relative POSIX path, sorted."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(f"{path}: an artifact holds plain files only", told=f"{name} is no plain file")
        if path.is_file() and name != MANIFEST:
            files[name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    if not files:
        raise ArtifactError(f"{folder}: an artifact without files", told="all its files are missing")
    return files


def hash_of(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The artifact's hash: over the sorted file list, so that neither manifest nor times count."""
    lines = "".join(f"{name}\0{entry['sha256']}\n" for name, entry in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise no_manifest(str(path)) from error


def manifest_text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2, sort_keys=True) + "\n"


def no_manifest(path: str) -> ArtifactError:
    return ArtifactError(f"{path}: no such artifact, or its manifest is gone", told=f"{MANIFEST} is missing")


def parse_manifest(content: bytes, path: str) -> dict[str, Any]:
    """A manifest that lies at ``path``; StoreError where it is none."""
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise ArtifactError(f"{path}: not valid JSON: {error}", told=f"{MANIFEST} is not valid JSON") from error
    if not (isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) and isinstance(manifest.get("hash"), str)):
        text = f"{path}: not an artifact's manifest: hash and files are missing"
        raise ArtifactError(text, told=f"{MANIFEST} is no artifact's manifest")
    return manifest


def flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """fsync of a file or of a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _old(paths: list[Path], older_than_s: float) -> list[Path]:
    now = time.time()
    return [path for path in sorted(paths) if now - path.stat().st_mtime > older_than_s]


def _last_written(folder: Path) -> float:
    """When something in it was written last; now, where something leaves it while we look: somebody is at work in it."""
    try:
        return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:
        return time.time()


@contextmanager
def _failing_as_store_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnavailableError(f"{error.filename or path}: {error.strerror or error}") from error
