"""The training stage: one run row, one child process, one version, whatever is killed in between."""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.train_rig import POLICY, World, config_of, some_pairs

from pairloop.config import Config
from pairloop.errors import ConfigError, StoreError, TrainingError, UserError
from pairloop.learner.child import read_rows
from pairloop.learner.job import TrainStatus
from pairloop.loop.train import MAX_ATTEMPTS, folder_of, metrics_of, train_file
from pairloop.store import Store
from pairloop.types import RunStatus, VersionKind


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_of(tmp_path)


@pytest.fixture
def world(store: Store, config: Config) -> World:
    return World(store, config, some_pairs(20))


# ---- the stage, on the fake policy


def test_a_dataset_becomes_a_version(world: World) -> None:
    heard: list[Mapping[str, Any]] = []
    record = world.train(on_progress=heard.append)
    assert record.status is RunStatus.SUCCEEDED
    version = record.version
    assert (version.number, version.parent, version.kind) == (1, 0, VersionKind.ADAPTER)
    assert (version.dataset_id, version.run_id) == ("dataset_1", record.run_id)
    assert world.versions() == [world.base, version]
    assert version.record is not None
    assert version.record["recipe"] == world.store.artifacts.manifest_of(version.path)["recipe"], "also without its folder"
    world.store.artifacts.verify(version.artifact_hash)
    assert json.loads(Path(version.path, "fake.json").read_text()) == {"skill": 1}
    manifest = json.loads(Path(version.path, "manifest.json").read_text())
    assert (manifest["policy"], manifest["parent"], manifest["dataset_id"]) == (POLICY, 0, "dataset_1")
    assert manifest["recipe"]["train"]["beta"] == 0.1
    assert manifest["result"]["libraries"]["python"]
    (row,) = world.runs()
    assert (row.status, row.result["status"], row.error) == (RunStatus.SUCCEEDED, "succeeded", None)
    assert (row.progress["step"], row.progress["of"]) == (2, 2)
    assert (
        [(r["step"], r["of"]) for r in heard]
        == [(1, 2), (2, 2)]
        == [(r["step"], r["of"]) for r in metrics_of(world.config, row)]
    )


def test_the_next_version_goes_on_from_its_parent(world: World) -> None:
    first = world.train(cycle_id=None).version
    second = world.train(cycle_id=None, parent=first).version
    assert (second.number, second.parent) == (2, 1)
    assert json.loads(Path(second.path, "fake.json").read_text()) == {"skill": 2}


def test_a_second_call_for_the_same_cycle_changes_nothing(world: World) -> None:
    first = world.train()
    assert world.train() == first
    assert world.train(owner="two") == first
    assert len(world.versions()) == 2
    assert len(world.runs()) == 1


def test_too_few_pairs_end_as_nothing_to_train(store: Store, config: Config) -> None:
    world = World(store, config, some_pairs(3))
    record = world.train()
    assert (record.status, record.version) == (RunStatus.NOTHING_TO_TRAIN, None)
    assert record.result["stopped_because"] == "too_few_pairs"
    assert world.versions() == [world.base]
    assert world.train() == record


def test_a_crash_between_publish_and_insert_publishes_once(world: World) -> None:
    """The store goes away when the version is to be inserted; the folder is published, and the next call finishes the work."""
    broken = BrokenOnce(world.store)
    world.store = broken  # type: ignore[assignment]
    with pytest.raises(StoreError, match="planted"):
        world.train()
    assert broken.published == 1
    assert world.versions() == [world.base]
    world.store = broken.inner
    (row,) = world.runs()
    assert row.status is RunStatus.RUNNING
    result = Path(folder_of(world.config, row), "result.json").stat().st_mtime_ns
    record = world.train()
    assert record.status is RunStatus.SUCCEEDED
    assert Path(folder_of(world.config, row), "result.json").stat().st_mtime_ns == result  # nothing was trained again
    assert len(world.versions()) == 2
    folders = [path for path in world.store.artifacts.root.iterdir() if (path / "fake.json").exists()]
    assert folders == [Path(record.version.path)]


class BrokenOnce:
    """A store that works until an artifact is published, and then cannot write."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.published = 0
        self.artifacts = self
        self.hold = inner.artifacts.hold
        self.checkpoints = inner.artifacts.checkpoints

    def publish(self, folder: Path, manifest: Mapping[str, Any]) -> Any:
        self.published += 1
        return self.inner.artifacts.publish(folder, manifest)

    def write(self, fn: Any) -> Any:
        if self.published:
            raise StoreError("planted")
        return self.inner.write(fn)

    def reading(self) -> Any:
        return self.inner.reading()


@pytest.mark.sqlite("its busy timeout")
def test_a_locked_database_does_not_stop_the_training(world: World) -> None:
    """Another process holds the lock from the first metrics row on, until the heart has said that it could not write."""
    world.store.write(lambda c: c.exec_driver_sql("PRAGMA busy_timeout = 20").scalar_one())
    other = sqlite3.connect(world.store.name, isolation_level=None)
    missed: list[str] = []

    class Unlock(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not missed:
                other.execute("COMMIT")
            missed.append(record.getMessage())

    def lock(_row: Mapping[str, Any]) -> None:
        if not missed and not other.in_transaction:
            other.execute("BEGIN IMMEDIATE")

    logger, handler = logging.getLogger("pairloop.loop.train"), Unlock(logging.WARNING)
    logger.addHandler(handler)
    try:
        record = world.train(on_progress=lock)
    finally:
        logger.removeHandler(handler)
        other.close()
    assert record.status is RunStatus.SUCCEEDED
    assert len(missed) == 1
    assert "heartbeat could not be written" in missed[0]
    assert "locked" in missed[0]


def test_another_owner_takes_up_the_run_in_the_same_folder(world: World) -> None:
    stopped = world.train(should_stop=lambda: True)
    assert (stopped.status, stopped.version) == (RunStatus.RUNNING, None)
    record = world.train(owner="two")
    assert record.status is RunStatus.SUCCEEDED
    second, first = world.runs()
    assert (first.status, first.attempt, first.owner) == (RunStatus.SYSTEM_ERROR, 1, "one")
    assert (second.status, second.attempt, second.owner) == (RunStatus.SUCCEEDED, 2, "two")
    assert folder_of(world.config, first) == folder_of(world.config, second)
    assert len(world.versions()) == 2


@pytest.mark.parametrize(("method", "kind"), [("full", VersionKind.ADAPTER), ("lora", VersionKind.FULL)])
def test_a_method_that_is_not_the_parents_is_refused(store: Store, tmp_path: Path, method: str, kind: VersionKind) -> None:
    world = World(store, config_of(tmp_path, policy={"method": method}), some_pairs(20))
    with pytest.raises(ConfigError, match=f'policy.method = "{method}".*kind {kind.value}'):
        world.train(parent=replace(world.base, kind=kind))


def test_the_users_error_is_recorded_as_such(store: Store, config: Config) -> None:
    world = World(store, config, some_pairs(20))
    Path(world.dataset.path, "train.jsonl").write_text("{}\n")
    record = world.train()
    assert (record.status, record.version) == (RunStatus.USER_ERROR, None)
    (row,) = world.runs()
    assert row.status is RunStatus.USER_ERROR
    assert "train.jsonl:1" in row.error
    assert row.result["error"]["code"] == "bad_rows"


def test_a_child_that_always_dies_is_given_up(world: World) -> None:
    """A file stands where its folder must be, so every child dies at once; its last words are in the run row."""
    world.train(should_stop=lambda: True)
    (row,) = world.runs()
    checkpoints = folder_of(world.config, row) / "checkpoints"
    shutil.rmtree(checkpoints, ignore_errors=True)
    (folder_of(world.config, row) / "result.json").unlink(missing_ok=True)
    checkpoints.write_text("in the way")
    record = world.train()
    assert (record.status, record.version) == (RunStatus.SYSTEM_ERROR, None)
    assert record.result["error"]["code"] == "child_died"
    (row,) = world.runs()
    assert f"{MAX_ATTEMPTS} times in a row" in row.error
    assert "FileExistsError" in row.error
    assert (folder_of(world.config, row) / "child.log").read_text().count("FileExistsError: ") == MAX_ATTEMPTS


# ---- stand-alone


def test_train_file_writes_one_whole_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    heard: list[Mapping[str, Any]] = []
    result = train_file(some_pairs(20), "fake", out, heldout=some_pairs(4), on_progress=heard.append)
    assert (result.status, result.steps, len(heard)) == (TrainStatus.SUCCEEDED, 2, 2)
    assert json.loads((out / "fake.json").read_text()) == {"skill": 1}
    assert read_rows(out / "training" / "metrics.jsonl")[0] == heard
    assert result.heldout_after["n"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert train_file(some_pairs(20), "fake", out, resume=True) == result


def test_train_file_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert train_file(some_pairs(20), "fake", tmp_path / "out").error is None  # an empty folder is nobody's
    with pytest.raises(UserError, match="is not empty"):
        train_file(some_pairs(20), "fake", tmp_path / "out")
    (tmp_path / ".other.training").mkdir()
    with pytest.raises(UserError, match=r"interrupted.*resume"):
        train_file(some_pairs(20), "fake", tmp_path / "other")


def test_train_file_with_too_few_pairs_leaves_nothing(tmp_path: Path) -> None:
    result = train_file(some_pairs(2), "fake", tmp_path / "out")
    assert (result.status, result.pairs) == (TrainStatus.NOTHING_TO_TRAIN, 2)
    assert list(tmp_path.iterdir()) == []


def test_train_file_that_died_can_be_resumed(tmp_path: Path) -> None:
    folder = tmp_path / ".out.training"
    folder.mkdir()
    (folder / "checkpoints").write_text("in the way")
    with pytest.raises(TrainingError, match=r"(?s)3 times in a row.*FileExistsError.*`resume` goes on with"):
        train_file(some_pairs(20), "fake", tmp_path / "out", resume=True)
    (folder / "checkpoints").unlink()
    assert train_file(some_pairs(20), "fake", tmp_path / "out", resume=True).steps == 2


def test_train_file_says_what_is_wrong_with_the_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        train_file(some_pairs(20), "./nowhere/at/all", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
