"""What lies outside the database and belongs to it: the artifacts that rows name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection

from pairloop.store.artifacts import from_row
from pairloop.store.removed import Why
from pairloop.store.schema import datasets, removed_artifacts, versions
from pairloop.types import VersionKind


@dataclass(frozen=True, slots=True)
class NamedArtifact:
    """An artifact as a row names it. ``subject``: the dataset's id, or the version's name; ``hash``: or the folder's name."""

    noun: str
    subject: str
    path: Path
    hash: str

    @property
    def owner(self) -> str:
        return f"{self.noun} {self.subject}"


def manifests(c: Connection) -> set[str]:
    """Names of the folders of which only the manifest is left: their files went by their age."""
    kept = sa.select(removed_artifacts.c.path).where(removed_artifacts.c.reason == Why.RETENTION.value)
    return {Path(path).name for path in c.execute(kept).scalars()}


def artifacts(c: Connection) -> list[NamedArtifact]:
    """Of every dataset, and of every version that is an artifact of ours: the base is the user's own folder.

    Not those that were removed on purpose, by an erasure or because they were kept long enough.
    """
    ours = versions.c.kind != VersionKind.BASE.value
    gone = [sa.exists().where(removed_artifacts.c.path == table.c.path) for table in (datasets, versions)]
    of_datasets = [
        NamedArtifact("dataset", row.dataset_id, Path(from_row(c, row.path)), Path(row.path).name)
        for row in c.execute(sa.select(datasets).where(~gone[0]).order_by(datasets.c.created_at, datasets.c.dataset_id))
    ]
    return of_datasets + [
        NamedArtifact("version", f"{row.policy}@{row.number}", Path(from_row(c, row.path)), row.artifact_hash)
        for row in c.execute(sa.select(versions).where(ours, ~gone[1]).order_by(versions.c.policy, versions.c.number))
    ]
