"""A run as a Ray job: ``python -m pairloop.learner.ray_job JOB.json [--die-with-parent]``.

This process submits the job under the run's id, waits for it, and stops it when it is itself stopped. Who asks again finds the
job that runs, and starts no second one. The cluster's nodes see the run's folder, the models and this interpreter under the
same paths. Metrics, checkpoints and result are the files of any other run; exit codes are those of `pairloop.learner`.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairloop.config import child_env, log_of_child
from pairloop.errors import ConfigError, TrainingError
from pairloop.learner.child import DIE_WITH_PARENT, LOG_TAIL, WORKER, wait_for_parents_end
from pairloop.learner.job import TrainJob, TrainResult, TrainStatus
from pairloop.learner.supervise import classify, work
from pairloop.telemetry import logs

if TYPE_CHECKING:
    from ray.job_submission import JobStatus, JobSubmissionClient

LOG = logging.getLogger("pairloop.learner.ray_job")  # run as a program, whose own name is no place in the tree

POLL_S = 1.0
UNANSWERED_S = 120.0
"""How long the job server may be silent before the run is given up here; the job itself may go on."""
CARRIED = ("PYTHONPATH", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", *logs.VARIABLES)
"""Environment that the job gets from this process."""


def main(arguments: list[str]) -> int:
    if not arguments or set(arguments[1:]) - {DIE_WITH_PARENT, WORKER}:
        print(__doc__, file=sys.stderr)
        return 2
    logs.setup(log_of_child())
    path = Path(arguments[0])
    job = TrainJob.load(path)
    if WORKER in arguments:
        return run_workers(job, path)
    try:
        client = connect(job)
    except (ConfigError, TrainingError) as error:
        result = TrainResult(TrainStatus.FAILED, error=classify(error))
        result.save_first(Path(job.result_path), f"ray-{os.getpid()}")
        return result.exit_code

    def stop(*_: Any) -> None:
        client.stop_job(job.run_id)
        os._exit(3)

    signal.signal(signal.SIGTERM, stop)

    def stop_with_parent() -> None:
        wait_for_parents_end()
        stop()

    if DIE_WITH_PARENT in arguments:
        threading.Thread(target=stop_with_parent, daemon=True).start()
    submit(client, job, path)
    return attend(client, job)


def connect(job: TrainJob) -> JobSubmissionClient:
    """ConfigError without Ray; TrainingError where no job server answers."""
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise ConfigError('train.launcher = "ray" needs Ray: pip install "pairloop[ray]"') from error
    try:
        return JobSubmissionClient(job.train.ray_address)
    except Exception as error:
        raise TrainingError(f"no Ray job server answers at train.ray_address = {job.train.ray_address!r}: {error}") from error


def submit(client: JobSubmissionClient, job: TrainJob, path: Path) -> None:
    """See that the run's job is there: the one that waits or runs already, or else a new one."""
    status = _status(client, job.run_id)
    if status is not None and not status.is_terminal():
        LOG.info("the Ray job %s is there already", job.run_id)
        return
    if status is not None:
        client.delete_job(job.run_id)
    env = child_env()
    try:
        client.submit_job(
            submission_id=job.run_id,
            entrypoint=shlex.join([sys.executable, "-m", "pairloop.learner.ray_job", str(path.resolve()), WORKER]),
            runtime_env={
                "env_vars": {
                    # Ray gives workers 60 s to import torch, which is too little for a cold disk.
                    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
                    **{name: env[name] for name in CARRIED if name in env},
                }
            },
        )
    except RuntimeError:
        if _status(client, job.run_id) is None:
            raise
        LOG.info("another process has submitted the Ray job %s", job.run_id)


def attend(client: JobSubmissionClient, job: TrainJob) -> int:
    """Wait for the job's end; the exit code of its result, or 1 where it left none, with the job's last words on stderr."""
    answered_s = time.monotonic()
    while True:
        try:
            status = _status(client, job.run_id)
        except Exception as error:
            if time.monotonic() - answered_s > UNANSWERED_S:
                raise TrainingError(f"Ray's job server at {job.train.ray_address} is silent: {error}") from error
            LOG.warning("Ray's job server did not answer: %s", error)
        else:
            answered_s = time.monotonic()
            if status is None or status.is_terminal():
                break
        time.sleep(POLL_S)
    result = TrainResult.load(Path(job.result_path))
    if result is not None:
        return result.exit_code
    print(f"the Ray job {job.run_id} ended as {status} without a result", file=sys.stderr)
    if status is not None:
        print(client.get_job_info(job.run_id).message, client.get_job_logs(job.run_id)[-LOG_TAIL:], sep="\n", file=sys.stderr)
    return 1


def run_workers(job: TrainJob, path: Path) -> int:
    """The job itself: Ray Train's workers, each with its share of every batch."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pairloop.learner.workers import GLOO, NCCL_TOO, PATIENCE

    ray.init()
    uses_gpu = job.device.startswith("cuda") or (job.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    storage = path.resolve().parent / "ray"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": str(path.resolve())},
        scaling_config=ScalingConfig(
            num_workers=job.train.processes,
            use_gpu=uses_gpu,
            resources_per_worker={"CPU": job.train.threads, **({"GPU": 1} if uses_gpu else {})},
        ),
        torch_config=TorchConfig(backend=NCCL_TOO if uses_gpu else GLOO, timeout_s=int(PATIENCE.total_seconds())),
        # What to do after a failure is the parent's affair, as for every launcher.
        run_config=RunConfig(name=job.run_id, storage_path=str(storage), failure_config=FailureConfig(max_failures=0)),
    )
    try:
        trainer.fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    result = TrainResult.load(Path(job.result_path))
    return 1 if result is None else result.exit_code


def _worker(config: dict[str, str]) -> None:
    result = work(TrainJob.load(Path(config["job"])))
    if result.error is not None:
        # So that Ray ends the others, who may wait for this one.
        raise TrainingError(result.error.message)


def _status(client: JobSubmissionClient, run_id: str) -> JobStatus | None:
    """Where the job stands; None where there is none of that name."""
    return next((found.status for found in client.list_jobs() if found.submission_id == run_id), None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
