"""The training stage: one run row, one child process, one version, whatever is killed in between."""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.stores import open_store
from tests.tiny_models import byte_tokenizer, write_model

from pairloop.config import Config, parse_config
from pairloop.errors import ConfigError, StoreError, TrainingError, UserError
from pairloop.formats import snapshot
from pairloop.learner.child import read_rows
from pairloop.learner.job import TrainStatus, last_checkpoint
from pairloop.loop.train import MAX_ATTEMPTS, folder_of, metrics_of, run, train_file
from pairloop.store import Store, cycles, datasets, runs, versions
from pairloop.types import (
    Cycle,
    CycleState,
    CycleStep,
    Dataset,
    Message,
    PairSide,
    PreferencePair,
    RunStatus,
    Version,
    VersionKind,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POLICY = "bot"


def some_pairs(count: int) -> list[PreferencePair]:
    return [
        PreferencePair(
            f"pair_{i}", (Message("user", f"what is {i}?"),), PairSide(f"answer 8{i % 10}"), PairSide(f"answer 1{i % 10}")
        )
        for i in range(count)
    ]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "artifacts") as store:
        yield store


def config_of(tmp_path: Path, *, model: str = "fake", **sections: Mapping[str, Any]) -> Config:
    policy = {"name": POLICY, "model": model, **sections.pop("policy", {})}
    return parse_config({"state_dir": tmp_path, "policy": policy, **sections})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_of(tmp_path)


class World:
    """A store with a base version, a dataset, and a cycle that is training."""

    def __init__(self, store: Store, config: Config, pairs: list[PreferencePair]) -> None:
        self.store, self.config = store, config
        with store.artifacts.stage() as folder:
            snapshot.write(folder / "train.jsonl", pairs)
            snapshot.write(folder / "heldout.jsonl", pairs[:4])
            path = str(store.artifacts.publish(folder, {}).path)
        self.base = Version(POLICY, 0, VersionKind.BASE, config.policy.model, "", None, None, None, NOW)
        self.dataset = Dataset("dataset_1", POLICY, path, len(pairs), 4, {}, {}, NOW)
        steps = (CycleStep(CycleState.TRAINING, {}, NOW),)
        store.write(lambda c: versions.insert(c, self.base))
        store.write(lambda c: cycles.insert(c, Cycle("cycle_1", POLICY, 1, 0, "test", NOW, steps)))
        store.write(lambda c: datasets.insert(c, self.dataset, feedback_seq=0, cycle_id="cycle_1", pairs=[]))

    @classmethod
    def found(cls, store: Store, config: Config) -> World:
        """What another machine has put into the store."""
        world = cls.__new__(cls)
        world.store, world.config = store, config
        with store.reading() as c:
            base, dataset = versions.get(c, POLICY, 0), datasets.get(c, "dataset_1")
        assert base is not None
        assert dataset is not None
        world.base, world.dataset = base, dataset
        return world

    def train(self, **settings: Any) -> Any:
        defaults = {"dataset": self.dataset, "parent": self.base, "cycle_id": "cycle_1", "owner": "one"}
        return run(self.store, self.config, **{**defaults, **settings})

    def runs(self) -> list[Any]:
        with self.store.reading() as c:
            return runs.list_(c, POLICY)

    def versions(self) -> list[Version]:
        with self.store.reading() as c:
            return versions.list_(c, POLICY)


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


# ---- children that die, with a real (tiny) model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), tokenizer=byte_tokenizer(), gain=3.0)


@pytest.mark.slow
def test_a_killed_child_is_started_again_from_its_checkpoint(store: Store, base: Path, tmp_path: Path) -> None:
    section = {"learning_rate": 1e-3, "batch_size": 4, "epochs": 20, "checkpoint_every": 10}
    config = config_of(tmp_path, model=str(base), policy={"method": "full", "device": "cpu"}, train=section)
    world = World(store, config, some_pairs(20))
    killed: list[int] = []

    def kill_once() -> bool:
        (row,) = world.runs()
        found = last_checkpoint(folder_of(config, row) / "checkpoints")
        if found is not None and not killed:
            killed.append(found[0])
            os.kill(child_of(folder_of(config, row) / "job.json"), signal.SIGKILL)
        return False

    record = world.train(should_stop=kill_once)
    assert killed
    assert record.status is RunStatus.SUCCEEDED
    assert record.version.kind is VersionKind.FULL
    assert record.result["resumed_from"] >= killed[0]
    assert record.result["steps"] == 100
    (row,) = world.runs()
    steps, looks = ([r["step"] for r in metrics_of(config, row) if ("heldout" in r) is look] for look in (False, True))
    assert steps == list(range(1, 101))
    assert looks == list(range(16, 101, 16))
    assert not (folder_of(config, row) / "checkpoints").exists()


def child_of(job: Path) -> int:
    """The process that works on this job file."""
    found = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _runs(p, job)]
    assert len(found) == 1
    return found[0]


def _runs(process: Path, job: Path) -> bool:
    try:
        return str(job) in (process / "cmdline").read_text()
    except OSError:
        return False


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


@pytest.mark.slow
def test_train_file_raises_what_the_child_found(tmp_path: Path, base: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        train_file(some_pairs(20), str(tmp_path / "model"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_train_file_says_what_is_wrong_with_the_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        train_file(some_pairs(20), "./nowhere/at/all", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


DRIVER = """
import json
import sys
from pathlib import Path
from pairloop.config import parse_config
from pairloop.formats import snapshot
from pairloop.loop.train import train_file

model, data, out, settings = sys.argv[1:]
config = parse_config(json.loads(settings))
train_file(list(snapshot.read(Path(data))), model, Path(out), config)
"""


@pytest.mark.slow
def test_a_child_dies_with_its_parent_and_resumes(base: Path, tmp_path: Path) -> None:
    """kill -9 of the whole caller: its training process ends too, nothing half is left at ``out``, and ``resume`` finishes."""
    settings = {
        "policy": {"method": "full", "device": "cpu"},
        "train": {"learning_rate": 1e-3, "batch_size": 4, "epochs": 40, "checkpoint_every": 10},
    }
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    snapshot.write(data, some_pairs(20))
    folder = tmp_path / ".out.training"
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(base), str(data), str(out), json.dumps(settings)])
    while last_checkpoint(folder / "checkpoints") is None:
        with pytest.raises(subprocess.TimeoutExpired):
            driver.wait(timeout=0.02)
    child = os.pidfd_open(child_of(folder / "job.json"))
    driver.kill()
    driver.wait()
    ended, _, _ = select.select([child], [], [], 20)
    assert ended == [child]
    os.close(child)
    assert not out.exists()
    result = train_file(some_pairs(20), str(base), out, parse_config(settings), resume=True)
    assert (result.status, result.steps) == (TrainStatus.SUCCEEDED, 200)
    assert result.resumed_from >= 10
    assert (out / "model.safetensors").exists()
    assert (out / "tokenizer.json").exists()
    assert len(read_rows(out / "training" / "metrics.jsonl")[0]) == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pairs.jsonl"]


# ---- several processes


def torchrun_config(tmp_path: Path, base: Path, **train: Any) -> Config:
    section = {"learning_rate": 1e-3, "batch_size": 4, "checkpoint_every": 2, "launcher": "torchrun", "processes": 2, **train}
    return config_of(tmp_path, model=str(base), policy={"method": "full", "device": "cpu"}, train=section)


def children() -> dict[int, str]:
    """Processes that this one started, directly or not, that still run: number and command line."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a zombie is none either
            found[child.pid] = " ".join(child.cmdline())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_a_killed_process_of_several_is_no_loss(store: Store, tmp_path: Path, sharding: str) -> None:
    """kill -9 of the second of two: the launcher ends the first, and a new attempt goes on from the checkpoint."""
    base = write_model(tmp_path / "base", tokenizer=byte_tokenizer(), gain=3.0)
    config = torchrun_config(tmp_path, base, sharding=sharding, epochs=40)
    world = World(store, config, some_pairs(20))
    killed: list[int] = []

    def kill(row: Mapping[str, Any]) -> None:
        if row["step"] >= 5 and not killed:
            # The launcher's command line names its workers' too.
            killed.append(
                [pid for pid, line in children().items() if "--worker" in line and "torch.distributed" not in line][-1]
            )
            os.kill(killed[0], signal.SIGKILL)

    record = world.train(on_progress=kill)
    assert record.status is RunStatus.SUCCEEDED
    assert len(killed) == 1
    assert record.result["processes"] == 2
    assert record.result["resumed_from"] >= 4
    assert not [line for line in children().values() if "job.json" in line]


@pytest.mark.slow
def test_a_stop_ends_all_processes(store: Store, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tokenizer=byte_tokenizer(), gain=3.0)
    world = World(store, torchrun_config(tmp_path, base, epochs=50), some_pairs(20))
    heard: list[Mapping[str, Any]] = []
    seen: set[int] = set()

    def hear(row: Mapping[str, Any]) -> None:
        heard.append(row)
        seen.update(pid for pid, line in children().items() if "job.json" in line)

    record = world.train(on_progress=hear, should_stop=lambda: bool(heard))
    assert record.status is RunStatus.RUNNING
    assert len(seen) == 3  # the launcher and its two
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in seen & children().keys()], timeout=30)
    assert not alive
    (row,) = world.runs()
    kept = last_checkpoint(folder_of(world.config, row) / "checkpoints")
    assert kept is not None
    assert kept[0] == metrics_of(world.config, row)[-1]["step"]  # none of the steps that were done is lost


@pytest.mark.slow
def test_too_few_devices_are_the_users_error(store: Store, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tokenizer=byte_tokenizer(), gain=3.0)
    config = torchrun_config(tmp_path, base)
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"device": "cuda"})})
    record = World(store, config, some_pairs(20)).train()
    assert record.status is RunStatus.USER_ERROR
    assert "train.processes = 2" in record.result["error"]["message"]
