"""The newest checkpoint of a run at the URL of the artifacts, from which another machine goes on when this one is gone.

It lies below ``checkpoints/<run>/step-<n>``; its manifest is uploaded last, and the older ones go after that: who looks
finds one that is whole, or none.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from pairloop import faults
from pairloop.errors import StoreError
from pairloop.store.artifacts import MANIFEST, hash_files, hash_of, manifest_text, sha256_of
from pairloop.store.bucket import CHECKPOINTS, Bucket


class FarCheckpoints:
    """Those of one run. UnavailableError where the URL cannot be reached."""

    def __init__(self, bucket: Bucket, run: str) -> None:
        self._bucket, self._run = bucket, f"{CHECKPOINTS}/{run}"

    def put(self, step: int, folder: Path) -> None:
        """Upload the files of ``folder``; those of earlier steps go, never those of later ones, which are another worker's."""
        name, files = self._name(step), hash_files(folder)
        with self._bucket.reaching(self._bucket.at(name)):
            here, there = [str(folder / file) for file in files], [self._bucket.at(name, file) for file in files]
            self._bucket.fs.put(here, there)
            faults.reach("checkpoint.before_far_manifest")
            manifest = manifest_text({"hash": hash_of(files), "files": files}).encode()
            self._bucket.fs.pipe_file(self._bucket.at(name, MANIFEST), manifest)
            faults.reach("checkpoint.far_replaced")
            for older in sorted(one for one in self._steps() if one < step):
                self._remove(older)

    def newest(self) -> int | None:
        """The step of the newest one that is whole."""
        with self._bucket.reaching(self._bucket.at(self._run)):
            return max((step for step, is_whole in self._steps().items() if is_whole), default=None)

    def fetch(self, step: int, folder: Path) -> None:
        """Bring it into the empty ``folder``; StoreError where a file is gone, or not what was uploaded."""
        name = self._name(step)
        with self._bucket.reaching(self._bucket.at(name)):
            files = self._bucket.manifest(name)["files"]
            if any(len(PurePosixPath(file).parts) != 1 for file in files):
                raise StoreError(f"{self._bucket.shown(name, MANIFEST)}: is not a checkpoint's")
            there, here = [self._bucket.at(name, file) for file in files], [str(folder / file) for file in files]
            self._bucket.fs.get(there, here)
        for file, entry in files.items():
            if sha256_of(folder / file) != entry["sha256"]:
                raise StoreError(f"{self._bucket.shown(name, file)}: is not what was uploaded")

    def clear(self) -> None:
        """Remove all: the run has ended."""
        with self._bucket.reaching(self._bucket.at(self._run)):
            for step in sorted(self._steps()):
                faults.reach("checkpoint.before_cleared")
                self._remove(step)

    def _steps(self) -> dict[int, bool]:
        """Whether each that something lies of is whole."""
        found: dict[int, bool] = {}
        for path in self._bucket.fs.find(self._bucket.at(self._run)):
            step, _, file = self._bucket.relative(path).removeprefix(f"{self._run}/").partition("/")
            number = int(step.removeprefix("step-"))
            found[number] = found.get(number, False) or file == MANIFEST
        return found

    def _remove(self, step: int) -> None:
        """The manifest first: what lies there without one is none."""
        inside = self._bucket.fs.find(self._bucket.at(self._name(step)))
        for path in sorted(inside, key=lambda path: not path.endswith(f"/{MANIFEST}")):
            self._bucket.fs.rm_file(path)

    def _name(self, step: int) -> str:
        return f"{self._run}/step-{step:08d}"
