"""What a job makes: versions that are known as ``ft:<base>:<org>:<suffix>:<id>``, as clients of OpenAI know them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.learner.job import TrainJob, TrainResult
from pairloop.store import Store, versions
from pairloop.store.jobs import Job
from pairloop.types import Version, VersionKind

ORGANIZATION = "pairloop"
_ID_LENGTH = 12


def model_name(job: Job) -> str:
    """The name of the model that the job ends with."""
    suffix = re.sub(r"[^A-Za-z0-9._-]+", "-", job.suffix or "").strip("-")
    return f"ft:{job.policy}:{ORGANIZATION}:{suffix}:{job.job_id[-_ID_LENGTH:]}"


def checkpoint_name(job: Job, step: int) -> str:
    """The name of the model as it was after ``step``."""
    return f"{model_name(job)}:ckpt-step-{step}"


def checkpoint_id(version: Version) -> str:
    """The id of a checkpoint on the wire."""
    assert version.job_id is not None, "a checkpoint belongs to a job"
    return f"ftckpt_{version.job_id.removeprefix('ftjob-')}_{version.step_number}"


def publish(
    store: Store,
    config: Config,
    job: Job,
    folder: Path,
    *,
    name: str,
    step: int | None = None,
    metrics: Mapping[str, float] | None = None,
    result: TrainResult | None = None,
) -> Callable[[Connection], Version]:
    """Publish what a training left, and give back what registers it as a version in the caller's transaction."""
    recipe = TrainJob.load(config.runs_dir.resolve() / job.job_id / "job.json").recipe()
    manifest = {
        "noun": "version",
        "policy": job.policy,
        "parent": job.parent,
        "dataset_id": job.dataset_id,
        "job_id": job.job_id,
        "model_name": name,
        "recipe": recipe,
        "result": {"step": step, **(metrics or {})} if result is None else result.as_dict(),
    }
    artifact = store.artifacts.publish(folder, manifest)
    version = Version(
        policy=job.policy,
        number=0,
        kind=VersionKind.FULL if config.policy.method == "full" else VersionKind.ADAPTER,
        path=str(artifact.path),
        artifact_hash=artifact.hash,
        parent=job.parent,
        dataset_id=job.dataset_id,
        run_id=None,
        created_at=datetime.now(UTC),
        job_id=job.job_id,
        step_number=step,
        model_name=name,
        metrics=metrics,
        record={"recipe": recipe, "result": manifest["result"]},
    )

    def register(c: Connection) -> Version:
        numbered = replace(version, number=versions.next_number(c, job.policy))
        versions.insert(c, numbered)
        return numbered

    return register
