"""The dataset that a job trains on: a snapshot as a cycle's, whose rows come from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Connection

from pairloop.store import Store, datasets
from pairloop.store.jobs import Job
from pairloop.types import Dataset, TrainingRow


@dataclass(frozen=True, slots=True)
class Rows:
    """What a job trains on and what it is measured with; ``counts`` and ``dropped`` as in a dataset."""

    train: Sequence[TrainingRow]
    heldout: Sequence[TrainingRow]
    read: int
    counts: Mapping[str, int]
    dropped: Mapping[str, int]


def publish(
    store: Store, job: Job, folder: Path, *, train: int, heldout: int, counts: Mapping[str, int], dropped: Mapping[str, int]
) -> Dataset:
    """Make a snapshot's folder an artifact; the caller records the dataset, in the transaction that names it in the job."""
    manifest = {
        "kind": "dataset",
        "policy": job.policy,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "counts": dict(counts),
        "dropped": dict(dropped),
    }
    artifact = store.artifacts.publish(folder, manifest)
    return Dataset(
        dataset_id=f"dataset_{artifact.hash[:32]}",
        policy=job.policy,
        path=str(artifact.path),
        n_train=train,
        n_heldout=heldout,
        counts=counts,
        dropped=dropped,
        created_at=datetime.now(UTC),
    )


def record(c: Connection, dataset: Dataset) -> None:
    """Insert a job's dataset; the same files give the same one."""
    if datasets.get(c, dataset.dataset_id) is None:
        datasets.insert(c, dataset, feedback_seq=0, cycle_id=None, pairs=[])
