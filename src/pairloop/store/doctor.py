"""Checks what no constraint can: that rows, aliases and artifact files still belong together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection, ForeignKeyConstraint

from pairloop.errors import StoreError
from pairloop.store import cycles
from pairloop.store import versions as store_versions
from pairloop.store.artifacts import Artifacts, from_row
from pairloop.store.database import broken_pages
from pairloop.store.schema import (
    aliases,
    dataset_pairs,
    datasets,
    duels,
    files,
    jobs,
    metadata,
    pair_feedback,
    pair_groups,
    versions,
)
from pairloop.store.store import Store
from pairloop.types import Alias, VersionKind


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding: a stable code, and a sentence that names the row or file."""

    code: str
    text: str


def check(store: Store, *, deep: bool = False) -> list[Problem]:
    """Every problem found; an empty list is a healthy store. Reads every artifact file of a folder.

    Of artifacts at a URL their names and sizes; with ``deep`` the contents too.
    """
    with store.reading() as c:
        problems = [Problem("damaged_database", f"{store.name}: {line}") for line in broken_pages(c)]
        for finder in (_orphans, _pairs_without_lineage, _datasets_without_pairs, _aliases, _duels, _jobs):
            problems += finder(c)
        folders, kept = _folders(c), _files(c)
    for owner, path, artifact_hash in folders:  # outside the transaction: hashing files takes its time
        problems += _artifact(store.artifacts, owner, path, artifact_hash, deep=deep)
    problems += [
        Problem("missing_file", f"{text}: {store.artifacts.address(path)} is not there whole")
        for text, path, size in kept
        if not store.artifacts.has_file(path, size)
    ]
    problems += [
        Problem("unfinished_upload", f"{url}: an upload that was not finished; nobody sees it, and it may be removed")
        for url in store.artifacts.leftovers()
    ]
    return problems + [Problem("stale_folder", f"{path}: left by a writer that is gone") for path in store.artifacts.stale()]


def _orphans(c: Connection) -> Iterator[Problem]:
    """Rows whose parent row is gone, for every foreign key of the schema."""
    for table in metadata.sorted_tables:
        for key in (item for item in table.constraints if isinstance(item, ForeignKeyConstraint)):
            if table is aliases:
                continue  # told in words by _aliases
            parent = key.referred_table.alias("parent")
            match = [element.parent == parent.c[element.column.name] for element in key.elements]
            filled = [element.parent.is_not(None) for element in key.elements]
            statement = sa.select(*table.primary_key.columns).where(*filled, ~sa.exists().select_from(parent).where(*match))
            for row in c.execute(statement):
                columns = ", ".join(element.parent.name for element in key.elements)
                yield Problem("orphan", f"{table.name} {tuple(row)}: {columns} names no row of {key.referred_table.name}")


def _pairs_without_lineage(c: Connection) -> Iterator[Problem]:
    for links, code, noun in (
        (pair_feedback, "pair_without_feedback", "feedback"),
        (pair_groups, "pair_without_group", "group"),
    ):
        linked = sa.exists().where(links.c.pair_id == dataset_pairs.c.pair_id)
        for row in c.execute(sa.select(dataset_pairs).where(~linked).order_by("dataset_id", "pair_id")):
            yield Problem(code, f"dataset {row.dataset_id}: pair {row.pair_id} traces back to no {noun}")


def _datasets_without_pairs(c: Connection) -> Iterator[Problem]:
    held = sa.exists().where(dataset_pairs.c.dataset_id == datasets.c.dataset_id)
    of_a_job = sa.exists().where(jobs.c.dataset_id == datasets.c.dataset_id)  # its rows come from a file, not from feedback
    pairless = sa.select(datasets).where(datasets.c.n_train > 0, ~held, ~of_a_job)
    for row in c.execute(pairless.order_by(datasets.c.created_at)):
        yield Problem(
            "dataset_without_pairs", f"dataset {row.dataset_id} has {row.n_train} pairs, and the store knows none of them"
        )


def _aliases(c: Connection) -> Iterator[Problem]:
    for row in c.execute(sa.select(aliases).order_by(aliases.c.policy, aliases.c.alias)):
        if store_versions.get(c, row.policy, row.number) is None:
            yield Problem(
                "dangling_alias", f"alias {row.alias} of {row.policy} names version {row.number}, which does not exist"
            )
    for policy in store_versions.policies(c):
        if store_versions.alias(c, policy, Alias.CHAMPION) is None:
            yield Problem("no_champion", f"policy {policy} has versions but no champion")


def _duels(c: Connection) -> Iterator[Problem]:
    for row in c.execute(sa.select(duels).where(duels.c.closed_at.is_(None)).order_by(duels.c.opened_at)):
        cycle = cycles.get(c, row.cycle_id)
        if cycle is not None and cycle.state.is_terminal:
            yield Problem("open_duel", f"duel {row.duel_id} is open, but its cycle {cycle.cycle_id} has ended ({cycle.state})")


def _jobs(c: Connection) -> Iterator[Problem]:
    known = sa.exists().where(jobs.c.job_id == versions.c.job_id)
    for row in c.execute(sa.select(versions).where(versions.c.job_id.is_not(None), ~known)):
        yield Problem("version_without_job", f"version {row.policy}@{row.number}: no job {row.job_id}")
    made = sa.exists().where(versions.c.model_name == jobs.c.fine_tuned_model)
    for row in c.execute(sa.select(jobs).where(jobs.c.fine_tuned_model.is_not(None), ~made)):
        yield Problem("job_without_model", f"job {row.job_id} ended with {row.fine_tuned_model}, which no version is called")


def _files(c: Connection) -> list[tuple[str, str, int]]:
    """(name in words, path, size in bytes) of every uploaded file."""
    rows = c.execute(sa.select(files).where(files.c.deleted_at.is_(None)).order_by(files.c.file_id))
    return [(f"file {row.file_id} ({row.filename})", from_row(c, row.path), row.bytes) for row in rows]


def _folders(c: Connection) -> list[tuple[str, str, str]]:
    """(owner in words, path, artifact hash or folder name) of every dataset and every version that is an artifact of ours."""
    ours = versions.c.kind != VersionKind.BASE.value  # the base is the user's own folder
    return [
        (f"dataset {row.dataset_id}", from_row(c, row.path), Path(row.path).name)
        for row in c.execute(sa.select(datasets).order_by(datasets.c.created_at))
    ] + [
        (f"version {row.policy}@{row.number}", from_row(c, row.path), row.artifact_hash)
        for row in c.execute(sa.select(versions).where(ours).order_by(versions.c.policy, versions.c.number))
    ]


def _artifact(artifacts: Artifacts, owner: str, path: str, artifact_hash: str, *, deep: bool) -> Iterator[Problem]:
    if not artifacts.has_folder(path):
        yield Problem("missing_artifact", f"{owner}: no folder {artifacts.address(path)}")
        return
    try:
        artifacts.inspect(artifact_hash, deep=deep)
    except StoreError as error:
        yield Problem("broken_artifact", f"{owner}: {error}")
