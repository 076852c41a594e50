"""The dataset that a job trains on: a snapshot as a cycle's, whose rows come from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pairloop.formats import snapshot
from pairloop.store import Artifact, Store
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


def publish_rows(store: Store, job: Job, rows: Rows) -> Dataset:
    """Write the snapshot as an artifact; the caller records the dataset, in the transaction that names it in the job."""
    artifact = _artifact(store, job, rows)
    return Dataset(
        dataset_id=f"dataset_{artifact.hash[:32]}",
        policy=job.policy,
        path=str(artifact.path),
        n_train=len(rows.train),
        n_heldout=len(rows.heldout),
        counts=rows.counts,
        dropped=rows.dropped,
        created_at=datetime.now(UTC),
    )


def _artifact(store: Store, job: Job, rows: Rows) -> Artifact:
    with store.artifacts.stage() as folder:
        snapshot.write_folder(folder, rows.train, rows.heldout)
        manifest = {
            "kind": "dataset",
            "policy": job.policy,
            "training_file": job.training_file,
            "validation_file": job.validation_file,
            "counts": dict(rows.counts),
            "dropped": dict(rows.dropped),
        }
        return store.artifacts.publish(folder, manifest)
