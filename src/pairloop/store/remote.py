"""Artifacts at a URL that several machines share, by fsspec; the folder of artifacts here is a bounded cache of them.

An artifact's files are uploaded first and its manifest last: without the manifest it is absent for everybody. What is read is
fetched once, checked against the hashes of its manifest, and renamed into the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from fsspec.callbacks import Callback

from pairloop import faults
from pairloop.errors import ArtifactError, ConflictError, StoreError
from pairloop.store.artifacts import (
    MANIFEST,
    STALE_AFTER_S,
    Artifact,
    Artifacts,
    flush,
    flush_tree,
    hash_of,
    manifest_text,
    read_manifest,
    sha256_of,
)
from pairloop.store.bucket import CHECKPOINTS, Bucket
from pairloop.store.cache import FILES, Cache
from pairloop.store.checkpoints import FarCheckpoints

LOG = logging.getLogger(__name__)

_TMP = "tmp"


class RemoteArtifacts(Artifacts):
    """Published artifacts at ``url``; ``root`` holds the copies. ``options`` are fsspec's for that kind of URL."""

    is_far = True

    def __init__(
        self,
        root: Path,
        url: str,
        options: Mapping[str, Any],
        *,
        limit_bytes: int,
        held_most: int = 16,
        checkpoints: bool = True,
    ) -> None:
        super().__init__(root)
        self._cache = Cache(self.root, limit_bytes=limit_bytes, held_most=held_most)
        self._bucket = Bucket(url, options)
        self._shares_checkpoints = checkpoints

    # -- what is asked of artifacts -------------------------------------------------------------------------------------

    def reach(self) -> None:
        """One listing: a wrong key, a bucket that is missing or a server that is down is found before hours of training."""
        self._bucket.reach()

    def publish(self, folder: Path, manifest: Mapping[str, Any]) -> Artifact:
        """See `Artifacts.publish`; returns when the artifact is whole at the URL, with the manifest that was first there."""
        made = super().publish(folder, manifest)
        name = made.path.name
        with self._cache.using(name), self._bucket.reaching(self._bucket.at(name)):
            first = self._bucket.manifest_if_whole(name)
            if first is None:
                files = sorted(made.manifest["files"])
                here, there = [str(made.path / file) for file in files], [self._bucket.at(name, file) for file in files]
                faults.reach("remote.before_upload")
                self._bucket.fs.put(here, there, callback=_Uploading())
                faults.reach("remote.before_manifest")
                self._bucket.fs.pipe_file(self._bucket.at(name, MANIFEST), (made.path / MANIFEST).read_bytes())
            else:
                # Written again it is as young as the row that is to come: nobody takes it for one that no row names.
                self.put_manifest(made.path, first)
        faults.reach("remote.published")
        self._cache.evict()
        return Artifact(made.hash, made.path, read_manifest(made.path))

    def keep_file(self, file_id: str, source: BinaryIO, *, limit: int) -> tuple[Path, int, str]:
        """See `Artifacts.keep_file`; an object of a store like S3 is whole or not there."""
        path, size, digest = super().keep_file(file_id, source, limit=limit)
        name = f"{FILES}/{file_id}"
        with self._cache.using(name), self._bucket.reaching(self._bucket.at(name)):
            faults.reach("remote.before_file")
            self._bucket.fs.put_file(str(path), self._bucket.at(name))
        return path, size, digest

    def local(self, path: str | Path) -> Path:
        """See `Artifacts.local`: fetched where it is not here whole. StoreError naming what is gone, or not as published."""
        found = self.root / path
        name = self._name_of(found)
        if name is None:
            return found
        with self._cache.using(name):
            if self._is_here(name):
                return found
        with self._cache.fetching(name), self._cache.using(name):
            if not self._is_here(name):  # nobody else brought it while this process waited
                self._cache.drop(name)
                self._fetch(name)
        self._cache.evict()
        return found

    def hold(self, path: str | Path) -> Path:
        """See `Artifacts.hold`: the newest held ones stay here as long as this process lives."""
        name = self._name_of(self.root / path)
        if name is not None:
            self._cache.hold(name)
        return self.local(path)

    def checkpoints(self, run: str) -> FarCheckpoints | None:
        return FarCheckpoints(self._bucket, run) if self._shares_checkpoints else None

    def sharing_runs(self, *, older_than_s: float | None = None) -> dict[str, str]:
        before = None if older_than_s is None else datetime.now(UTC) - timedelta(seconds=older_than_s)
        found = sorted(self._bucket.runs().items())
        return {run: f"{self._bucket.url}/{CHECKPOINTS}/{run}" for run, at in found if before is None or at <= before}

    def close(self) -> None:
        """Hold nothing any more."""
        self._cache.close()

    def address(self, path: str) -> str:
        name = self._name_of(Path(path))
        return path if name is None else f"{self._bucket.url}/{name}"

    def discard(self, path: str | Path) -> None:
        """Remove an uploaded file here and at the URL; other machines' copies go a day after their last use."""
        name = self._name_of(self.root / path)
        if name is None:
            return
        with self._bucket.reaching(self._bucket.at(name)):
            if self._bucket.fs.exists(self._bucket.at(name)):
                self._bucket.fs.rm_file(self._bucket.at(name))
        self._cache.drop(name)

    def clear(self, path: str | Path, *, with_manifest: bool) -> bool:
        """See `Artifacts.clear`: at the URL and here. Other machines' copies go with their caches."""
        name = self._name_of(self.root / path)
        if name is None:
            return super().clear(path, with_manifest=with_manifest)
        with self._bucket.reaching(self._bucket.at(name)):
            paths = self._bucket.fs.find(self._bucket.at(name))
            inside = [one for one in paths if with_manifest or not one.endswith(f"{name}/{MANIFEST}")]
            for one in inside:
                self._bucket.fs.rm_file(one)
        self._cache.drop(name)
        return bool(inside)

    def manifest_of(self, path: str | Path) -> dict[str, Any]:
        name = self._name_of(self.root / path)
        if name is None:
            return super().manifest_of(path)
        with self._bucket.reaching(self._bucket.at(name)):
            return self._bucket.manifest(name) if self._bucket.fs.exists(self._bucket.at(name, MANIFEST)) else {}

    def put_manifest(self, path: str | Path, manifest: Mapping[str, Any]) -> None:
        folder = self.root / path
        name = self._name_of(folder)
        if name is None or folder.is_dir():
            super().put_manifest(path, manifest)
        if name is not None:
            with self._bucket.reaching(self._bucket.at(name)):
                self._bucket.fs.pipe_file(self._bucket.at(name, MANIFEST), manifest_text(manifest).encode())

    def has_folder(self, path: str | Path) -> bool:
        name = self._name_of(self.root / path)
        if name is None:
            return super().has_folder(path)
        with self._bucket.reaching(self._bucket.at(name)):
            return bool(self._bucket.fs.find(self._bucket.at(name)))

    def has_file(self, path: str | Path, size: int) -> bool:
        name = self._name_of(self.root / path)
        if name is None:
            return super().has_file(path, size)
        with self._bucket.reaching(self._bucket.at(name)):
            try:
                return bool(self._bucket.fs.info(self._bucket.at(name))["size"] == size)
            except FileNotFoundError:
                return False

    def is_whole(self, artifact_hash: str) -> bool:
        """True where the manifest is at the URL, and every file that it lists in its size."""
        name = self.path(artifact_hash).name
        with self._bucket.reaching(self._bucket.at(name)):
            return self._bucket.manifest_if_whole(name) is not None

    def verify(self, artifact_hash: str) -> None:
        """See `Artifacts.verify`, of the copy here, which is fetched where it is missing, and again where it was changed."""
        path = self.path(artifact_hash)
        self.local(path)
        try:
            super().verify(artifact_hash)
        except StoreError as error:
            LOG.warning("%s; fetching it again", error)
            self._cache.drop(path.name)
            self.local(path)
            super().verify(artifact_hash)

    def inspect(self, artifact_hash: str, *, deep: bool = False) -> None:
        """Names and sizes at the URL; with ``deep`` the contents too, which are read there and not kept."""
        self._bucket.inspect(self.path(artifact_hash).name, deep=deep)

    def leftovers(self, *, older_than_s: float = STALE_AFTER_S) -> list[str]:
        """URLs of artifacts without a manifest to which nothing was added for so long: their writer is gone."""
        before = datetime.now(UTC) - timedelta(seconds=older_than_s)
        return [
            f"{self._bucket.url}/{name}"
            for name, (is_whole, at) in self._bucket.entries().items()
            if not is_whole and at <= before
        ]

    def unreferenced(self, named: Collection[str], *, older_than_s: float = STALE_AFTER_S) -> list[Path]:
        """See `Artifacts.unreferenced`: what is at the URL, as paths here."""
        return [path for path in self._old(older_than_s) if path.parent == self.root and path.name not in named]

    def unreferenced_uploads(self, file_ids: Collection[str], *, older_than_s: float = STALE_AFTER_S) -> list[Path]:
        return [path for path in self._old(older_than_s) if path.parent != self.root and path.name not in file_ids]

    def _old(self, older_than_s: float) -> list[Path]:
        """What is whole at the URL and was written so long ago, as paths here."""
        before = datetime.now(UTC) - timedelta(seconds=older_than_s)
        return [self.root / name for name, (is_whole, at) in self._bucket.entries().items() if is_whole and at <= before]

    def set_aside(self, path: Path, why: str) -> None:
        """Move it to ``tmp/`` at the URL, a manifest first: it is absent from then on, and told of as a leftover."""
        name = self._name_of(path) or path.name
        with self._bucket.reaching(self._bucket.at(name)):
            is_file = name.startswith(f"{FILES}/")
            for file in [None] if is_file else [MANIFEST, *sorted(self._bucket.sizes(name))]:
                to = f"{why}-{path.name}" if file is None else f"{why}-{path.name}/{file}"
                self._bucket.fs.mv(self._bucket.at(name, file), self._bucket.at(_TMP, to))
        self._cache.drop(name)

    def remove_leftover(self, url: str) -> None:
        """See `Artifacts.remove_leftover`."""
        name = url.removeprefix(f"{self._bucket.url}/")
        with self._bucket.reaching(url):
            if name != _TMP and self._bucket.fs.exists(self._bucket.at(name, MANIFEST)):
                raise ConflictError(f"{url}: is whole by now; it was published while you looked")
            self._bucket.fs.rm(self._bucket.at(name), recursive=True)

    # -- bringing things here -------------------------------------------------------------------------------------------

    def _take_existing(self, artifact_hash: str) -> bool:
        """See `Artifacts`: of the cache alone, where what is broken is only a copy."""
        target = self.path(artifact_hash)
        if not target.exists():
            return False
        try:
            super().verify(artifact_hash)
        except StoreError:
            self._cache.drop(target.name)
            return False
        return True

    def _is_here(self, name: str) -> bool:
        if name.startswith(f"{FILES}/"):
            return (self.root / name).is_file()
        return super().is_whole(name)

    def _fetch(self, name: str) -> None:
        """Bring an artifact or an upload here, checked, in one rename."""
        target = self.root / name
        with self.stage() as folder, self._bucket.reaching(self._bucket.at(name)):
            if name.startswith(f"{FILES}/"):
                target.parent.mkdir(exist_ok=True)
                self._bucket.fs.get_file(self._bucket.at(name), str(folder / target.name))
                flush(folder / target.name)  # only its size is looked at again
                faults.reach("remote.before_file_placed")
                (folder / target.name).rename(target)
                return
            manifest = self._bucket.manifest(name)
            files = manifest["files"]
            if hash_of(files) != manifest["hash"] or not manifest["hash"].startswith(name):
                text = f"{self._bucket.shown(name, MANIFEST)}: its hash is not the artifact's name; it was changed"
                raise ArtifactError(text, told=f"{MANIFEST} was changed")
            if unsafe := [file for file in files if not _is_inside(file)]:
                text = f"{self._bucket.shown(name, MANIFEST)}: {unsafe[0]!r} lies outside of the artifact"
                raise ArtifactError(text, told=f"{MANIFEST} was changed")
            for file in files:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
            here, there = [str(folder / file) for file in files], [self._bucket.at(name, file) for file in files]
            self._bucket.fs.get(there, here, callback=_Fetching())
            for file, entry in files.items():
                self._check(name, file, folder / file, entry)
            (folder / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
            flush_tree(folder)
            faults.reach("remote.before_place")
            folder.rename(target)

    def _check(self, name: str, file: str, path: Path, entry: Mapping[str, Any]) -> None:
        """A file that arrived otherwise than it was published is fetched once more: the fault may be the line's."""
        if sha256_of(path) == entry["sha256"]:
            return
        LOG.warning("%s: is not what was published; fetching it again", self._bucket.shown(name, file))
        self._bucket.fs.get_file(self._bucket.at(name, file), str(path))
        if (found := sha256_of(path)) != entry["sha256"]:
            raise ArtifactError(
                f"{self._bucket.shown(name, file)}: was changed: SHA-256 {found}, published with {entry['sha256']}; "
                "the artifact is no longer what was published",
                told=f"{file} was changed",
            )

    def _name_of(self, path: Path) -> str | None:
        """``<folder>`` or ``files/<id>``; None for what is not under the root."""
        if not path.is_relative_to(self.root):
            return None
        parts = path.relative_to(self.root).parts
        return None if not parts else "/".join(parts[:2]) if parts[0] == FILES else parts[0]


class _Uploading(Callback):  # type: ignore[misc]  # fsspec has no types
    """Told after each file."""

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        faults.reach("remote.file_uploaded")


class _Fetching(Callback):  # type: ignore[misc]
    """Told after each file."""

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        faults.reach("remote.file_fetched")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
