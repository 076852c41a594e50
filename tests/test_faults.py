"""The fault-injection suite: the loop is killed, stopped and starved at every labelled point and at random times, and goes on.

After each, what the store says must be what an undisturbed life's says (`faults_rig.tell_cycles`).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from tests import faults_deploy, faults_elsewhere, faults_keeping  # noqa: F401 - their scenarios are among the others from now on
from tests.faults_rig import (
    PATIENCE_S,
    SCENARIOS,
    Life,
    Plant,
    Prepared,
    acknowledged_early,
    an_hour_ahead,
    begin,
    checkpoints_in_place,
    contents,
    duelling,
    labels,
    offline,
    published_in_place,
    same_end,
    tell_cycles,
    unfenced,
)
from tests.waiting import until

from pairloop.bench import trust_kills
from pairloop.bench.trust import TrustSettings
from pairloop.faults import Fault
from pairloop.store import Store

pytestmark = pytest.mark.faults

IN_TRANSACTION = (
    "alias.moved_in_transaction",
    "canary.closed_in_transaction",
    "canary.opened_in_transaction",
    "step.in_transaction",
    "writer.before_commit",
    "writer.before_ack",
)
ELSEWHERE = ("folder.", "metrics.", "result.", "checkpoint.", "file.", "backup.", "restore.", "remote.", "rollback.", "shadow.")
"""Reached by the training process, a client's upload, a server or a command: none has a lease."""
CYCLES = ("offline", "duel", "rejected", "canary", "withdrawn")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("faults"))


def scenario_of(prepared: Prepared, label: str) -> str:
    """The first scenario that reaches the label."""
    return next(name for name in SCENARIOS if label in prepared.visited(name))


def test_every_label_in_the_source_is_visited(prepared: Prepared) -> None:
    visited = {label for name in SCENARIOS for label in prepared.visited(name)}
    assert sorted(visited) == labels()
    for name in CYCLES:
        end = prepared.undisturbed(name)
        assert (end["problems"], end["broken artifacts"], end["picks lost"], end["picks doubled"]) == ([], [], [], [])
        assert [action for action, _ in end["moves"]] == ["retire" if name in ("rejected", "withdrawn") else "promote"]


# --- kill -9


@pytest.mark.parametrize("label", labels())
def test_killed_at_any_label_it_goes_on_to_the_same_end(prepared: Prepared, label: str, tmp_path: Path) -> None:
    name, latch = scenario_of(prepared, label), tmp_path / "happened"
    with same_end(prepared, name) as folder:
        begin(name, folder, Fault(label, "kill", once=str(latch))).end()
        assert latch.exists(), "the label was not reached"
        assert SCENARIOS[name].broken(folder) == []
        life = begin(name, folder)
        assert life.end() == 0, life.log


@pytest.mark.parametrize("label", ["checkpoint.before_far_manifest", "job.checkpoint_published", "job.ended"])
def test_a_job_whose_machine_is_gone_at_a_label_comes_to_the_same_weights_elsewhere(
    prepared: Prepared, label: str, tmp_path: Path
) -> None:
    latch = tmp_path / "happened"
    with same_end(prepared, "elsewhere") as folder:
        assert begin("elsewhere", folder, Fault(label, "kill", once=str(latch))).end() == -signal.SIGKILL
        for machine in folder.glob("machine-*"):
            shutil.rmtree(machine)
            machine.mkdir()
        life = begin("elsewhere", folder)
        assert life.end() == 0, life.log


def test_killed_before_any_commit_it_goes_on_to_the_same_end(prepared: Prepared) -> None:
    """The lease, each step with what it records, the run, the version: dead right before each of them is there."""
    deaths, died = 0, True
    while died:
        with same_end(prepared, "offline") as folder:
            died = begin("offline", folder, Fault("writer.before_commit", "kill", nth=deaths + 1)).end() == -signal.SIGKILL
            deaths += died
            life = begin("offline", folder)
            assert life.end() == 0, life.log
    print(f"{deaths} deaths, each resumed")
    assert deaths >= 10


@pytest.mark.parametrize(("name", "lives"), [("duel", 8), ("job", 2)])
def test_killed_at_random_times_it_goes_on_to_the_same_end(prepared: Prepared, name: str, lives: int) -> None:
    """The first lives are the shorter ones. A job is given up, by rule, after three workers that got it no further."""
    seed = random.SystemRandom().randrange(10**9)
    rng, pause, kills = random.Random(seed), threading.Event(), 0
    print(f"{name}: seed {seed}")
    with same_end(prepared, name) as folder:
        for n in range(lives):
            life = begin(name, folder)
            pause.wait(rng.uniform(0.05, 0.3 + 0.15 * n))
            kills += life.process.is_alive()
            life.kill()
        life = begin(name, folder)
        assert life.end() == 0, life.log
    print(f"{name}: {kills} kills, resumed")
    assert kills > 0


def test_a_server_that_is_killed_under_its_clients_loses_no_acknowledged_pick(tmp_path: Path) -> None:
    """`pairloop bench trust --part kills` in small."""
    found = trust_kills.measure(TrustSettings(tmp_path, lambda *_: None, seed=random.SystemRandom().randrange(10**9)), kills=3)
    print(found)
    assert found["acknowledged"] > 0
    assert {name: found[name] for name in ("lost", "doubled", "changed", "not_known", "problems")} == {
        "lost": 0,
        "doubled": 0,
        "changed": 0,
        "not_known": 0,
        "problems": 0,
    }


# --- a worker that only seemed dead


@pytest.mark.parametrize("label", [one for one in labels() if one not in IN_TRANSACTION and not one.startswith(ELSEWHERE)])
def test_a_worker_that_was_stopped_past_its_lease_writes_nothing(prepared: Prepared, label: str, tmp_path: Path) -> None:
    name = scenario_of(prepared, label)
    expected = prepared.undisturbed(name)
    folder, before, after = overtaken(prepared, name, Fault(label, "stop", once=str(tmp_path / "happened")))
    assert before == after
    assert SCENARIOS[name].tell(folder) == expected


def overtaken(prepared: Prepared, name: str, fault: Fault, plant: Plant | None = None) -> tuple[Path, Any, Any]:
    """The folder, what the store holds once another worker has come to the end, and after the stopped one went on."""
    configure = SCENARIOS[name].configure
    assert configure is not None
    folder, stopped = stopped_outside_a_transaction(prepared, name, fault, plant)
    try:
        life = begin(name, folder)
        assert life.end() == 0, life.log
        with Store.open(configure(folder)) as store:
            before = contents(store)
            stopped.go_on()
            assert stopped.end() == 0, stopped.log
            return folder, before, contents(store)
    finally:
        stopped.kill()


def stopped_outside_a_transaction(prepared: Prepared, name: str, fault: Fault, plant: Plant | None) -> tuple[Path, Life]:
    """Another thread of the worker may be writing when all of it is stopped: SQLite's lock is then its own until it goes on."""
    for _ in range(8):
        folder = prepared.copy(name)
        stopped = begin(name, folder, fault, plant)
        until(lambda life=stopped: life.is_stopped, patience_s=PATIENCE_S)  # type: ignore[misc]
        try:
            with closing(sqlite3.connect(folder / "pairloop.sqlite", timeout=0.2, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            stopped.kill()
            Path(str(fault.once)).unlink()
            continue
        return folder, stopped
    raise AssertionError("always in the middle of a transaction")


@pytest.mark.parametrize("plant", [None, an_hour_ahead])
def test_two_workers_on_one_database_make_one_cycle(prepared: Prepared, plant: Plant | None) -> None:
    """Also where one of them holds every lease of the other for expired."""
    with same_end(prepared, "duel") as folder:
        lives = [begin("duel", folder), begin("duel", folder, plant=plant)]
        assert [life.end() for life in lives] == [0, 0], lives[0].log


# --- a disk that is full


@pytest.mark.parametrize(
    "label",
    [
        "artifact.before_flush",
        "checkpoint.between_files",
        "dataset.published",
        "folder.before_rename",
        "metrics.before_row",
        "result.before_write",
        "writer.before_commit",
        "writer.before_ack",
    ],
)
def test_a_disk_that_was_full_at_a_label_ends_nothing(prepared: Prepared, label: str, tmp_path: Path) -> None:
    """The life goes on as a scheduler does, and once there is room again it comes to the same end."""
    name, latch = scenario_of(prepared, label), tmp_path / "happened"
    with same_end(prepared, name) as folder:
        life = begin(name, folder, Fault(label, "full", nth=2 if label.startswith("writer") else 1, once=str(latch)))
        assert life.end() == 0, life.log
        assert latch.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("a small disk cannot be mounted here: that takes root and the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_really_full_ends_nothing(prepared: Prepared, small_disk: Path) -> None:
    expected = prepared.undisturbed("duel")
    folder, ballast = small_disk / "state", small_disk / "ballast"
    shutil.copytree(prepared.root / "duel", folder)
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    life = begin("duel", folder, log=prepared.root / "small-disk.log")
    until(lambda: "UnavailableError" in life.log, patience_s=PATIENCE_S)
    ballast.unlink()
    assert life.end() == 0, life.log
    assert tell_cycles(duelling, folder) == expected


# --- the checks can fail


def test_a_worker_that_does_not_ask_for_its_lease_is_caught(prepared: Prepared, tmp_path: Path) -> None:
    folder, before, after = overtaken(
        prepared, "offline", Fault("label.after_batch", "stop", once=str(tmp_path / "x")), unfenced
    )
    assert before != after
    assert tell_cycles(offline, folder)["picks doubled"]


def test_an_artifact_that_is_published_file_by_file_is_caught(prepared: Prepared) -> None:
    folder = prepared.copy("offline")
    assert begin("offline", folder, Fault("planted.halfway"), published_in_place).end() == -signal.SIGKILL
    assert tell_cycles(offline, folder)["broken artifacts"]


def test_a_checkpoint_that_is_written_in_place_is_caught(prepared: Prepared) -> None:
    folder = prepared.copy("learner")
    assert begin("learner", folder, Fault("checkpoint.between_files"), checkpoints_in_place).end() == -signal.SIGKILL
    life = begin("learner", folder)
    assert life.end() != 0
    assert "optimizer.safetensors" in life.log


def test_a_pick_that_is_acknowledged_before_it_is_stored_is_caught(prepared: Prepared) -> None:
    folder = prepared.copy("duel")
    assert begin("duel", folder, plant=acknowledged_early).end() == -signal.SIGKILL
    assert tell_cycles(duelling, folder)["picks lost"]
