"""Datasets without some of their rows: a new artifact with the rest, which names the one that it comes from."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

from pairloop.errors import StoreError
from pairloop.formats import snapshot
from pairloop.formats.snapshot import HELDOUT_FILE, TRAIN_FILE
from pairloop.loop.pairs.staging import SET_ASIDE_FILE
from pairloop.store import Store, datasets, versions
from pairloop.store.artifacts import MANIFEST
from pairloop.store.datasets import PairLineage
from pairloop.types import Dataset, TrainingRow

Drop = Callable[[TrainingRow], bool]


def without(store: Store, dataset: Dataset, drop: Drop, *, feedback_ids: Collection[str] = ()) -> tuple[Dataset, int]:
    """A dataset of the rows that ``drop`` leaves, published and recorded, and how many it dropped; itself where that is none.

    ``feedback_ids`` go from the list of what was set aside. StoreError where the dataset's folder cannot be read.
    """
    folder = store.artifacts.local(dataset.path)
    try:
        parts = {name: list(snapshot.read_rows(folder / name)) for name in (TRAIN_FILE, HELDOUT_FILE)}
        aside = (folder / SET_ASIDE_FILE).read_text(encoding="utf-8") if (folder / SET_ASIDE_FILE).exists() else ""
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"dataset {dataset.dataset_id}: {folder} cannot be read: {error}") from error
    kept = {name: [row for row in rows if not drop(row)] for name, rows in parts.items()}
    kept_aside = [line for line in aside.splitlines() if json.loads(line)["feedback_id"] not in feedback_ids]
    dropped = sum(map(len, parts.values())) - sum(map(len, kept.values()))
    if not dropped and len(kept_aside) == len(aside.splitlines()):
        return dataset, 0
    with store.artifacts.stage() as stage:
        for name, rows in kept.items():
            snapshot.write(stage / name, rows)
        (stage / SET_ASIDE_FILE).write_text("".join(f"{line}\n" for line in kept_aside), encoding="utf-8", newline="\n")
        artifact = store.artifacts.publish(stage, _manifest(manifest, dataset, dropped))
    made = replace(
        dataset,
        dataset_id=f"dataset_{artifact.hash[:32]}",
        path=str(artifact.path),
        n_train=len(kept[TRAIN_FILE]),
        n_heldout=len(kept[HELDOUT_FILE]),
        created_at=datetime.now(UTC),
    )
    lineage = [(row.row_id, row.group_ids, row.feedback_ids) for rows in kept.values() for row in rows]
    return store.write(lambda c: _record(c, dataset, made, lineage)), dropped


def forget_quarantined(store: Store, people: Collection[str]) -> None:
    """Take ids out of the rules in datasets' manifests, which say whose votes were set aside; no hash covers a manifest."""
    with store.reading() as c:
        found = [dataset for policy in versions.policies(c) for dataset in datasets.list_(c, policy)]
    for dataset in found:
        manifest = store.artifacts.manifest_of(dataset.path)
        held = manifest.get("rules", {}).get("quarantined", [])
        if set(held) & set(people):
            manifest["rules"]["quarantined"] = [one for one in held if one not in people]
            store.artifacts.put_manifest(dataset.path, manifest)


def _manifest(manifest: dict[str, Any], dataset: Dataset, dropped: int) -> dict[str, Any]:
    ours = {key: value for key, value in manifest.items() if key not in ("hash", "files")}
    return {**ours, "cleaned_from": dataset.dataset_id, "rows_removed": dropped}


def _record(c: Connection, dataset: Dataset, made: Dataset, lineage: Sequence[PairLineage]) -> Dataset:
    """It looked at the same feedback, so what was taken out does not come again."""
    known = datasets.get(c, made.dataset_id)
    if known is None:
        datasets.insert(c, made, feedback_seq=datasets.feedback_seq(c, dataset.dataset_id), cycle_id=None, pairs=lineage)
    return known or made
