"""A fine-tuning job whose machine is gone: each life is a machine of its own, which has the database and the artifacts' URL."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.faults_rig import SCENARIOS, Scenario, ask_for_job, owner, work_on_job
from tests.loop_rig import open_rig, settings
from tests.tiny_models import byte_tokenizer, write_model

from pairloop.config import Config
from pairloop.learner.job import last_checkpoint
from pairloop.loop import jobs
from pairloop.store import Store, doctor, repair, versions
from pairloop.store import jobs as job_rows


def a_new_machine(folder: Path) -> Config:
    """Nothing lies in its state directory."""
    return settings(
        folder / f"machine-{len(list(folder.glob('machine-*')))}",
        policy={"method": "full", "device": "cpu"},
        train={"learning_rate": 1e-3, "checkpoint_every": 5},
        schedule={"lease": "1s", "min_pairs": 0},
        store={
            "database": f"sqlite:///{folder / 'pairloop.sqlite'}",
            "artifacts": f"local://{os.path.relpath(folder)}/url",  # a URL names a host, which here is the first folder
            "artifacts_options": {"auto_mkdir": True},
        },
    )


def _prepare(folder: Path) -> None:
    """The first machine was stopped after some steps, and is gone with its disk."""
    base = write_model(folder / "base", tokenizer=byte_tokenizer(), gain=3.0)
    config = a_new_machine(folder)
    with open_rig(config, owner=owner()) as rig:
        ask_for_job(rig, 224, model=str(base), n_epochs=2, batch_size=4)
        assert jobs.validate_next(rig.loop)
        with rig.store.reading() as c:
            (job,) = job_rows.walk(c)
        checkpoints = config.runs_dir / job.job_id / "checkpoints"
        assert jobs.train_next(rig.loop, lambda: last_checkpoint(checkpoints) is not None)
        assert list(rig.store.artifacts.sharing_runs()) == [job.job_id]
    shutil.rmtree(config.state_dir)
    config.state_dir.mkdir()


def _live(folder: Path) -> None:
    with open_rig(a_new_machine(folder), owner=owner()) as rig:
        work_on_job(rig)


def _tell(folder: Path) -> dict[str, Any]:
    """A doctor comes a day later: of a machine that died between a job's end and the cleaning nobody else knows."""
    with pytest.MonkeyPatch.context() as later, Store.open(a_new_machine(folder)) as store:
        later.setattr(doctor, "STALE_AFTER_S", -1.0)
        problems = {problem.text for problem in doctor.check(store, deep=True) if problem.code != "orphan_checkpoint"}
        repair.mend(store, actor="test")
        with store.reading() as c:
            (job,) = job_rows.walk(c)
            made = [(one.step_number, one.artifact_hash) for one in versions.of_job(c, job.job_id)]
        return {
            "job": (job.status, job.error, len(job.result_files)),
            "versions": made,
            "left": list(store.artifacts.sharing_runs()),
            "problems": problems,
        }


SCENARIOS["elsewhere"] = Scenario(None, _prepare, _live, _tell)
