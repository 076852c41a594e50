"""How our own resources are made from rows; their shapes are ``pairloop.client.shapes``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from pairloop.client.shapes import (
    CycleResource,
    DatasetResource,
    DuelResource,
    GateResource,
    GuardsResource,
    QuarantineResource,
    RaterResource,
    ReasonResource,
    StepResource,
    VerdictResource,
    VersionResource,
)
from pairloop.loop.deploy import Standing
from pairloop.loop.gate import win_rate
from pairloop.loop.serve import pool_of
from pairloop.store.erasures import Burden
from pairloop.store.quarantines import Quarantine
from pairloop.store.raters import Rater
from pairloop.types import Cycle, Dataset, Duel, Reason, Verdict, Version


def version_resource(version: Version, aliases: Sequence[str], burden: Burden | None = None) -> VersionResource:
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
        erased_rows=burden.rows if burden is not None else 0,
        erased_ancestors=[f"{version.policy}@{number}" for number in burden.ancestors] if burden is not None else [],
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


def dataset_resource(dataset: Dataset, address: str) -> DatasetResource:
    """``address``: where the folder lies for everybody (`Artifacts.address`)."""
    return DatasetResource(
        id=dataset.dataset_id,
        policy=dataset.policy,
        path=address,
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
        kind=duel.kind.value,
        champion=f"{duel.policy}@{duel.champion}",
        challenger=f"{duel.policy}@{duel.challenger}",
        picks=picks,
        opened_at=seconds(duel.opened_at),
        closed_at=None if duel.closed_at is None else seconds(duel.closed_at),
    )


def verdict_resource(at: datetime, verdict: Verdict) -> VerdictResource:
    rate = win_rate(verdict.wins + verdict.ties / 2, verdict.wins + verdict.losses + verdict.ties)
    reasons = [_reason(reason) for reason in verdict.reasons]
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


def _reason(reason: Reason) -> ReasonResource:
    return ReasonResource(
        rule=reason.rule, passed=reason.passed, text=reason.text, observed=reason.observed, threshold=reason.threshold
    )


def gate_resource(cycle_id: str, history: Sequence[tuple[datetime, Verdict]]) -> GateResource:
    shown = [verdict_resource(at, verdict) for at, verdict in history]
    return GateResource(id=cycle_id, cycle_id=cycle_id, verdict=shown[-1], history=shown)


def guards_resource(name: str, found: Standing | None) -> GuardsResource:
    if found is None:
        return GuardsResource(id=name, version=None, former=None, answers=0, since=None, broken=None, reasons=[])
    return GuardsResource(
        id=name,
        version=f"{name}@{found.version}",
        former=f"{name}@{found.former}",
        answers=found.answers,
        since=seconds(found.since),
        broken=found.broken,
        reasons=[_reason(reason) for reason in found.reasons],
    )


def quarantine_resource(quarantine: Quarantine | None) -> QuarantineResource | None:
    return (
        None if quarantine is None else QuarantineResource(reason=quarantine.reason, created_at=seconds(quarantine.created_at))
    )


def rater_resource(rater: Rater, gate_share: float, quarantine: Quarantine | None) -> RaterResource:
    return RaterResource(
        id=rater.rater_id,
        pool=pool_of(rater.rater_id, gate_share).value,
        feedback=rater.feedback,
        first_at=seconds(rater.first_at),
        last_at=seconds(rater.last_at),
        quarantine=quarantine_resource(quarantine),
    )


def seconds(at: datetime) -> int:
    return int(at.timestamp())
