"""The queue of fine-tuning jobs: who has a job, what happens when a worker dies, one training at a time on a machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from tests import waiting
from tests.loop_rig import Rig, open_rig, settings
from tests.test_fine_tuning import pair_rows
from tests.waiting import PATIENCE_S

from pairloop.cli import pairloop
from pairloop.config import Config, load_config, override
from pairloop.errors import NotFoundError
from pairloop.loop import jobs as room
from pairloop.loop.cycle import ensure_base
from pairloop.loop.cycle.context import Lease
from pairloop.loop.export import facts
from pairloop.loop.jobs import JobQueue, JobRequest
from pairloop.loop.jobs.ownership import MAX_ATTEMPTS, claim
from pairloop.loop.jobs.progress import Progress
from pairloop.loop.jobs.start import find_start, lineage_name
from pairloop.loop.schedule import Scheduler
from pairloop.policy.engine import open_policy
from pairloop.policy.protocols import SampleRequest
from pairloop.scaffold import write_config
from pairloop.store import Store, cycles, doctor, jobs, runs, versions
from pairloop.store.jobs import Job, JobStatus
from pairloop.types import Cycle, CycleState, Message, SamplingParams

ELSEWHERE = "another-host:1/trainer_x"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with open_rig(settings(tmp_path, schedule={"min_pairs": 0, "poll": "1s", "lease": "2s"})) as rig:
        yield rig


def a_job(store: Store, config: Config, rows: int = 64, **hyperparameters: Any) -> Job:
    file = room.upload(store, config, BytesIO(pair_rows(rows)), filename="rows.jsonl", purpose="fine-tune")
    body = {
        "training_file": file.file_id,
        "model": config.policy.name,
        "method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
    }
    return room.create(store, config, JobRequest.model_validate(body))


def stored(store: Store, job: Job) -> Job:
    with store.reading() as c:
        found = jobs.get(c, job.job_id)
    assert found is not None
    return found


def messages(store: Store, job: Job) -> list[str]:
    with store.reading() as c:
        return [event.message for event in jobs.events(c, job.job_id, limit=1_000)][::-1]


def until(store: Store, job: Job, holds: Callable[[Job], Any], patience_s: float = PATIENCE_S) -> Job:
    def held() -> Job | None:
        return found if holds(found := stored(store, job)) else None

    found = waiting.until(held, patience_s=patience_s, why=lambda: (stored(store, job), messages(store, job)))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Job]]:
    """A loop whose one job has ended with a model; for tests that only look."""
    folder = tmp_path_factory.mktemp("trained")
    with open_rig(settings(folder, schedule={"min_pairs": 0, "poll": "1s"})) as rig:
        job = a_job(rig.store, rig.loop.config, n_epochs=3)
        assert room.validate_next(rig.loop)
        assert room.train_next(rig.loop, never)
        yield rig, stored(rig.store, job)


@contextmanager
def working(rig: Rig) -> Iterator[JobQueue]:
    queue = JobQueue(rig.loop)
    queue.start()
    try:
        yield queue
    finally:
        queue.stop()


def never() -> bool:
    return False


# --- who has a job


def test_a_job_has_one_owner_at_a_time(rig: Rig) -> None:
    job = a_job(rig.store, rig.loop.config)
    mine = claim(rig.loop, ELSEWHERE, [JobStatus.VALIDATING])
    assert mine is not None
    assert (mine.job_id, mine.owner, mine.attempt) == (job.job_id, ELSEWHERE, 1)
    assert claim(rig.loop, "me", [JobStatus.VALIDATING]) is None


def test_a_silent_worker_loses_its_job_and_what_it_says_later_is_not_heard(rig: Rig) -> None:
    job = a_job(rig.store, rig.loop.config)
    assert room.validate_next(rig.loop)
    slow = claim(rig.loop, ELSEWHERE, [JobStatus.QUEUED])
    assert slow is not None
    past = datetime.now(UTC) - timedelta(seconds=1)
    rig.store.write(lambda c: jobs.update(c, slow, lease_expires_at=past))
    assert room.train_next(rig.loop, never)
    assert stored(rig.store, job).status is JobStatus.SUCCEEDED
    assert "Its worker is gone; another one goes on" in messages(rig.store, job)
    now = datetime.now(UTC)
    assert not rig.store.write(lambda c: jobs.beat(c, job.job_id, ELSEWHERE, at=now, lease_expires_at=now))
    assert not rig.store.write(lambda c: jobs.update(c, slow, status=JobStatus.FAILED))
    assert stored(rig.store, job).status is JobStatus.SUCCEEDED


def test_a_job_that_ends_every_worker_is_given_up_with_a_code(rig: Rig) -> None:
    job = a_job(rig.store, rig.loop.config)
    past = datetime.now(UTC) - timedelta(seconds=1)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        dead = claim(rig.loop, f"{ELSEWHERE}-{attempt}", [JobStatus.VALIDATING])
        assert dead is not None
        assert dead.attempt == attempt
        rig.store.write(partial(jobs.update, job=dead, lease_expires_at=past))
    assert not room.validate_next(rig.loop)
    failed = stored(rig.store, job)
    assert failed.status is JobStatus.FAILED
    assert failed.error is not None
    assert (failed.error["code"], failed.error["kind"]) == ("worker_died", "system_error")


def test_workers_that_get_a_job_further_are_not_counted(rig: Rig) -> None:
    job = a_job(rig.store, rig.loop.config)
    past = datetime.now(UTC) - timedelta(seconds=1)
    for step in range(10, 10 * (MAX_ATTEMPTS + 3), 10):
        dead = claim(rig.loop, f"{ELSEWHERE}-{step}", [JobStatus.VALIDATING])
        assert dead is not None
        assert dead.attempt == 1
        progress = {**dead.progress, "step": step}
        rig.store.write(partial(jobs.update, job=dead, lease_expires_at=past, progress=progress))
    assert stored(rig.store, job).status is JobStatus.VALIDATING


def test_a_job_that_was_cancelled_by_the_end_of_its_training_makes_no_model(rig: Rig) -> None:
    job = a_job(rig.store, rig.loop.config)
    assert room.validate_next(rig.loop)
    asked = iter(range(10**6))

    def cancel_at_the_first_look() -> bool:
        if next(asked) == 1:
            room.cancel(rig.store, job.job_id)
        return False

    room.train_next(rig.loop, cancel_at_the_first_look)
    assert stored(rig.store, job).status is JobStatus.CANCELLED
    with rig.store.reading() as c:
        assert versions.of_job(c, job.job_id) == []
    assert doctor.check(rig.store) == []


def test_a_stopping_process_hands_its_job_on_without_a_count(rig: Rig) -> None:
    job = a_job(rig.store, rig.loop.config, 400, batch_size=1, n_epochs=50)
    with working(rig):
        until(rig.store, job, lambda one: one.progress.get("step"))
    left = stored(rig.store, job)
    assert (left.status, left.owner, left.attempt) == (JobStatus.QUEUED, None, 0)
    assert messages(rig.store, job)[-1].startswith("Interrupted at step")
    room.cancel(rig.store, job.job_id)
    assert (rig.loop.config.runs_dir / job.job_id).exists()
    with working(rig):
        waiting.until(lambda: not (rig.loop.config.runs_dir / job.job_id).exists())


def test_the_configured_trackers_hear_of_a_job(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path, schedule={"min_pairs": 0}, track={"to": ["tensorboard"]})) as rig:
        job = a_job(rig.store, rig.loop.config)
        assert room.validate_next(rig.loop)
        assert room.train_next(rig.loop, never)
        assert stored(rig.store, job).status is JobStatus.SUCCEEDED
        folder = rig.loop.config.state_dir / "tracking" / "tensorboard" / "bot" / job.job_id
        assert list(folder.glob("events.*"))


# --- order


def test_jobs_are_trained_in_the_order_of_their_making_and_say_their_place(rig: Rig) -> None:
    made = [a_job(rig.store, rig.loop.config) for _ in range(3)]
    while room.validate_next(rig.loop):
        pass
    with rig.store.reading() as c:
        assert [jobs.position(c, stored(rig.store, job)) for job in made] == [0, 1, 2]
    room.pause(rig.store, made[0].job_id)
    with rig.store.reading() as c:
        assert [jobs.position(c, stored(rig.store, job)) for job in made] == [None, 0, 1]
    assert room.train_next(rig.loop, never)
    assert [stored(rig.store, job).status for job in made] == [JobStatus.QUEUED, JobStatus.SUCCEEDED, JobStatus.QUEUED]
    assert "Fine-tuning job queued; 2 before it" in messages(rig.store, made[2])
    room.resume(rig.store, made[0].job_id)
    rig.store.write(lambda c: jobs.update(c, stored(rig.store, made[2]), status=JobStatus.RUNNING))
    with rig.store.reading() as c:
        assert jobs.position(c, stored(rig.store, made[0])) == 1, "a newer one runs first"


def test_a_machine_trains_a_job_or_a_cycle_and_neither_starves(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path, schedule={"min_pairs": 30, "poll": "1s"})) as rig:
        made = [a_job(rig.store, rig.loop.config) for _ in range(2)]
        rig.serve(60)
        scheduler = Scheduler(rig.loop)
        with _training_elsewhere(rig):
            scheduler.start()
            try:
                _cycle_in(rig, CycleState.TRAINING)
                for job in made:
                    until(rig.store, job, lambda one: one.status is JobStatus.QUEUED)
                with rig.store.reading() as c:
                    assert runs.list_(c, "bot") == []
                    assert jobs.waiting(c, [JobStatus.RUNNING]) == []
            except BaseException:
                scheduler.stop()
                raise
        try:
            _cycle_in(rig, CycleState.DUELLING)
            for job in made:
                until(rig.store, job, lambda one: one.status is JobStatus.SUCCEEDED)
        finally:
            scheduler.stop()
        with rig.store.reading() as c:
            (run,) = runs.list_(c, "bot")
            spans = [(run.created_at, run.heartbeat_at)]
            for job in made:
                events = jobs.events(c, job.job_id, limit=100)
                began = next(event.created_at for event in events if event.message == "Fine-tuning job started")
                spans.append((began, events[0].created_at))
        spans.sort()
        assert all(before[1] <= after[0] for before, after in pairwise(spans)), spans
        place = spans.index((run.created_at, run.heartbeat_at))
        assert place <= 1, "a cycle that waits lets one job pass, not all of them"


@contextmanager
def _training_elsewhere(rig: Rig) -> Iterator[None]:
    import socket

    with Lease(rig.store, rig.loop.config, rig.loop.owner, f"training:{socket.gethostname()}", "a training"):
        yield


def _cycle_in(rig: Rig, state: CycleState) -> None:
    def newest() -> Cycle | None:
        with rig.store.reading() as c:
            return next(iter(cycles.list_(c, "bot", limit=1)), None)

    waiting.until(lambda: (one := newest()) is not None and one.state is state, why=newest)


# --- where a job starts


def test_what_a_model_name_means(trained: tuple[Rig, Job], tmp_path: Path) -> None:
    rig, job = trained
    made = job.fine_tuned_model
    assert made is not None
    with rig.store.reading() as c:
        config = rig.loop.config
        for name, number in (("bot", 0), ("bot@base", 0), ("bot@champion", 0), ("bot@2", 2), (made, 4), ("fake", 0)):
            assert find_start(c, config, name) == room_start("bot", number)
        hub = find_start(c, config, "org/some-model")
        assert (hub.policy, hub.base_model) == (lineage_name("org/some-model"), "org/some-model")
        assert hub.policy.startswith("some-model-")
        for unknown in ("bot@7", "bot@challenger", "gpt-4o", "ft:bot:x::y", str(tmp_path / "nothing")):
            with pytest.raises(NotFoundError) as refused:
                find_start(c, config, unknown)
            assert refused.value.param == "model"


def room_start(policy: str, number: int) -> Any:
    from pairloop.loop.jobs.start import Start

    return Start(policy, number)


def test_checkpoints_are_versions_that_no_list_shows(trained: tuple[Rig, Job]) -> None:
    rig, job = trained
    with rig.store.reading() as c:
        assert [version.step_number for version in versions.of_job(c, job.job_id)] == [4, 8, 12, None]
        assert [version.number for version in versions.list_(c, "bot")] == [0, 4]
        assert versions.next_number(c, "bot") == 5


def test_a_model_keeps_its_own_record_where_its_folder_is_another_versions_too(trained: tuple[Rig, Job]) -> None:
    rig, job = trained
    with rig.store.reading() as c:
        *_, last, final = versions.of_job(c, job.job_id)
    same_bytes = replace(final, path=last.path)  # as where no step came after the last epoch's checkpoint
    assert facts.gather(rig.store, same_bytes, "fake").result["steps"] == 12
    assert facts.gather(rig.store, last, "fake").result["step"] == 12


# --- what is told


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "of": 40, "loss": 0.5, **more}


def test_what_is_heard_again_after_an_interruption_is_told_once() -> None:
    first = Progress({})
    for step in range(1, 21):
        first.hear(row(step))
    first.hear(row(20, heldout={"loss": 0.6}))
    told = [message for message, _ in first.take_events()]
    assert len(told) == 21
    again = Progress(first.known)
    for step in range(1, 21):
        again.hear(row(step))
        assert again.known["expected_end"] is None, "replayed steps say nothing about the pace"
    again.hear(row(20, heldout={"loss": 0.6}))
    assert again.take_events() == []
    again.hear(row(21))
    again.hear(row(22))
    assert again.known["expected_end"] is not None
    taken = again.take_events()
    again.hear(row(23))
    again.tell_again(taken)
    assert [message.split(":")[0] for message, _ in again.take_events()] == ["Step 21/40", "Step 22/40", "Step 23/40"]


# --- what the doctor finds


def test_the_doctor_misses_files_jobs_and_models(trained: tuple[Rig, Job]) -> None:
    """The last test of ``trained``, which it spoils."""
    rig, job = trained
    assert doctor.check(rig.store) == []
    with rig.store.reading() as c:
        Path(room.get_file(c, job.training_file).path).write_bytes(b"{}")
        (*_, last) = versions.of_job(c, job.job_id)
    other = replace(last, number=9, job_id="ftjob-none", model_name="ft:other")
    rig.store.write(lambda c: versions.insert(c, other))
    rig.store.write(lambda c: jobs.update(c, job, fine_tuned_model="ft:renamed"))
    assert {problem.code for problem in doctor.check(rig.store)} == {"missing_file", "version_without_job", "job_without_model"}


# --- by the command line, and a worker that is killed


def test_jobs_by_the_command_line(tmp_path: Path) -> None:
    path = write_config(tmp_path / "bot", {"policy": {"model": "fake"}})
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(pair_rows(64))
    wrong = CliRunner().invoke(pairloop, ["jobs", "create", str(rows), "--model", "nobody", "--config", str(path)])
    assert (wrong.exit_code, "'nobody' does not exist" in wrong.output) == (2, True), wrong.output
    assert not list((path.parent / "artifacts").glob("files/*")), "nothing is copied for a job that cannot be"
    made = _invoke(path, "create", str(rows), "--method", "dpo", "--beta", "0.2", "--suffix", "cli")
    job_id = made.split(":")[0]
    assert job_id in _invoke(path, "list")
    assert "dpo, " in _invoke(path, "show", job_id)
    assert "beta 0.2" in _invoke(path, "show", job_id)
    assert "(paused)" in _invoke(path, "pause", job_id)
    assert "(paused)" not in _invoke(path, "resume", job_id)
    assert "cancelled" in _invoke(path, "cancel", job_id)
    assert "The job was cancelled" in _invoke(path, "events", job_id)
    for arguments, said in (
        (["cancel", job_id], "cancelled already"),
        (["show", "ftjob-none"], "no fine-tuning job"),
        (["create", str(rows), "--method", "dpo", "--beta", "3"], "method.dpo.hyperparameters.beta"),
        (["create", str(rows), "--method", "magic"], "method"),
    ):
        refused = CliRunner().invoke(pairloop, ["jobs", *arguments, "--config", str(path)])
        assert (refused.exit_code, said in refused.output) == (2, True), refused.output


def _invoke(path: Path, *arguments: str) -> str:
    result = CliRunner().invoke(pairloop, ["jobs", *arguments, "--config", str(path)])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_job_goes_on_to_a_model(tmp_path: Path) -> None:
    recipe: dict[str, dict[str, Any]] = {
        "policy": {"model": "starter", "method": "full"},
        "train": {"checkpoint_every": 2, "max_length": 512},
        "schedule": {"min_pairs": 0, "poll": "1s", "lease": "5s"},
    }
    path = write_config(tmp_path / "bot", recipe)
    config = load_config(path, env={})
    command = [sys.executable, "-m", "pairloop", "worker", "--config", str(path)]
    first = subprocess.Popen(command)
    try:
        with Store.open(config) as store:
            waiting.until(lambda: not _no_base(store, config), patience_s=60)
            job = a_job(store, config, 128, n_epochs=8, batch_size=8)
            until(store, job, lambda one: one.progress.get("step", 0) >= 5, patience_s=60)
            child = next(c for c in psutil.Process(first.pid).children(recursive=True) if "pairloop.learner" in c.cmdline())
            os.kill(child.pid, signal.SIGKILL)
            first.kill()
            first.wait()
            reached = stored(store, job).progress["step"]
            second = subprocess.Popen(command)
            try:
                done = until(store, job, lambda one: one.status.is_terminal, patience_s=180)
            finally:
                second.terminate()
                second.wait(30)
            assert done.status is JobStatus.SUCCEEDED, done.error
            said = messages(store, job)
            assert "Its worker is gone; another one goes on" in said
            assert any(message.startswith("Fine-tuning goes on; it had reached step") for message in said)
            assert reached >= 5
            with store.reading() as c:
                assert len(versions.of_job(c, job.job_id)) == 9
            assert doctor.check(store) == []
    finally:
        if first.poll() is None:
            first.kill()


def test_a_training_process_that_dies_again_and_again_is_the_machines_fault(rig: Rig) -> None:
    """kill -9 of the training process: once it is started again, three times in a row end the job with a code."""
    job = a_job(rig.store, rig.loop.config, 400, batch_size=1, n_epochs=50)

    def killed(one: Job) -> bool:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # one that was killed a moment ago, and is not yet waited for
                if "pairloop.learner" in child.cmdline():
                    child.kill()
        return one.status.is_terminal

    with working(rig):
        failed = until(rig.store, job, killed, patience_s=60)
    assert failed.status is JobStatus.FAILED
    assert failed.error is not None
    assert (failed.error["code"], failed.error["kind"], failed.error["param"]) == ("child_died", "system_error", None)
    assert failed.result_files
    assert doctor.check(rig.store) == []


@pytest.mark.slow
def test_a_job_on_another_base_makes_a_lineage_that_its_own_server_answers_for(tmp_path: Path) -> None:
    with open_rig(settings(tmp_path, policy={"method": "full"}, schedule={"min_pairs": 0, "poll": "1s"})) as rig:
        config, rows = rig.loop.config, b"".join(json.dumps(_demonstration(i)).encode() + b"\n" for i in range(16))
        file = room.upload(rig.store, config, BytesIO(rows), filename="rows.jsonl", purpose="fine-tune")
        job = room.create(rig.store, config, JobRequest.model_validate({"training_file": file.file_id, "model": "starter"}))
        assert room.validate_next(rig.loop)
        assert room.train_next(rig.loop, never)
        done = stored(rig.store, job)
        assert done.status is JobStatus.SUCCEEDED, done.error
        assert done.policy == lineage_name("starter")
        with rig.store.reading() as c:
            made = versions.by_model_name(c, done.fine_tuned_model or "")
            assert find_start(c, config, done.fine_tuned_model or "").base_model is not None
        assert made is not None
        assert doctor.check(rig.store) == []
        own = override(config, {"policy": {"name": done.policy, "model": "starter"}})
        policy = open_policy(own)
        try:
            ensure_base(rig.store, policy, own)
            policy.load(made)
            ids = policy.tokens.encode_prompt((Message("user", "Where is my order?"),))
            (answer,) = policy.sample(SampleRequest(ids, made.number, params=SamplingParams(max_tokens=8))).result()
            assert answer.version == made.number
        finally:
            policy.close()


def _demonstration(i: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"Where is order {i}?"}, {"role": "assistant", "content": "On its way."}]}


def _no_base(store: Store, config: Config) -> bool:
    with store.reading() as c:
        return versions.get(c, config.policy.name, 0) is None
