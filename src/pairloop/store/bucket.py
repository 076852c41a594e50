"""The far side of artifacts at a URL: what lies there, by fsspec, and what went wrong in words that name the setting."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import fsspec

from pairloop.errors import ArtifactError, ConfigError, PairloopError, StoreError, UnavailableError
from pairloop.store.artifacts import MANIFEST, no_manifest, parse_manifest
from pairloop.store.cache import FILES

CHECKPOINTS = "checkpoints"
"""Below it lie those of runs that go on: no artifact, and never whole to whoever lists artifacts."""
_BLOCK = 1 << 24
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class Bucket:
    """The folders below ``url``, by name; ``options`` are fsspec's for that kind of URL. Its calls belong inside `reaching`."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url = url
        with self.reaching(url):
            try:
                # Listings that others changed meanwhile must not be remembered.
                self.fs, self._base = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
            except (ImportError, ValueError, TypeError) as error:
                raise ConfigError(f"store.artifacts: {url}: {error}") from error

    def reach(self) -> None:
        """One listing; StoreError where there is no bucket, UnavailableError where it cannot be asked."""
        with self.reaching(self.url):
            try:
                self.fs.ls(self._base, detail=False)
            except FileNotFoundError:  # nothing was published yet, or there is no bucket
                bucket = self._base.strip("/").split("/", 1)[0]
                if bucket and not self.fs.exists(bucket) and self.fs.protocol != "memory":
                    raise StoreError(f"store.artifacts: {self.url}: there is no bucket {bucket!r}; create it first") from None

    @contextmanager
    def reaching(self, what: str) -> Iterator[None]:
        """Whatever a store's client raises (each has errors of its own) becomes a StoreError that names the setting.

        UnavailableError where the URL cannot be reached, StoreError where what is asked for is not there.
        """
        try:
            yield
        except PairloopError:
            raise
        except FileNotFoundError as error:
            text = f"store.artifacts: {self.url}: {what} is not there"
            raise ArtifactError(text, told="a file of it is not there") from error
        except Exception as error:
            why = str(error) or type(error).__name__
            raise UnavailableError(f"store.artifacts: {self.url}: {why}{_hint(error)}") from error

    def inspect(self, name: str, *, deep: bool) -> None:
        """StoreError naming the first file of an artifact that is missing, new or changed: by size, or ``deep``, by hash."""
        with self.reaching(self.at(name)):
            listed, sizes = self.manifest(name)["files"], self.sizes(name)
            for file in sorted(sizes.keys() | listed.keys()):
                problem = problem_of(listed.get(file), sizes.get(file))
                if problem is None and deep and self.hash_of_file(name, file) != listed[file]["sha256"]:
                    problem = "was changed"
                if problem is not None:
                    raise StoreError(f"{self.shown(name, file)}: {problem}; the artifact is no longer what was published")

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of an artifact; StoreError where there is none."""
        try:
            return parse_manifest(self.fs.cat_file(self.at(name, MANIFEST)), self.shown(name, MANIFEST))
        except FileNotFoundError as error:
            raise no_manifest(self.shown(name, MANIFEST)) from error

    def manifest_if_whole(self, name: str) -> dict[str, Any] | None:
        """The manifest where all files that it lists are there in their sizes."""
        try:
            manifest = self.manifest(name)
        except StoreError:
            return None
        sizes = self.sizes(name)
        return None if any(problem_of(entry, sizes.get(file)) for file, entry in manifest["files"].items()) else manifest

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of each file of an artifact but the manifest, by relative path."""
        found = {self.relative(path): info for path, info in self.fs.find(self.at(name), detail=True).items()}
        return {path.split("/", 1)[1]: int(info["size"]) for path, info in found.items() if path != f"{name}/{MANIFEST}"}

    def hash_of_file(self, name: str, file: str) -> str:
        """SHA-256, read block by block."""
        digest = hashlib.sha256()
        with self.fs.open(self.at(name, file), "rb", block_size=_BLOCK) as source:
            while block := source.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def entries(self) -> dict[str, tuple[bool, datetime]]:
        """Of each folder and upload at the URL, by name: whether it is whole (has a manifest), and when it was last written."""
        found: dict[str, tuple[bool, datetime]] = {}
        with self.reaching(self.url):
            for path, info in sorted(self.fs.find(self._base, detail=True).items()):
                name, _, file = self.relative(path).partition("/")
                if name == CHECKPOINTS:
                    continue
                if name == FILES:
                    name, file = f"{FILES}/{file}", MANIFEST  # one object is always whole
                at = _written_at(info)
                is_whole, newest = found.get(name, (False, at))
                found[name] = is_whole or file == MANIFEST, max(newest, at)
        return found

    def runs(self) -> dict[str, datetime]:
        """Those of which a file lies below `CHECKPOINTS`, and when the newest was written; by one listing."""
        found: dict[str, datetime] = {}
        with self.reaching(self.at(CHECKPOINTS)):
            for path, info in self.fs.find(self.at(CHECKPOINTS), detail=True).items():
                name, at = self.relative(path).split("/")[1], _written_at(info)
                found[name] = max(found.get(name, at), at)
        return found

    def at(self, name: str, file: str | None = None) -> str:
        """A folder's or file's path as the file system knows it."""
        return "/".join(part for part in (self._base.rstrip("/"), name, file) if part is not None)

    def relative(self, path: str) -> str:
        """``<folder>/<file>`` of a path that the file system told."""
        return path.removeprefix(self._base.rstrip("/")).lstrip("/")

    def shown(self, name: str, file: str) -> str:
        """A file's URL, for messages."""
        return f"{self.url}/{name}/{file}"


def _written_at(info: Mapping[str, Any]) -> datetime:
    """When a file was written, as its file system tells it; now where it does not."""
    at = info.get("LastModified") or info.get("created") or info.get("mtime")
    return datetime.fromtimestamp(at, UTC) if isinstance(at, int | float) else at or datetime.now(UTC)


def problem_of(entry: Mapping[str, Any] | None, size: int | None) -> str | None:
    """What is wrong with a file of that size, as the manifest lists it; None where nothing is."""
    if entry is None:
        return "is not in the manifest"
    if size is None:
        return "is missing"
    return None if entry["bytes"] == size else f"was changed: {size} bytes, published with {entry['bytes']}"


def _hint(error: Exception) -> str:
    """What to look at, by the name of an error: the clients that raise them are extras."""
    name = type(error).__name__
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return "; the disk of state_dir is full, where copies lie: free some space, or set store.artifacts_cache_gb lower"
    if "Credential" in name or "Token" in name:
        return "; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what else the AWS credential chain reads"
    if isinstance(error, PermissionError):
        return "; look at the key's rights on the bucket: it must list, read, write and delete"
    if "Connect" in name or isinstance(error, ConnectionError | TimeoutError):
        return "; look at store.artifacts_options.endpoint_url and at the network"
    return ""
