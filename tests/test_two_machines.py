"""Machines that share a database and an S3 bucket and nothing else: one serves, others turn the loop."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest
from tests import waiting
from tests.loop_rig import Rig, open_rig, settings
from tests.postgres import missing, running_server
from tests.s3 import BUCKET, client_of, s3_server
from tests.test_export import World
from tests.test_fine_tuning import pair_rows

from pairloop.config import load_config
from pairloop.demo.server import start_server
from pairloop.loop import cycle, export, jobs
from pairloop.policy.engine import open_policy
from pairloop.policy.protocols import TokenSequence
from pairloop.scaffold import write_config
from pairloop.store import Store, backup, cycles, doctor, duels, repair, runs, versions
from pairloop.store import jobs as store_jobs
from pairloop.store.archive import Archive
from pairloop.types import Cycle, CycleState, RunStatus, Version

PATIENCE_S = 120.0

needs_postgres = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture
def url() -> Iterator[str]:
    with running_server() as server:
        yield server.blank()


def machine(folder: Path, store: dict[str, Any], *, turns: bool) -> Path:
    """The configuration of one machine, whose state directory is its own."""
    return write_config(
        folder,
        {
            "policy": {"model": "fake", "name": "bot"},
            "gate": {"max_picks": 300},
            "evaluate": {"prompts": 32},
            "schedule": {"min_pairs": 30, "poll": "1s", "lease": "10s", "enabled": turns},
            "store": store,
        },
    )


@contextmanager
def working(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    log = config.parent / "worker.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "pairloop", "worker", "--config", str(config)], stdout=sink, stderr=subprocess.STDOUT
        )
    try:
        yield process
        assert process.poll() is None, log.read_text()
    finally:
        process.kill()
        process.wait()


def until(rig: Rig, state: CycleState, number: int, *, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Wait until cycle ``number`` is in ``state``."""
    found: list[Cycle] = []

    def is_there() -> bool:
        nonlocal found
        with rig.store.reading() as c:
            found = cycles.list_(c, rig.loop.name)
        if found and (found[0].number, found[0].state) == (number, state):
            return True
        meanwhile()
        return False

    waiting.until(is_there, patience_s=PATIENCE_S, why=lambda: f"that cycle {number} is {state}: {found}")


def version_of(rig: Rig, number: int) -> Version:
    with rig.store.reading() as c:
        version = versions.get(c, rig.loop.name, number)
    assert version is not None
    return version


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@needs_postgres
def test_a_worker_elsewhere_needs_the_database_and_the_artifacts_alone(url: str, tmp_path: Path) -> None:
    """It trains; the server fetches and serves what it made; when it is killed a third machine goes on from that version."""
    pytest.importorskip("psycopg", reason='needs the extra "postgres"')
    with s3_server() as endpoint:
        store = {"database": url, "artifacts": f"s3://{BUCKET}/pairloop", "artifacts_options": {"endpoint_url": endpoint}}
        serving, *workers = (machine(tmp_path / name, store, turns=name != "a") for name in ("a", "b", "c"))
        people = load_config(machine(tmp_path / "people", store, turns=False), env={})
        with open_rig(people) as rig:
            rig.serve(60)
            server = start_server(serving, log=tmp_path / "server.log")
            try:
                with working(workers[0]):
                    until(rig, CycleState.DUELLING, 1)
                    name = Path(version_of(rig, 1).path).name
                    here, there = (tmp_path / machine / "cache" / "artifacts" / name for machine in "ab")
                    assert not here.exists()
                    _ask(server.url, "bot@1")
                    assert files_of(here) == files_of(there)
                    rig.policy.load(version_of(rig, 1))
                    until(rig, CycleState.PROMOTED, 1, meanwhile=lambda: _judge(rig))
                with working(workers[1]):  # the other one was killed
                    rig.serve(60)
                    until(rig, CycleState.DUELLING, 2)
                    assert (tmp_path / "c" / "cache" / "artifacts" / name).is_dir()  # the parent that it trained from
                    _ask(server.url, "bot@2")
                    _ask(server.url, "bot")
            finally:
                server.stop()
            assert doctor.check(rig.store, deep=True) == []
            assert not any((tmp_path / machine / "artifacts").exists() for machine in "abc")


@pytest.mark.slow
def test_a_run_is_begun_anew_where_its_checkpoints_are_not(tmp_path: Path) -> None:
    """What a machine that is gone left in its state directory is missed by nobody: another one takes the cycle up."""
    store = {"database": f"sqlite:///{tmp_path / 'shared.sqlite'}", "artifacts": f"memory://{tmp_path}"}
    one, two = (settings(tmp_path / name, store=store) for name in ("one", "two"))
    with open_rig(one, owner="one:1") as rig:
        rig.serve(60)

        def is_training() -> bool:
            with rig.store.reading() as c:
                found = cycles.list_(c, "bot")
                return bool(found) and bool(runs.for_cycle(c, found[0].cycle_id))

        assert cycle.run(rig.loop, trigger="test", should_stop=is_training).state is CycleState.TRAINING
        shutil.rmtree(one.state_dir)
    with open_rig(two, owner="two:1") as rig:
        done = cycle.run(rig.loop, trigger="test")
        assert done.state is CycleState.DUELLING
        with rig.store.reading() as c:
            run = runs.for_cycle(c, done.cycle_id)
        assert run is not None
        assert (run.status, run.owner, run.attempt) == (RunStatus.SUCCEEDED, "two:1", 2)
        assert doctor.check(rig.store) == []


@pytest.mark.slow
def test_a_file_that_one_machine_took_is_trained_on_another_and_read_on_a_third(tmp_path: Path) -> None:
    with s3_server() as endpoint:
        artifacts: dict[str, Any] = {"artifacts": f"s3://{BUCKET}/jobs", "artifacts_options": {"endpoint_url": endpoint}}
        store = {"database": f"sqlite:///{tmp_path / 'shared.sqlite'}", **artifacts}
        files = [machine(tmp_path / name, store, turns=False) for name in ("one", "two", "three")]
        one, two, three = (load_config(file, env={}) for file in files)
        with open_rig(one) as rig:
            taken = jobs.upload(rig.store, one, BytesIO(pair_rows(64)), filename="rows.jsonl", purpose="fine-tune")
            asked = {"training_file": taken.file_id, "model": "bot", "method": {"type": "dpo"}}
            made = jobs.create(rig.store, one, jobs.JobRequest.model_validate(asked))
        with open_rig(two, owner="two:1") as rig:
            assert jobs.validate_next(rig.loop)
            assert jobs.train_next(rig.loop, lambda: False)
            with rig.store.reading() as c:
                done = store_jobs.get(c, made.job_id)
            assert doctor.check(rig.store, deep=True) == []
        assert done is not None
        assert str(done.status) == "succeeded", done.error
        server = start_server(files[2], log=tmp_path / "server.log")
        try:
            assert _get(server.url, f"files/{taken.file_id}/content") == pair_rows(64)
            assert _get(server.url, f"files/{done.result_files[0]}/content").startswith(b"step,")
            assert len(_get(server.url, f"datasets/{done.dataset_id}/export", "POST").splitlines()) > 50
            assert artifacts["artifacts"] in _get(server.url, f"datasets/{done.dataset_id}").decode()
            _ask(server.url, str(done.fine_tuned_model))
            _get(server.url, f"files/{taken.file_id}", "DELETE")
        finally:
            server.stop()
        assert not (three.artifacts_dir / "files" / taken.file_id).exists()
        assert not client_of(endpoint).exists(f"{BUCKET}/jobs/files/{taken.file_id}")


@pytest.mark.slow
def test_a_backup_holds_what_is_at_the_url_and_puts_it_back(tmp_path: Path) -> None:
    store = {"database": f"sqlite:///{tmp_path / 'shared.sqlite'}", "artifacts": f"memory://{tmp_path}"}
    files = fsspec.filesystem("memory")
    with open_rig(settings(tmp_path / "one", store=store)) as rig:
        rig.serve(60)
        assert cycle.run(rig.loop, trigger="test").state is CycleState.DUELLING
        kept = jobs.upload(rig.store, rig.loop.config, BytesIO(pair_rows(8)), filename="rows.jsonl", purpose="fine-tune")
    with Store.open(settings(tmp_path / "two", store=store)) as elsewhere:  # nothing of it is here yet
        assert backup.take(elsewhere, tmp_path / "backups", actor="tester").copied == 3  # the dataset, the version, the upload
        files.rm(store["artifacts"], recursive=True)
        files.pipe_file(f"{store['artifacts']}/{'0' * 32}/left", b"1")
        codes = {problem.code for problem in doctor.check(elsewhere)}
        assert codes == {"missing_artifact", "unusable_alias", "missing_file"}
        mended = repair.mend(elsewhere, actor="tester", archive=Archive.find(tmp_path / "backups"))
        assert list(mended.problems) == []
        assert doctor.check(elsewhere, deep=True) == []
        assert elsewhere.artifacts.local(elsewhere.artifacts.root / "files" / kept.file_id).read_bytes() == pair_rows(8)


@pytest.mark.slow
def test_a_real_model_is_loaded_and_exported_where_it_was_not_trained(tmp_path: Path) -> None:
    shared = {"database": f"sqlite:///{tmp_path / 'shared.sqlite'}", "artifacts": f"memory://{tmp_path}"}
    world = World(tmp_path / "one", store=shared)
    asked = [TokenSequence((3, 4, 5), (6, 7, 8))]
    other = world.config.model_copy(update={"state_dir": tmp_path / "two"})
    with closing(world.store), Store.open(other) as store:
        with store.reading() as c:
            version = versions.get(c, world.name, 1)
        assert version is not None
        assert not Path(version.path).exists()
        said = []
        for config, place, row in ((world.config, world.store, world.version), (other, store, version)):
            with closing(open_policy(config, fetch=place.artifacts.hold)) as policy:
                policy.load(row)
                said.append(policy.logps(1, asked))
                assert policy.logps(0, asked) != said[-1]
        assert said[0] == said[1]
        assert Path(version.path).is_dir()
        shutil.rmtree(other.artifacts_dir / Path(version.path).name)
        out = export.run(store, other, version, tmp_path / "out").path
        assert (out / "adapter_model.safetensors").read_bytes() == (
            world.artifact.path / "adapter_model.safetensors"
        ).read_bytes()


def _judge(rig: Rig) -> None:
    with rig.store.reading() as c:
        duel = duels.current(c, rig.loop.name)
    if duel is not None:  # the worker may end it at any time
        rig.judge(40, duel=duel)


def _ask(url: str, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "Where is my order?"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20.0, trust_env=False)
    assert answer.status_code == 200, answer.text


def _get(url: str, path: str, method: str = "GET") -> bytes:
    answer = httpx.request(method, f"{url}/v1/{path}", timeout=20.0, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.content
