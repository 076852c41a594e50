"""The shapes of our own resources on the wire, and how they are made from rows. Times are Unix seconds."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel

from pairloop.errors import NotFoundError
from pairloop.loop.gate import win_rate
from pairloop.types import Cycle, Dataset, Duel, Verdict, Version


class PolicyResource(BaseModel):
    """A lineage of versions, and what its aliases name."""

    object: Literal["policy"] = "policy"
    id: str
    model: str
    method: str
    champion: str | None
    challenger: str | None
    versions: int
    groups: int


class VersionResource(BaseModel):
    object: Literal["version"] = "version"
    id: str
    policy: str
    number: int
    kind: str
    parent: str | None
    aliases: list[str]
    dataset_id: str | None
    run_id: str | None
    artifact_hash: str
    created_at: int


class StepResource(BaseModel):
    state: str
    record: dict[str, Any]
    created_at: int


class CycleResource(BaseModel):
    object: Literal["cycle"] = "cycle"
    id: str
    policy: str
    number: int
    state: str
    parent: str
    trigger: str
    created_at: int
    steps: list[StepResource]


class DatasetResource(BaseModel):
    object: Literal["dataset"] = "dataset"
    id: str
    policy: str
    path: str
    n_train: int
    n_heldout: int
    counts: dict[str, int]
    dropped: dict[str, int]
    created_at: int


class DuelResource(BaseModel):
    object: Literal["duel"] = "duel"
    id: str
    cycle_id: str
    policy: str
    champion: str
    challenger: str
    picks: int
    opened_at: int
    closed_at: int | None


class ReasonResource(BaseModel):
    rule: str
    passed: bool | None
    text: str
    observed: float | None
    threshold: float | None


class VerdictResource(BaseModel):
    kind: str
    text: str
    reasons: list[ReasonResource]
    e_value: float
    wins: int
    losses: int
    ties: int
    raters: int
    win_rate: float
    ci95: tuple[float, float]
    created_at: int


class GateResource(BaseModel):
    """What the gate said about one cycle's challenger; ``verdict`` is its latest word, ``history`` all of them."""

    object: Literal["gate"] = "gate"
    id: str
    cycle_id: str
    verdict: VerdictResource
    history: list[VerdictResource]


Item = TypeVar("Item", bound=BaseModel)


class Page(BaseModel, Generic[Item]):
    """A page of a list; the next one is asked for with ``after`` = ``last_id``."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page(items: Sequence[Item], *, limit: int, after: str | None) -> Page[Item]:
    """The ``limit`` items that follow the one with id ``after``; NotFoundError where there is no such item."""
    ids = [str(getattr(item, "id", "")) for item in items]
    if after is not None and after not in ids:
        raise NotFoundError(f"no item {after!r} in this list", param="after")
    start = ids.index(after) + 1 if after is not None else 0
    shown, shown_ids = list(items[start : start + limit]), ids[start : start + limit]
    ends = (shown_ids[0], shown_ids[-1]) if shown_ids else (None, None)
    return Page(data=shown, first_id=ends[0], last_id=ends[1], has_more=start + limit < len(items))


def version_resource(version: Version, aliases: Sequence[str]) -> VersionResource:
    return VersionResource(
        id=version.name,
        policy=version.policy,
        number=version.number,
        kind=version.kind.value,
        parent=None if version.parent is None else f"{version.policy}@{version.parent}",
        aliases=list(aliases),
        dataset_id=version.dataset_id,
        run_id=version.run_id,
        artifact_hash=version.artifact_hash,
        created_at=seconds(version.created_at),
    )


def cycle_resource(cycle: Cycle) -> CycleResource:
    return CycleResource(
        id=cycle.cycle_id,
        policy=cycle.policy,
        number=cycle.number,
        state=cycle.state.value,
        parent=f"{cycle.policy}@{cycle.parent}",
        trigger=cycle.trigger,
        created_at=seconds(cycle.created_at),
        steps=[
            StepResource(state=step.state.value, record=dict(step.record), created_at=seconds(step.created_at))
            for step in cycle.steps
        ],
    )


def dataset_resource(dataset: Dataset) -> DatasetResource:
    return DatasetResource(
        id=dataset.dataset_id,
        policy=dataset.policy,
        path=dataset.path,
        n_train=dataset.n_train,
        n_heldout=dataset.n_heldout,
        counts=dict(dataset.counts),
        dropped=dict(dataset.dropped),
        created_at=seconds(dataset.created_at),
    )


def duel_resource(duel: Duel, picks: int) -> DuelResource:
    return DuelResource(
        id=duel.duel_id,
        cycle_id=duel.cycle_id,
        policy=duel.policy,
        champion=f"{duel.policy}@{duel.champion}",
        challenger=f"{duel.policy}@{duel.challenger}",
        picks=picks,
        opened_at=seconds(duel.opened_at),
        closed_at=None if duel.closed_at is None else seconds(duel.closed_at),
    )


def verdict_resource(at: datetime, verdict: Verdict) -> VerdictResource:
    rate = win_rate(verdict.wins + verdict.ties / 2, verdict.wins + verdict.losses + verdict.ties)
    reasons = [
        ReasonResource(
            rule=reason.rule, passed=reason.passed, text=reason.text, observed=reason.observed, threshold=reason.threshold
        )
        for reason in verdict.reasons
    ]
    return VerdictResource(
        kind=verdict.kind.value,
        text=verdict.text,
        reasons=reasons,
        e_value=verdict.e_value,
        wins=verdict.wins,
        losses=verdict.losses,
        ties=verdict.ties,
        raters=verdict.raters,
        win_rate=rate.mean,
        ci95=(rate.lo, rate.hi),
        created_at=seconds(at),
    )


def gate_resource(cycle_id: str, history: Sequence[tuple[datetime, Verdict]]) -> GateResource:
    shown = [verdict_resource(at, verdict) for at, verdict in history]
    return GateResource(id=cycle_id, cycle_id=cycle_id, verdict=shown[-1], history=shown)


def seconds(at: datetime) -> int:
    return int(at.timestamp())
