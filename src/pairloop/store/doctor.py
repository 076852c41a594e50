"""Checks what no constraint can: that rows, aliases and artifact files still belong together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection, ForeignKeyConstraint, Table

from pairloop.errors import StoreError, UnavailableError
from pairloop.store import contents, cycles, removed, repairs, runs, schedules
from pairloop.store import files as store_files
from pairloop.store import jobs as store_jobs
from pairloop.store import versions as store_versions
from pairloop.store.archive import staged
from pairloop.store.artifacts import STALE_AFTER_S, Artifacts, sha256_of
from pairloop.store.contents import NamedArtifact
from pairloop.store.database import broken_pages
from pairloop.store.findings import FINDINGS
from pairloop.store.schema import (
    aliases,
    dataset_pairs,
    datasets,
    duels,
    jobs,
    metadata,
    pair_feedback,
    pair_groups,
    removed_artifacts,
    versions,
)
from pairloop.store.store import Store
from pairloop.types import Alias, DuelKind


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding: a stable code (of ``findings.FINDINGS``), a sentence that names the row or file, and whose it is.

    ``subject``: the id, name or path that the sentence is about.
    """

    code: str
    text: str
    subject: str = ""

    @property
    def repair(self) -> str | None:
        """What ``--repair`` does about such a problem; None where only a person can mend it."""
        return FINDINGS[self.code].repair

    @property
    def by_hand(self) -> str:
        """What is left to a person."""
        return FINDINGS[self.code].by_hand


def check(store: Store, *, accepted: bool = False, deep: bool = False) -> list[Problem]:
    """Every problem found; an empty list is a healthy store. Reads every artifact and every uploaded file of a folder.

    Of those at a URL their names and sizes; with ``deep`` the contents too. With ``accepted`` also artifacts that were
    recorded as lost: a backup may still have them. UnavailableError where something cannot be read now (no network, no right):
    that is no finding.
    """
    with store.reading() as c:
        problems = [Problem("damaged_database", f"{store.name}: {line}") for line in broken_pages(c)]
        for finder in (_orphans, _pairs_without_lineage, _datasets_without_pairs, _aliases, _duels, _jobs, _schedules):
            problems += finder(c)
        named, uploads, lost = contents.artifacts(c), store_files.list_(c), repairs.losses(c)
        in_use, kept = aliased(c), contents.manifests(c)
    broken: list[Problem] = []
    for artifact in named:  # outside the transaction: hashing files takes its time
        if accepted or artifact.subject not in lost or artifact.subject in in_use:
            broken += _artifact(store.artifacts, artifact, deep=deep)
    problems += broken
    problems += _unusable_aliases(broken, in_use)
    for upload in uploads:
        problems += _upload(store.artifacts, upload, deep=deep)
    folders, file_ids = {store.artifacts.path(one.hash).name for one in named} | kept, {one.file_id for one in uploads}
    problems += [
        Problem("unreferenced_artifact", f"{path}: no row names it", str(path))
        for path in (*store.artifacts.unreferenced(folders), *store.artifacts.unreferenced_uploads(file_ids))
    ]
    problems += [
        Problem("unfinished_upload", f"{url}: nobody finished it or sees it", url) for url in store.artifacts.leftovers()
    ]
    problems += _orphan_checkpoints(store)
    problems += _unfinished_restore(store)
    return problems + [
        Problem("stale_folder", f"{path}: left by a writer that is gone", str(path)) for path in store.artifacts.stale()
    ]


def _orphan_checkpoints(store: Store) -> Iterator[Problem]:
    """Of runs and jobs that have ended. What one has that is paused or waits for a worker is its own, however old it is."""
    shared = store.artifacts.sharing_runs(older_than_s=STALE_AFTER_S)
    with store.reading() as c:
        owned = runs.open_folders(c) | store_jobs.open_ids(c) if shared else set()
    for run, url in shared.items():
        if run not in owned:
            yield Problem("orphan_checkpoint", f"{url}: {run} is no run or job that goes on", url)


def _unfinished_restore(store: Store) -> Iterator[Problem]:
    """On this machine: of a database that is no file it lies in the state directory of whoever restored."""
    path = staged(store.url, store.state_dir)
    if path is None or not path.exists():
        return
    if time.time() - path.stat().st_mtime > STALE_AFTER_S:  # a younger one may be at work
        yield Problem("unfinished_restore", f"{path}: left by a restore that was killed; it holds people's words", str(path))


def _orphans(c: Connection) -> Iterator[Problem]:
    """Rows whose parent row is gone, for every foreign key of the schema."""
    for table, columns, parent, statement in _orphan_queries():
        for row in c.execute(statement):
            key = tuple(row)
            yield Problem("orphan", f"{table} {key}: {columns} names no row of {parent}", f"{table} {key}")


@cache
def _orphan_queries() -> list[tuple[str, str, str, sa.Select[Any]]]:
    """(table, columns, parent table, rows of the table without one) of every foreign key but those told in words."""
    queries = []
    for table in (table for table in metadata.sorted_tables if table is not aliases):
        for key in (item for item in table.constraints if isinstance(item, ForeignKeyConstraint)):
            parent = key.referred_table.alias("parent")
            match = [element.parent == parent.c[element.column.name] for element in key.elements]
            filled = [element.parent.is_not(None) for element in key.elements]
            statement = sa.select(*table.primary_key.columns).where(*filled, ~sa.exists().select_from(parent).where(*match))
            columns = ", ".join(element.parent.name for element in key.elements)
            queries.append((table.name, columns, key.referred_table.name, statement))
    return queries


def _pairs_without_lineage(c: Connection) -> Iterator[Problem]:
    for links, code, noun in (
        (pair_feedback, "pair_without_feedback", "feedback"),
        (pair_groups, "pair_without_group", "group"),
    ):
        linked = sa.exists().where(links.c.pair_id == dataset_pairs.c.pair_id)
        for row in c.execute(sa.select(dataset_pairs).where(~linked).order_by("dataset_id", "pair_id")):
            text = f"dataset {row.dataset_id}: pair {row.pair_id} traces back to no {noun}"
            yield Problem(code, text, row.dataset_id)


def _datasets_without_pairs(c: Connection) -> Iterator[Problem]:
    held = sa.exists().where(dataset_pairs.c.dataset_id == datasets.c.dataset_id)
    of_a_job = sa.exists().where(jobs.c.dataset_id == datasets.c.dataset_id)  # its rows come from a file, not from feedback
    pairless = sa.select(datasets).where(datasets.c.n_train > 0, ~held, ~of_a_job, ~_removed(datasets))
    for row in c.execute(pairless.order_by(datasets.c.created_at)):
        text = f"dataset {row.dataset_id} has {row.n_train} pairs, and the store knows none of them"
        yield Problem("dataset_without_pairs", text, row.dataset_id)


def _aliases(c: Connection) -> Iterator[Problem]:
    for row in c.execute(sa.select(aliases).order_by(aliases.c.policy, aliases.c.alias)):
        version = store_versions.get(c, row.policy, row.number)
        if version is None:
            text = f"alias {row.alias} of {row.policy} names version {row.number}, which does not exist"
            yield Problem("dangling_alias", text, f"{row.policy}@{row.alias}")
        elif removed.is_removed(c, version.path):
            text = f"alias {row.alias} of {row.policy} names version {row.number}, whose weights were removed"
            yield Problem("unusable_alias", text, f"{row.policy}@{row.alias}")
    for policy in store_versions.policies(c):
        if store_versions.alias(c, policy, Alias.CHAMPION) is None:
            yield Problem("no_champion", f"policy {policy} has versions but no champion", f"{policy}@{Alias.CHAMPION}")


def _duels(c: Connection) -> Iterator[Problem]:
    for row in c.execute(sa.select(duels).where(duels.c.closed_at.is_(None)).order_by(duels.c.opened_at)):
        cycle = cycles.get(c, row.cycle_id)
        if cycle is not None and cycle.state.is_terminal:
            text = f"duel {row.duel_id} is open, but its cycle {cycle.cycle_id} has ended ({cycle.state})"
            yield Problem("open_duel", text, row.duel_id)
        elif row.kind == DuelKind.SEED.value and not _has_open_duel(c, row.cycle_id):
            text = f"seed duel {row.duel_id} is open, but the duel of its cycle {row.cycle_id} with the champion is not"
            yield Problem("open_duel", text, row.duel_id)


def _has_open_duel(c: Connection, cycle_id: str) -> bool:
    of_gate = (duels.c.cycle_id == cycle_id, duels.c.kind == DuelKind.GATE.value, duels.c.closed_at.is_(None))
    return c.execute(sa.select(duels.c.duel_id).where(*of_gate)).first() is not None


def _jobs(c: Connection) -> Iterator[Problem]:
    known = sa.exists().where(jobs.c.job_id == versions.c.job_id)
    for row in c.execute(sa.select(versions).where(versions.c.job_id.is_not(None), ~known)):
        yield Problem("version_without_job", f"version {row.policy}@{row.number}: no job {row.job_id}")
    made = sa.exists().where(versions.c.model_name == jobs.c.fine_tuned_model)
    for row in c.execute(sa.select(jobs).where(jobs.c.fine_tuned_model.is_not(None), ~made)):
        yield Problem("job_without_model", f"job {row.job_id} ended with {row.fine_tuned_model}, which no version is called")


def _schedules(c: Connection) -> Iterator[Problem]:
    for policy, setting, wrong in schedules.unusable(c):
        yield Problem("unusable_setting", f"schedule of {policy}: {wrong}", f"{policy} {setting}")


def aliased(c: Connection) -> dict[str, list[str]]:
    """The names of the versions that aliases name, each with those aliases (``policy@alias``)."""
    found: dict[str, list[str]] = {}
    for row in c.execute(sa.select(aliases).order_by(aliases.c.policy, aliases.c.alias)):
        found.setdefault(f"{row.policy}@{row.number}", []).append(f"{row.policy}@{row.alias}")
    return found


def _removed(table: Table) -> ColumnElement[bool]:
    """Whose folder was removed on purpose: by an erasure, or because it was kept long enough."""
    return sa.exists().where(removed_artifacts.c.path == table.c.path)


def _unusable_aliases(broken: list[Problem], in_use: dict[str, list[str]]) -> Iterator[Problem]:
    for problem in broken:
        for alias in in_use.get(problem.subject, ()):
            yield Problem("unusable_alias", f"{alias} names {problem.subject}, whose artifact is not whole", alias)


def _upload(artifacts: Artifacts, file: store_files.StoredFile, *, deep: bool) -> Iterator[Problem]:
    named, address = f"file {file.file_id} ({file.filename})", artifacts.address(file.path)
    if not artifacts.has_file(file.path, file.size):
        yield Problem("missing_file", f"{named}: {address} is not there whole", file.file_id)
    elif (deep or not artifacts.is_far) and sha256_of(artifacts.local(file.path)) != file.sha256:
        yield Problem("broken_file", f"{named}: {address} is not what was uploaded", file.file_id)


def _artifact(artifacts: Artifacts, named: NamedArtifact, *, deep: bool) -> Iterator[Problem]:
    if not artifacts.has_folder(named.path):
        yield Problem("missing_artifact", f"{named.owner}: no folder {artifacts.address(str(named.path))}", named.subject)
        return
    try:
        artifacts.inspect(named.hash, deep=deep)
    except UnavailableError:  # says nothing about the artifact, and a repair would move the champion for it
        raise
    except StoreError as error:
        yield Problem("broken_artifact", f"{named.owner}: {error}", named.subject)
