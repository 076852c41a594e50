"""Artifacts at a URL: whole or absent for every machine, checked when they are fetched, in a cache that keeps its size."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tests.loop_rig import open_rig, settings
from tests.s3 import BUCKET, client_of, s3_server

from pairloop.config import parse_config
from pairloop.errors import ConfigError, ConflictError, StoreError
from pairloop.loop import cycle
from pairloop.store import Artifact, Artifacts, Store, cache, doctor, versions
from pairloop.store.opening import open_artifacts
from pairloop.store.remote import RemoteArtifacts
from pairloop.types import CycleState

FILES = {"weights/a.bin": "12345", "config.json": "{}"}
Machines = Callable[..., Artifacts]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as address:
        yield address


class Place:
    """What several machines share, and each machine's own state directory."""

    def __init__(self, kind: str, folder: Path, endpoint: str | None) -> None:
        self.folder, self.kind = folder, kind
        self.url = {"folder": str(folder / "shared"), "memory": f"memory://{folder}"}.get(kind, f"s3://{BUCKET}{folder}")
        self.options = {"endpoint_url": endpoint} if endpoint else {}

    def machine(self, name: str, **section: Any) -> Artifacts:
        store: dict[str, Any] = {"artifacts": self.url, "artifacts_options": self.options, **section}
        return open_artifacts(parse_config({"state_dir": self.folder / name, "store": store}))

    def remote(self, name: str, **section: Any) -> RemoteArtifacts:
        made = self.machine(name, **section)
        assert isinstance(made, RemoteArtifacts)
        return made

    @property
    def files(self) -> Any:
        """The file system behind the URL."""
        return client_of(self.options["endpoint_url"]) if self.options else fsspec.filesystem("memory")

    def at(self, artifact: Artifact, file: str) -> str:
        return f"{self.url}/{artifact.path.name}/{file}"


def place_of(request: pytest.FixtureRequest, folder: Path) -> Place:
    return Place(request.param, folder, request.getfixturevalue("endpoint") if request.param == "s3" else None)


@pytest.fixture(params=["folder", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return place_of(request, tmp_path)


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place that is no folder."""
    return place_of(request, tmp_path)


def publish(artifacts: Artifacts, files: dict[str, str] | None = None, **manifest: Any) -> Artifact:
    with artifacts.stage() as folder:
        for name, text in (FILES if files is None else files).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return artifacts.publish(folder, manifest)


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


# -- the same wherever artifacts lie


def test_what_one_machine_publishes_another_one_reads(place: Place) -> None:
    here, there = place.machine("a"), place.machine("b")
    there.reach()
    artifact = publish(here, parent=3)
    copy = there.local(there.path(artifact.hash))
    assert contents(copy) == contents(artifact.path)
    assert contents(copy).keys() == {*FILES, "manifest.json"}
    assert there.is_whole(artifact.hash)
    there.verify(artifact.hash)
    there.inspect(artifact.hash, deep=True)
    assert there.leftovers(older_than_s=-1.0) == []
    assert here.local("/models/base") == Path("/models/base")  # a base model is the user's own


def test_same_content_is_one_artifact_with_the_first_manifest(place: Place) -> None:
    first, second = publish(place.machine("a"), made_by="first"), publish(place.machine("b"), made_by="second")
    assert second.hash == first.hash
    assert second.manifest == first.manifest
    assert contents(second.path) == contents(first.path)


def test_an_uploaded_file_is_read_elsewhere_and_goes_everywhere(place: Place) -> None:
    here, there = place.machine("a"), place.machine("b")
    path, size, _ = here.keep_file("file-1", BytesIO(b"rows"), limit=10)
    elsewhere = there.root / "files" / "file-1"
    assert there.has_file(elsewhere, size)
    assert not there.has_file(elsewhere, size + 1)
    assert there.local(elsewhere).read_bytes() == b"rows"
    there.discard(elsewhere)
    there.discard(elsewhere)
    assert not elsewhere.exists()
    assert not here.has_file(path, size)


def test_what_was_never_published_is_named(place: Place) -> None:
    artifacts = place.machine("a")
    with pytest.raises(StoreError, match="manifest is gone"):
        artifacts.verify("0" * 64)
    assert not artifacts.is_whole("0" * 64)
    with pytest.raises(StoreError, match=r"files/file-0|0000"):
        artifacts.inspect("0" * 64)


def test_what_is_cleared_is_gone_and_may_leave_its_manifest(place: Place) -> None:
    here, there = place.machine("a"), place.machine("b")
    aged, erased = publish(here, by="aged"), publish(here, {"a": "1"}, by="erased")
    here.put_manifest(aged.path, {**aged.manifest, "by": "somebody"})
    assert there.manifest_of(there.path(aged.hash))["by"] == "somebody"
    assert here.clear(aged.path, with_manifest=False)
    assert here.clear(erased.path, with_manifest=True)
    assert not here.clear(erased.path, with_manifest=True)
    assert there.manifest_of(there.path(aged.hash))["by"] == "somebody"
    assert there.manifest_of(there.path(erased.hash)) == {}
    for artifact in (aged, erased):
        assert not there.is_whole(artifact.hash)
        assert not (artifact.path / "a").exists()
        with pytest.raises(StoreError):
            there.verify(artifact.hash)


# -- at a URL: whole or absent, and as it was published


def test_without_its_manifest_an_artifact_is_absent_until_it_is_published_again(url: Place) -> None:
    here, there = url.remote("a"), url.remote("b")
    artifact = publish(here)
    url.files.rm(url.at(artifact, "manifest.json"))
    assert not there.is_whole(artifact.hash)
    with pytest.raises(StoreError, match="manifest is gone"):
        there.local(there.path(artifact.hash))
    assert there.leftovers(older_than_s=-1.0) == [f"{url.url}/{artifact.path.name}"]
    assert there.leftovers() == []  # young: its writer may be at it
    assert publish(here) == artifact
    assert there.leftovers(older_than_s=-1.0) == []
    assert contents(there.local(there.path(artifact.hash))).keys() == {*FILES, "manifest.json"}


def test_a_changed_object_is_found_by_its_hash_and_nothing_of_it_stays(url: Place) -> None:
    artifact, there = publish(url.remote("a")), url.remote("b")
    url.files.pipe_file(url.at(artifact, "weights/a.bin"), b"54321")
    with pytest.raises(StoreError, match=r"weights/a\.bin: was changed: SHA-256"):
        there.local(there.path(artifact.hash))
    assert list(there.root.iterdir()) == [there.root / "tmp"]
    there.inspect(artifact.hash)  # names and sizes are as they were
    with pytest.raises(StoreError, match=r"weights/a\.bin: was changed"):
        there.inspect(artifact.hash, deep=True)
    url.files.pipe_file(url.at(artifact, "weights/a.bin"), b"1")
    with pytest.raises(StoreError, match="1 bytes, published with 5"):
        there.inspect(artifact.hash)
    publish(url.remote("c"))  # the same content again mends it
    assert contents(there.local(there.path(artifact.hash)))["weights/a.bin"] == "12345"


def test_what_the_line_spoiled_is_fetched_again(url: Place, caplog: pytest.LogCaptureFixture) -> None:
    artifact, there = publish(url.remote("a")), url.remote("b")
    right = there._bucket.fs.get

    def spoil(remote: list[str], local: list[str], **told: Any) -> None:
        right(remote, local, **told)
        Path(local[0]).write_text("spoiled")

    there._bucket.fs.get = spoil
    assert contents(there.local(there.path(artifact.hash))) == contents(artifact.path)
    assert "fetching it again" in caplog.text


def test_a_copy_that_was_changed_here_is_fetched_again(url: Place) -> None:
    artifacts = url.remote("a")
    artifact = publish(artifacts)
    (artifact.path / "config.json").write_text("[]")
    artifacts.verify(artifact.hash)
    (artifact.path / "config.json").unlink()
    assert contents(artifacts.local(artifact.path))["config.json"] == "{}"


def test_a_manifest_that_was_changed_cannot_name_files_elsewhere(url: Place) -> None:
    from pairloop.store.artifacts import hash_of

    there, files = url.remote("b"), {"../../outside": {"sha256": "0" * 64, "bytes": 1}}
    name = hash_of(files)
    text = f'{{"hash": "{name}", "files": {{"../../outside": {{"sha256": "{"0" * 64}", "bytes": 1}}}}}}'
    url.files.pipe_file(f"{url.url}/{name[:32]}/manifest.json", text.encode())
    with pytest.raises(StoreError, match="lies outside"):
        there.local(there.path(name))


def test_two_processes_that_ask_at_once_fetch_once(url: Place) -> None:
    artifact, fetched = publish(url.remote("a")), list[str]()

    class Counting(RemoteArtifacts):
        def _fetch(self, name: str) -> None:
            fetched.append(name)
            super()._fetch(name)

    root = url.remote("b").root
    machines = [Counting(root, url.url, url.options, limit_bytes=10**9) for _ in range(4)]
    threads = [threading.Thread(target=m.local, args=(m.path(artifact.hash),)) for m in machines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert fetched == [artifact.path.name]
    assert contents(machines[0].path(artifact.hash)) == contents(artifact.path)


def test_what_was_broken_here_and_never_uploaded_is_published(url: Place) -> None:
    artifacts = url.remote("a")
    artifact = publish(artifacts)
    (artifact.path / "config.json").write_text("broken")
    url.files.rm(url.at(artifact, "manifest.json"))
    assert publish(artifacts) == artifact
    assert contents(url.remote("b").local(url.remote("b").path(artifact.hash)))["config.json"] == "{}"


def test_what_no_row_names_is_set_aside_and_then_removed(url: Place) -> None:
    artifacts = url.remote("a")
    kept, lost = publish(artifacts), publish(artifacts, {"a": "1"})
    uploads = [artifacts.keep_file(f"file-{n}", BytesIO(b"rows"), limit=10)[0] for n in (1, 2)]
    assert (
        artifacts.unreferenced({kept.path.name}) == artifacts.unreferenced_uploads({"file-1"}) == []
    )  # young: its row may come
    assert artifacts.unreferenced({kept.path.name}, older_than_s=-1.0) == [lost.path]
    assert artifacts.unreferenced_uploads({"file-1"}, older_than_s=-1.0) == [uploads[1]]
    artifacts.set_aside(lost.path, "unreferenced")
    artifacts.set_aside(uploads[1], "unreferenced")
    assert artifacts.has_file(uploads[0], 4)
    assert not artifacts.has_file(uploads[1], 4)
    assert not artifacts.is_whole(lost.hash)
    assert not lost.path.exists()
    assert artifacts.leftovers(older_than_s=-1.0) == [f"{url.url}/tmp"]
    artifacts.remove_leftover(f"{url.url}/tmp")
    assert artifacts.leftovers(older_than_s=-1.0) == []
    assert artifacts.unreferenced({kept.path.name}, older_than_s=-1.0) == []
    with pytest.raises(ConflictError, match="is whole by now"):
        artifacts.remove_leftover(f"{url.url}/{kept.path.name}")
    artifacts.inspect(kept.hash, deep=True)


def test_a_folder_that_was_copied_to_the_url_is_read_there(url: Place) -> None:
    """How one moves: rows name artifacts below either."""
    before = Artifacts(url.folder / "before")
    artifact, (upload, size, _) = publish(before), before.keep_file("file-1", BytesIO(b"rows"), limit=10)
    for path in (path for path in before.root.rglob("*") if path.is_file()):
        url.files.pipe_file(f"{url.url}/{path.relative_to(before.root)}", path.read_bytes())
    after = url.remote("a")
    after.inspect(artifact.hash, deep=True)
    assert contents(after.local(after.path(artifact.hash))) == contents(artifact.path)
    assert after.has_file(after.root / upload.relative_to(before.root), size)


# -- the cache


def cached(artifacts: Artifacts) -> set[str]:
    return {path.name for path in artifacts.root.iterdir() if path.name not in ("tmp", "files")}


def test_the_longest_unused_goes_first_and_what_is_held_or_just_read_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place("memory", tmp_path, None)
    here, there = place.remote("a"), place.remote("b", artifacts_cache_gb=2.5e-6)  # two of 1,000 bytes and their manifests
    a, b, c, d = (publish(here, {"weights": text * 1_000}).path.name for text in "abcd")

    def ask(name: str, used_at: float) -> None:
        there.local(there.root / name)
        os.utime(there.root.parent / "locks" / f"{name}.use", (used_at, used_at))
        os.utime(there.root / name, (used_at, used_at))

    ask(a, 100.0)
    ask(b, 200.0)
    ask(a, 300.0)
    ask(c, 400.0)
    assert cached(there) == {a, c}  # b was unused for longest
    other = place.remote("b")  # another process of that machine
    other.hold(other.root / a)
    os.utime(there.root.parent / "locks" / f"{a}.use", (500.0, 500.0))
    ask(d, 600.0)
    other.close()
    assert cached(there) == {a, d}
    monkeypatch.setattr(cache, "RECENT_S", 1e12)
    there.local(there.root / b)
    assert cached(there) == {a, b, d}  # beyond its size for a while, rather than taking what is being read
    assert there.local(there.root / c).is_dir()  # what went comes again


def test_copies_of_uploads_go_a_day_after_their_last_use(tmp_path: Path) -> None:
    place = Place("memory", tmp_path, None)
    place.remote("a").keep_file("file-1", BytesIO(b"rows"), limit=10)
    there = place.remote("b")
    path = there.local(there.root / "files" / "file-1")
    for used in (path, there.root.parent / "locks" / "files-file-1.use"):
        os.utime(used, (1.0, 1.0))
    publish(there)
    assert not path.exists()
    assert there.local(path).read_bytes() == b"rows"


# -- the configuration


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"artifacts": "s3://key:secret@bucket/x"}, "without user, password"),
        ({"artifacts": "s3:///x"}, "names no bucket"),
        ({"artifacts": "file://other-host/x"}, "names the host 'other-host'"),
        ({"artifacts": "memory://x", "artifacts_options": {"secret": "x"}}, "artifacts_options.secret: is a secret"),
        ({"artifacts": "memory://x", "artifacts_options": {"client_kwargs": {"aws_secret_access_key": "x"}}}, "is a secret"),
        ({"artifacts_options": {"endpoint_url": "http://127.0.0.1"}}, "are for a URL"),
        ({"artifacts": "memory://x", "artifacts_cache_gb": 0}, "artifacts_cache_gb"),
    ],
)
def test_a_place_that_cannot_be_is_refused(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_config({"store": section})


def test_a_missing_client_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pairloop.config.artifacts.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r'store: artifacts: .* needs s3fs: pip install "pairloop\[s3\]"'):
        parse_config({"store": {"artifacts": "s3://bucket/x"}})


def test_a_protocol_that_nobody_knows_is_named(tmp_path: Path) -> None:
    config = parse_config({"state_dir": tmp_path, "store": {"artifacts": "nonsense://x/y"}})
    with pytest.raises(ConfigError, match=r"store\.artifacts: nonsense://x/y: .*nonsense"):
        open_artifacts(config)


def test_a_file_url_is_that_folder(tmp_path: Path) -> None:
    artifacts = open_artifacts(parse_config({"state_dir": tmp_path, "store": {"artifacts": f"file://{tmp_path}/with%20space"}}))
    assert type(artifacts) is Artifacts
    assert artifacts.root == tmp_path / "with space"


# -- the loop


@pytest.mark.slow
def test_a_cycle_trained_on_one_machine_is_judged_on_another(tmp_path: Path) -> None:
    """Two state directories that share database and URL: what one registers, the other one loads, trains from and exports."""
    shared = {"database": f"sqlite:///{tmp_path / 'shared.sqlite'}", "artifacts": f"memory://{tmp_path}"}
    one, two = (settings(tmp_path / name, store=shared) for name in ("one", "two"))
    with open_rig(one, owner="one:1") as rig:
        rig.serve(60)
        assert cycle.run(rig.loop, trigger="test").state is CycleState.DUELLING
    with open_rig(two, owner="two:1") as rig:
        with rig.store.reading() as c:
            version = versions.get(c, "bot", 1)
        assert version is not None
        assert Path(version.path).is_relative_to(tmp_path / "two" / "cache")
        assert rig.policy.loaded() == {0, 1}
        done = cycle.run(rig.loop, trigger="test")
        while done.state is CycleState.DUELLING:
            rig.judge(40)
            done = cycle.run(rig.loop, trigger="test")
        assert (done.state, rig.champion) == (CycleState.PROMOTED, 1)
        rig.serve(60)
        assert cycle.run(rig.loop, trigger="test").state is CycleState.DUELLING  # its parent came by the URL
        assert doctor.check(rig.store, deep=True) == []
        fsspec.filesystem("memory").rm(f"{shared['artifacts']}/{Path(version.path).name}/fake.json")
        problem, alias = doctor.check(rig.store)
        assert (problem.code, alias.code) == ("broken_artifact", "unusable_alias")
        assert f"{shared['artifacts']}/{Path(version.path).name}/fake.json: is missing" in problem.text


# -- S3 alone


KILLED = """
import os, signal, sys
from pathlib import Path
from pairloop.store.remote import RemoteArtifacts
artifacts = RemoteArtifacts(Path(sys.argv[1]), sys.argv[2], {"endpoint_url": sys.argv[3]}, limit_bytes=10**9)
artifacts._bucket.fs.pipe_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with artifacts.stage() as folder:
    (folder / "weights").write_text("1")
    artifacts.publish(folder, {})
"""


@pytest.mark.slow
def test_an_upload_that_was_killed_leaves_nothing_that_anybody_sees(endpoint: str, tmp_path: Path) -> None:
    place = Place("s3", tmp_path, endpoint)
    arguments = [str(tmp_path / "a" / "cache" / "artifacts"), place.url, endpoint]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    artifacts = place.remote("b")
    (left,) = artifacts.leftovers(older_than_s=-1.0)
    assert not artifacts.is_whole(left.rsplit("/", 1)[1])
    with Store.open(
        parse_config({"state_dir": tmp_path / "b", "store": {"artifacts": place.url, "artifacts_options": place.options}})
    ) as store:
        assert [problem.code for problem in doctor.check(store)] == []  # its writer may be at it
    assert publish(artifacts, {"weights": "1"}).path.name == left.rsplit("/", 1)[1]
    assert artifacts.leftovers(older_than_s=-1.0) == []


@pytest.mark.slow
def test_what_keeps_a_bucket_from_being_reached_is_said(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reach(url: str, endpoint_url: str) -> str:
        artifacts = RemoteArtifacts(tmp_path / "artifacts", url, {"endpoint_url": endpoint_url}, limit_bytes=10**9)
        with pytest.raises(StoreError) as error:
            artifacts.reach()
        return str(error.value)

    assert "store.artifacts: s3://nowhere/x: there is no bucket 'nowhere'" in reach("s3://nowhere/x", endpoint)
    assert "artifacts_options.endpoint_url" in reach(f"s3://{BUCKET}/x", "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in reach(f"s3://{BUCKET}/x", endpoint)
