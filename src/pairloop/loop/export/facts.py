"""What the store knows of a version: its parent, its data, how it was trained, and what evaluation and gate found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from pairloop.store import Store, cycles, datasets, runs, verdicts, versions
from pairloop.store.versions import Promotion
from pairloop.types import Cycle, Dataset, Interval, Verdict, Version


@dataclass(frozen=True, slots=True)
class Facts:
    """``base``: the base model's name. ``recipe`` and ``result``: of the training, from the version's manifest; empty where it
    has none. ``data_hash``: over the dataset's files. ``report``: the offline report's metrics. ``verdict``: the gate's last.
    """

    version: Version
    base: str
    recipe: Mapping[str, Any]
    result: Mapping[str, Any]
    dataset: Dataset | None
    data_hash: str | None
    cycle: Cycle | None
    report: Mapping[str, Interval]
    verdict: Verdict | None
    history: Sequence[Promotion]


def gather(store: Store, version: Version, base: str) -> Facts:
    """The facts of a version, read in one transaction."""
    manifest = version.record or store.artifacts.manifest_of(version.path)
    with store.reading() as c:
        dataset = datasets.get(c, version.dataset_id) if version.dataset_id else None
        cycle = _cycle_of(c, version)
        given = verdicts.for_cycle(c, cycle.cycle_id) if cycle is not None else []
        history = [move for move in versions.promotions(c, version.policy) if move.number == version.number]
    return Facts(
        version=version,
        base=base,
        recipe=manifest.get("recipe", {}),
        result=manifest.get("result", {}),
        dataset=dataset,
        data_hash=store.artifacts.manifest_of(dataset.path).get("hash") if dataset is not None else None,
        cycle=cycle,
        report=_report(cycle),
        verdict=given[-1][1] if given else None,
        history=history,
    )


def _cycle_of(c: Connection, version: Version) -> Cycle | None:
    run = runs.get(c, version.run_id) if version.run_id else None
    return cycles.get(c, run.cycle_id) if run is not None and run.cycle_id is not None else None


def _report(cycle: Cycle | None) -> dict[str, Interval]:
    """The offline report's figures, in the record that opened the duel or in the last one where there was no duel."""
    steps = cycle.steps if cycle is not None else ()
    metrics: Mapping[str, Any] = next((step.record["report"]["metrics"] for step in steps if "report" in step.record), {})
    return {name: Interval(**value) for name, value in metrics.items()}
