"""The training stage with a real (tiny) model: children that are killed, orphaned, or several."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.tiny_models import byte_tokenizer, write_model
from tests.train_rig import World, config_of, some_pairs

from pairloop.config import Config, parse_config
from pairloop.errors import UserError
from pairloop.formats import snapshot
from pairloop.learner.child import read_rows
from pairloop.learner.job import TrainStatus, last_checkpoint
from pairloop.loop.train import folder_of, metrics_of, train_file
from pairloop.store import Store
from pairloop.types import RunStatus, VersionKind


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


@pytest.mark.slow
def test_train_file_raises_what_the_child_found(tmp_path: Path, base: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        train_file(some_pairs(20), str(tmp_path / "model"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


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
