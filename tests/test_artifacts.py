"""Artifact folders: whole or not there, named by their content."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pairloop.errors import StoreError
from pairloop.store import Artifact, Artifacts
from pairloop.store.artifacts import STALE_AFTER_S


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "artifacts")


def publish(artifacts: Artifacts, files: dict[str, str], **manifest: Any) -> Artifact:
    with artifacts.stage() as folder:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return artifacts.publish(folder, manifest)


def published(artifacts: Artifacts) -> list[str]:
    return sorted(path.name for path in artifacts.root.iterdir() if path.name != "tmp")


def test_a_published_folder_is_named_by_its_content_and_lists_its_files(artifacts: Artifacts) -> None:
    artifact = publish(artifacts, {"weights/a.bin": "1", "config.json": "{}"}, parent=3)
    assert artifact.path == artifacts.root / artifact.hash[:32] == artifacts.path(artifact.hash)
    assert (artifact.path / "weights" / "a.bin").read_text() == "1"
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    assert manifest == artifact.manifest
    assert manifest["parent"] == 3
    assert manifest["hash"] == artifact.hash
    # echo -n 1 | sha256sum
    assert manifest["files"]["weights/a.bin"] == {
        "sha256": "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b",
        "bytes": 1,
    }
    assert list((artifacts.root / "tmp").iterdir()) == []
    artifacts.verify(artifact.hash)
    artifacts.verify(artifact.path.name)
    assert artifacts.is_whole(artifact.hash)


def test_same_content_gives_the_same_path_and_keeps_the_first_manifest(artifacts: Artifacts) -> None:
    first = publish(artifacts, {"a": "1", "b": "2"}, made_by="first")
    second = publish(artifacts, {"b": "2", "a": "1"}, made_by="second")
    assert second == first
    assert second.manifest["made_by"] == "first"
    assert published(artifacts) == [first.path.name]


@pytest.mark.parametrize("files", [{"a": "1", "b": "3"}, {"a": "1"}, {"a": "1", "c": "2"}, {"a": "12", "b": ""}])
def test_other_content_or_names_give_another_path(artifacts: Artifacts, files: dict[str, str]) -> None:
    assert publish(artifacts, files).hash != publish(artifacts, {"a": "1", "b": "2"}).hash
    assert len(published(artifacts)) == 2


def test_a_folder_from_elsewhere_is_copied_and_stays(artifacts: Artifacts, tmp_path: Path) -> None:
    out = tmp_path / "run" / "out"
    out.mkdir(parents=True)
    (out / "weights").write_text("1")
    first = artifacts.publish(out, {})
    assert (out / "weights").read_text() == "1"
    assert not (out / "manifest.json").exists()
    assert artifacts.publish(out, {}) == first  # a resumed cycle publishes again
    assert list((artifacts.root / "tmp").iterdir()) == []


def test_a_folder_that_is_not_published_leaves_nothing(artifacts: Artifacts) -> None:
    seen: list[Path] = []

    def fail() -> None:
        with artifacts.stage() as folder:
            seen.append(folder)
            (folder / "half").write_text("1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not seen[0].exists()
    assert published(artifacts) == []


def test_what_cannot_be_an_artifact_is_refused(artifacts: Artifacts) -> None:
    with pytest.raises(StoreError, match="without files"):
        publish(artifacts, {})
    with artifacts.stage() as folder:
        (folder / "link").symlink_to("/etc/passwd")
        with pytest.raises(StoreError, match="plain files only"):
            artifacts.publish(folder, {})
    with pytest.raises(ValueError, match="hash"):
        publish(artifacts, {"a": "1"}, hash="mine")
    assert published(artifacts) == []


def test_tampering_is_found_and_named(artifacts: Artifacts) -> None:
    def broken(change: Any) -> str:
        artifact = publish(artifacts, {"a": "1", "b": "2"})
        change(artifact.path)
        with pytest.raises(StoreError) as error:
            artifacts.verify(artifact.hash)
        return str(error.value)

    assert "/a: was changed" in broken(lambda path: (path / "a").write_text("9"))
    assert "/b: is missing" in broken(lambda path: (path / "b").unlink())
    assert "/c: is not in the manifest" in broken(lambda path: (path / "c").write_text(""))
    assert "manifest is gone" in broken(lambda path: (path / "manifest.json").unlink())
    assert "not valid JSON" in broken(lambda path: (path / "manifest.json").write_text("{"))
    assert "not an artifact's manifest" in broken(lambda path: (path / "manifest.json").write_text("[]"))


def test_a_manifest_that_was_changed_with_its_file_is_found_by_the_name(artifacts: Artifacts) -> None:
    artifact, other = publish(artifacts, {"a": "1"}), publish(artifacts, {"a": "2"})
    for name in ("a", "manifest.json"):
        (artifact.path / name).write_bytes((other.path / name).read_bytes())
    with pytest.raises(StoreError, match="not the artifact's name"):
        artifacts.verify(artifact.hash)


def test_publishing_again_repairs_a_broken_artifact(artifacts: Artifacts) -> None:
    artifact = publish(artifacts, {"a": "1"})
    (artifact.path / "a").write_text("broken")
    assert publish(artifacts, {"a": "1"}).path == artifact.path
    artifacts.verify(artifact.hash)


def test_is_whole_sees_missing_and_cut_files(artifacts: Artifacts) -> None:
    artifact = publish(artifacts, {"a": "12345"})
    (artifact.path / "a").write_text("123")
    assert not artifacts.is_whole(artifact.hash)
    assert not artifacts.is_whole("0" * 64)


def test_old_temporary_folders_are_cleaned_at_open_and_young_ones_stay(tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    Artifacts(root)
    old, young = root / "tmp" / "stage-old", root / "tmp" / "stage-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "half").write_text("1")
    long_ago = (old / "half").stat().st_mtime - STALE_AFTER_S - 60
    os.utime(old / "half", (long_ago, long_ago))
    os.utime(old, (long_ago, long_ago))
    os.utime(young, (long_ago, long_ago))  # its file is fresh: someone still writes there
    artifacts = Artifacts(root)
    assert not old.exists()
    assert young.exists()
    assert published(artifacts) == []


WRITER = """
import sys
from pathlib import Path
from pairloop.store import Artifacts
artifacts = Artifacts(Path(sys.argv[1]))
for number in range(100_000):
    with artifacts.stage() as folder:
        (folder / "sub").mkdir()
        for name in ("a", "sub/b"):
            (folder / name).write_text(f"{number}" * 20_000)
        print(artifacts.publish(folder, {}).hash, flush=True)
"""


def test_a_killed_writer_leaves_whole_artifacts_only(tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(root)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        acknowledged = [child.stdout.readline().strip() for _ in range(15)]
        child.send_signal(signal.SIGKILL)
        acknowledged += child.stdout.read().split("\n")[:-1]
    artifacts = Artifacts(root)
    assert {artifact_hash[:32] for artifact_hash in acknowledged} <= set(published(artifacts))
    for name in published(artifacts):
        artifacts.verify(name)


def test_a_root_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        Artifacts(tmp_path / "file" / "artifacts")
