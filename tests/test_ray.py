"""A run as a job of a real Ray, which the test starts and ends: the same weights, one job for a run, and none left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.learner_rig import MakeJob, job_maker, rows_of, text_pairs, weights_of
from tests.tiny_models import byte_tokenizer, write_model
from tests.waiting import until

from pairloop.config import child_env
from pairloop.learner import TrainJob, TrainResult, train
from pairloop.learner.child import started
from pairloop.learner.job import TrainStatus

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

PATIENCE_S = 400


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray of two CPUs with its job server on a free port of loopback."""
    pytest.importorskip("ray", reason='needs the extra "ray"')
    port = free_port()
    # Sockets lie below it, and their paths have to be short.
    temporary = tmp_path_factory.mktemp("r")
    with (temporary / "head.log").open("wb") as log:
        head = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0"),
                *(f"--port={free_port()}", f"--dashboard-port={port}", "--dashboard-host=127.0.0.1"),
                *("--node-ip-address=127.0.0.1", "--include-dashboard=true", "--disable-usage-stats"),
                *(f"--temp-dir={temporary}", f"--object-store-memory={200 * 2**20}"),
            ],
            stdout=log,
            stderr=log,
            env=child_env(RAY_USAGE_STATS_ENABLED="0", PYTHONPATH=os.pathsep.join(sys.path)),
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert head.poll() is None, (temporary / "head.log").read_text()
        with suppress(httpx.HTTPError):
            return httpx.get(f"{address}/api/jobs/", timeout=10).status_code == 200
        return False

    try:
        until(answers, patience_s=PATIENCE_S)
        yield address
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


@pytest.fixture
def make_job(tmp_path: Path, ray_address: str) -> MakeJob:
    base = write_model(tmp_path / "base", tokenizer=byte_tokenizer(), gain=3.0)
    make = job_maker(tmp_path, base)

    def on_ray(name: str, **recipe: Any) -> TrainJob:
        divided = {"launcher": "ray", "ray_address": ray_address, "processes": 2, **recipe}
        job = make(text_pairs(24), text_pairs(4, start=40), name=name, recipe=divided, run_id=f"{name}_{tmp_path.name}")
        folder = Path(job.result_path).parent
        folder.mkdir()
        job.save(folder / "job.json")
        return job

    return on_ray


def test_a_ray_job_trains_as_one_process_does(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job("shared", sharding="fsdp2")
    with running(job) as child:
        assert child.wait(PATIENCE_S) == 0, log_of(job)
    result = TrainResult.load(Path(job.result_path))
    assert result is not None
    assert (result.status, result.processes) == (TrainStatus.SUCCEEDED, 2)
    alone = job_maker(tmp_path, Path(job.base_dir))(text_pairs(24), text_pairs(4, start=40), name="alone")
    assert train(alone).error is None
    for one, two in zip(rows_of(alone), rows_of(job), strict=True):
        assert abs(one["loss"] - two["loss"]) < 1e-5
        assert abs(one["grad_norm"] - two["grad_norm"]) < 1e-4
    for name, weight in weights_of(alone).items():
        torch.testing.assert_close(weights_of(job)[name], weight, rtol=1e-5, atol=1e-5)


def test_a_retry_finds_the_job_that_runs(make_job: MakeJob, ray_address: str) -> None:
    """The process that asked is killed in mid-run; the next one waits for the same job, and it is done once."""
    job = make_job("retried", epochs=50, checkpoint_every=10_000)
    with running(job) as first:
        until(lambda: first.poll() is not None or Path(job.metrics_path).exists(), patience_s=PATIENCE_S)
        assert first.poll() is None, log_of(job)
        first.kill()
        first.wait()
        with running(job) as second:
            assert second.wait(PATIENCE_S) == 0, log_of(job)
    result = TrainResult.load(Path(job.result_path))
    assert result is not None
    assert (result.resumed_from, result.steps) == (0, 300)
    assert [row["step"] for row in rows_of(job) if "loss" in row] == list(range(1, 301))
    found = [entry for entry in httpx.get(f"{ray_address}/api/jobs/").json() if entry["submission_id"] == job.run_id]
    assert [entry["status"] for entry in found] == ["SUCCEEDED"]


def test_a_job_is_stopped_with_the_run(make_job: MakeJob, ray_address: str) -> None:
    job = make_job("stopped", epochs=50, batch_size=1)
    with running(job) as child:
        until(lambda: child.poll() is not None or Path(job.metrics_path).exists(), patience_s=PATIENCE_S)
        assert child.poll() is None, log_of(job)
    until(lambda: status_of(ray_address, job) == "STOPPED", patience_s=PATIENCE_S)
    assert not Path(job.result_path).exists()


def test_no_server_is_the_machines_error(make_job: MakeJob) -> None:
    job = make_job("lost", ray_address=f"http://127.0.0.1:{free_port()}")
    with running(job) as child:
        assert child.wait(PATIENCE_S) == 1
    result = TrainResult.load(Path(job.result_path))
    assert result is not None
    assert result.error is not None
    assert result.error.kind == "system_error"
    assert "train.ray_address" in result.error.message


def running(job: TrainJob) -> Any:
    folder = Path(job.result_path).parent
    return started(folder / "job.json", log_path=folder / "child.log", threads=1)


def log_of(job: TrainJob) -> str:
    return Path(job.result_path).with_name("child.log").read_text()


def status_of(address: str, job: TrainJob) -> str:
    return str(httpx.get(f"{address}/api/jobs/{job.run_id}").json()["status"])


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
