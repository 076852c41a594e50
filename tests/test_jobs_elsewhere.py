"""A fine-tuning job's newest checkpoint at the URL: another machine goes on from it, and nothing stays of a job that ended."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from tests.loop_rig import Rig, open_rig, settings
from tests.store_rows import a_run
from tests.test_elsewhere import at_the_url, ended_meanwhile, interrupted, put, shared_at
from tests.test_fine_tuning import pair_rows
from tests.test_jobs import ELSEWHERE, a_job, messages, never, stored
from tests.tiny_models import byte_tokenizer, write_model

from pairloop.config import Config
from pairloop.loop import jobs as room
from pairloop.loop.jobs.ownership import MAX_ATTEMPTS, claim
from pairloop.loop.privacy import folders
from pairloop.store import Store, datasets, doctor, jobs, removed, repair, runs, versions
from pairloop.store.checkpoints import FarCheckpoints
from pairloop.store.jobs import Job, JobStatus
from pairloop.types import RunStatus

PATIENCE_S = 10.0


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with open_rig(settings(tmp_path / "one", schedule={"min_pairs": 0, "lease": "1s"}, store=shared_at(tmp_path))) as rig:
        yield rig


def far_of(store: Store, name: str) -> FarCheckpoints:
    found = store.artifacts.checkpoints(name)
    assert found is not None
    return found


def stop_in_the_middle(rig: Rig, job: Job, *rows: str) -> None:
    """A worker that trains the job and is stopped, which leaves a checkpoint, and ``rows`` of metrics before it."""
    folder = rig.loop.config.runs_dir / job.job_id

    def stops() -> bool:
        if not (folder / "job.json").exists():
            return False
        if not (folder / "checkpoints").exists():
            interrupted(folder)
            with (folder / "metrics.jsonl").open("a") as file:
                file.writelines(rows)
        return True

    assert room.train_next(rig.loop, stops)


def test_a_stopped_job_leaves_its_checkpoint_for_others_until_it_is_cancelled(rig: Rig, tmp_path: Path) -> None:
    job = a_job(rig.store, rig.loop.config)
    assert room.validate_next(rig.loop)
    stop_in_the_middle(rig, job)
    assert stored(rig.store, job).status is JobStatus.QUEUED
    assert far_of(rig.store, job.job_id).newest() == 10
    room.cancel(rig.store, job.job_id)
    assert at_the_url(tmp_path) == []


def test_what_is_still_uploaded_when_a_job_is_cancelled_does_not_stay(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_job(rig.store, rig.loop.config)
    assert room.validate_next(rig.loop)
    uploaded = ended_meanwhile(monkeypatch, lambda: room.cancel(rig.store, job.job_id))
    stop_in_the_middle(rig, job)
    assert uploaded == [10]
    assert stored(rig.store, job).status is JobStatus.CANCELLED
    assert at_the_url(tmp_path) == []


def test_a_worker_keeps_its_job_while_the_last_upload_takes_longer_than_a_lease(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_job(rig.store, rig.loop.config)
    assert room.validate_next(rig.loop)

    def slowly() -> None:
        pause, until_s = threading.Event(), time.monotonic() + PATIENCE_S
        began = stored(rig.store, job).lease_expires_at
        assert began is not None
        while (lease := stored(rig.store, job).lease_expires_at) is None or lease <= began:
            assert time.monotonic() < until_s, "nobody says that it is alive"
            pause.wait(0.02)

    uploaded = ended_meanwhile(monkeypatch, slowly)
    stop_in_the_middle(rig, job)
    assert uploaded == [10]


def test_a_checkpoint_waits_until_the_models_of_its_epochs_are_versions(rig: Rig) -> None:
    """A worker elsewhere would be told of a model that lies on the machine that is gone alone."""
    job = a_job(rig.store, rig.loop.config)
    assert room.validate_next(rig.loop)
    folder = rig.loop.config.runs_dir / job.job_id
    stop_in_the_middle(rig, job, '{"step": 10, "of": 20, "epoch": {"folder": "/gone/step-00000010", "heldout": {}}}\n')
    assert (folder / "checkpoints" / "step-00000010").is_dir()
    assert far_of(rig.store, job.job_id).newest() is None


def test_a_job_that_is_given_up_leaves_nothing(rig: Rig, tmp_path: Path) -> None:
    job, past = a_job(rig.store, rig.loop.config), datetime.now(UTC) - timedelta(seconds=1)
    put(far_of(rig.store, job.job_id), tmp_path / "made", 10)
    for attempt in range(MAX_ATTEMPTS):
        dead = claim(rig.loop, f"{ELSEWHERE}-{attempt}", [JobStatus.VALIDATING])
        assert dead is not None
        rig.store.write(partial(jobs.update, job=dead, lease_expires_at=past))
    assert at_the_url(tmp_path) != []
    assert claim(rig.loop, "me", [JobStatus.VALIDATING]) is None
    assert stored(rig.store, job).status is JobStatus.FAILED
    assert at_the_url(tmp_path) == []


def test_the_doctor_takes_checkpoints_that_nobody_owns_and_no_others(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Owned are those of a job that is paused, and of a cycle's run under its first attempt's name, however old they are."""
    paused, ended = a_job(rig.store, rig.loop.config), a_job(rig.store, rig.loop.config)
    assert room.validate_next(rig.loop)
    room.pause(rig.store, paused.job_id)
    room.cancel(rig.store, ended.job_id)
    with rig.store.reading() as c:
        dataset_id = stored(rig.store, paused).dataset_id
        assert datasets.get(c, str(dataset_id)) is not None
    run = replace(a_run("run_2"), dataset_id=str(dataset_id), cycle_id=None, status=RunStatus.RUNNING)
    rig.store.write(lambda c: runs.insert(c, replace(run, progress={"folder": "run_1"})))
    for name in (paused.job_id, ended.job_id, "run_1", "run_2"):
        put(far_of(rig.store, name), tmp_path / "made", 10)
    assert doctor.check(rig.store) == []  # young: whoever ended it may be at it
    monkeypatch.setattr(doctor, "STALE_AFTER_S", -1.0)
    problems = doctor.check(rig.store)
    assert {problem.code for problem in problems} == {"orphan_checkpoint"}
    assert [problem.subject.rsplit("/", 1)[1] for problem in problems] == [ended.job_id, "run_2"]
    assert repair.mend(rig.store, actor="test").problems == []
    assert sorted(rig.store.artifacts.sharing_runs()) == [paused.job_id, "run_1"]


def test_what_retention_took_from_a_job_is_no_longer_at_the_url(rig: Rig, tmp_path: Path) -> None:
    job = a_job(rig.store, rig.loop.config)
    assert room.validate_next(rig.loop)
    put(far_of(rig.store, job.job_id), tmp_path / "made", 10)
    folders.clear(rig.store, rig.loop.config)
    assert at_the_url(tmp_path) != []
    with rig.store.reading() as c:
        dataset = datasets.get(c, str(stored(rig.store, job).dataset_id))
    assert dataset is not None
    rig.store.write(lambda c: removed.mark(c, dataset.path, removed.Why.RETENTION, datetime.now(UTC)))
    folders.clear(rig.store, rig.loop.config)
    assert at_the_url(tmp_path) == []


# --- with a real (tiny) model


class Vanished(BaseException):
    """The machine, with all that its process was about to do."""


def a_machine(tmp_path: Path, name: str, place: str = "shared") -> Config:
    """One whose state directory is its own, and whose database and artifacts all machines of the place have."""
    return settings(
        tmp_path / name,
        policy={"method": "full", "device": "cpu"},
        train={"learning_rate": 1e-3, "checkpoint_every": 10},
        schedule={"min_pairs": 0},
        store={"database": f"sqlite:///{tmp_path / place}.sqlite", "artifacts": f"memory://{tmp_path}/{place}"},
    )


def a_real_job(rig: Rig, base: Path) -> Job:
    """Three epochs of fifty steps."""
    file = room.upload(rig.store, rig.loop.config, BytesIO(pair_rows(224)), filename="rows.jsonl", purpose="fine-tune")
    numbers = {"n_epochs": 3, "batch_size": 4}
    method = {"type": "dpo", "dpo": {"hyperparameters": numbers}}
    body: dict[str, Any] = {"training_file": file.file_id, "model": str(base), "method": method, "seed": 7}
    job = room.create(rig.store, rig.loop.config, room.JobRequest.model_validate(body))
    assert room.validate_next(rig.loop)
    return job


def made_by(store: Store, job: Job) -> list[tuple[int | None, str]]:
    with store.reading() as c:
        return [(version.step_number, version.artifact_hash) for version in versions.of_job(c, job.job_id)]


@pytest.mark.slow
def test_a_job_whose_worker_is_gone_goes_on_elsewhere_to_the_same_bits(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tokenizer=byte_tokenizer(), gain=3.0)
    with open_rig(a_machine(tmp_path, "alone", "undisturbed")) as rig:
        job = a_real_job(rig, base)
        assert room.train_next(rig.loop, never)
        assert stored(rig.store, job).status is JobStatus.SUCCEEDED, stored(rig.store, job).error
        expected = made_by(rig.store, job)
    per_epoch = expected[0][0]
    assert per_epoch is not None
    reached = [0]
    one = a_machine(tmp_path, "one")
    with open_rig(one, owner="one:1") as rig:
        job = a_real_job(rig, base)

        def is_past_an_epoch() -> bool:
            reached.append(far_of(rig.store, job.job_id).newest() or 0)
            if reached[-1] >= per_epoch:
                raise Vanished
            return False

        with pytest.raises(Vanished):
            room.train_next(rig.loop, is_past_an_epoch)
    shutil.rmtree(one.state_dir)
    with open_rig(a_machine(tmp_path, "two"), owner="two:1") as rig:
        left = stored(rig.store, job)
        assert left.owner is not None
        rig.store.write(lambda c: jobs.update(c, left, lease_expires_at=datetime.now(UTC) - timedelta(seconds=1)))
        assert room.train_next(rig.loop, never)
        done = stored(rig.store, job)
        assert done.status is JobStatus.SUCCEEDED, done.error
        assert "Its worker is gone; another one goes on" in messages(rig.store, job)
        assert made_by(rig.store, job) == expected
        with rig.store.reading() as c:
            model = versions.by_model_name(c, str(done.fine_tuned_model))
            file = room.get_file(c, done.result_files[0])
        assert model is not None
        assert model.record is not None
        assert model.record["result"]["resumed_from"] >= reached[-1] >= per_epoch
        metrics = rig.store.artifacts.local(file.path).read_text()
        assert [int(line.split(",")[0]) for line in metrics.splitlines()[1:]] == list(range(1, 3 * per_epoch + 1))
        assert rig.store.artifacts.sharing_runs() == {}
        assert doctor.check(rig.store) == []
