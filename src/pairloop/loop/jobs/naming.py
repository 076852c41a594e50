"""What a job's models are called: ``ft:<base>:<org>:<suffix>:<id>``, as clients of OpenAI know it."""

from __future__ import annotations

import re

from pairloop.store.jobs import Job

ORGANIZATION = "pairloop"
_ID_LENGTH = 12


def model_name(job: Job) -> str:
    """The name of the model that the job ends with."""
    suffix = re.sub(r"[^A-Za-z0-9._-]+", "-", job.suffix or "").strip("-")
    return f"ft:{job.policy}:{ORGANIZATION}:{suffix}:{job.job_id[-_ID_LENGTH:]}"


def checkpoint_name(job: Job, step: int) -> str:
    """The name of the model as it was after ``step``."""
    return f"{model_name(job)}:ckpt-step-{step}"
