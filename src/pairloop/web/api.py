"""Our own resources, from policies to gates: listed, got, and what an operator does to them.

Plain functions: FastAPI runs them in its threads, so that no query holds up an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from pydantic import Field
from sqlalchemy import Connection

from pairloop.client.shapes import (
    CycleResource,
    DatasetResource,
    DuelResource,
    GateResource,
    Page,
    PolicyResource,
    Triggered,
    VersionResource,
)
from pairloop.errors import InvalidRequestError, NotFoundError, UserError
from pairloop.formats import Rows, snapshot
from pairloop.loop import cycle as stage
from pairloop.store import audit, cycles, datasets, duels, erasures, groups, triggers, verdicts, versions
from pairloop.store.audit import AuditAction
from pairloop.types import Alias, Dataset, Version
from pairloop.web.audit import BY_HAND, Actor
from pairloop.web.context import Context, Here
from pairloop.web.paging import After, Limit, page
from pairloop.web.resources import (
    cycle_resource,
    dataset_resource,
    duel_resource,
    gate_resource,
    version_resource,
)
from pairloop.web.wire import Body, Text512

router = APIRouter(tags=["loop"])

Format = Annotated[str, Query(max_length=64, description="A family of dataset rows or the trainer that is to read them.")]
SkipRefused = Annotated[bool, Query(description="Leave out what the format cannot hold.")]
_NUMBER = re.compile("0|[1-9][0-9]{0,8}")


class CycleRequest(Body):
    """Ask for a cycle now; where one is running it is kept as the one pending trigger."""

    reason: Text512 | None = Field(default=None, examples=["new tone of voice"])
    policy: Text512 | None = None


class CancelRequest(Body):
    """Why a cycle is ended by hand."""

    reason: Text512 | None = Field(default=None, examples=["the wrong learning rate"])


@router.get("/v1/policies", summary="Policies")
def list_policies(context: Here, limit: Limit = 20, after: After = None) -> Page[PolicyResource]:
    with context.store.reading() as c:
        if after is not None:
            check_policy(context, after, param="after")
        return page([] if after is not None else [_policy(context, c)], limit=limit)


@router.get("/v1/policies/{name}", summary="One policy")
def get_policy(name: str, context: Here) -> PolicyResource:
    check_policy(context, name)
    with context.store.reading() as c:
        return _policy(context, c)


@router.get("/v1/versions", summary="Versions, the base first")
def list_versions(context: Here, limit: Limit = 20, after: After = None) -> Page[VersionResource]:
    with context.store.reading() as c:
        last = None if after is None else version_of(context, c, after, param="after").number
        found = versions.list_(c, context.policy_name, after=last, limit=limit + 1)
        aliases, burdens = _aliases(context, c), erasures.burdens(c, context.policy_name)
    shown = [version_resource(v, aliases.get(v.number, []), burdens.get(v.number)) for v in found]
    return page(shown, limit=limit)


@router.get("/v1/versions/{version_id}", summary="One version, by its name such as support-bot@3")
def getversion_of(version_id: str, context: Here) -> VersionResource:
    with context.store.reading() as c:
        version = version_of(context, c, version_id)
        burden = erasures.burdens(c, context.policy_name).get(version.number)
        return version_resource(version, _aliases(context, c).get(version.number, []), burden)


@router.get("/v1/cycles", summary="Cycles, newest first")
def list_cycles(context: Here, limit: Limit = 20, after: After = None) -> Page[CycleResource]:
    with context.store.reading() as c:
        found = cycles.list_(c, context.policy_name, limit + 1, after=after)
    return page([cycle_resource(cycle) for cycle in found], limit=limit)


@router.get("/v1/cycles/{cycle_id}", summary="One cycle with its steps")
def get_cycle(cycle_id: str, context: Here) -> CycleResource:
    with context.store.reading() as c:
        found = cycles.get(c, cycle_id)
    if found is None:
        raise NotFoundError(f"no cycle {cycle_id!r}", param="cycle_id")
    return cycle_resource(found)


@router.post("/v1/cycles", status_code=202, summary="Run a cycle now")
def run_cycle(context: Here, actor: Actor, body: CycleRequest | None = None) -> Triggered:
    policy = (body.policy if body is not None else None) or context.policy_name
    check_policy(context, policy)
    reason = context.store.kept_words((body.reason if body is not None else None) or BY_HAND)

    def commit(c: Connection) -> None:
        triggers.put(c, policy, reason, datetime.now(UTC))
        audit.record(c, AuditAction.CYCLE_START, actor=actor, subject=policy, reason=reason)

    context.store.write(commit)
    context.notify()
    with context.store.reading() as c:
        running = cycles.current(c, policy)
    return Triggered(policy=policy, reason=reason, running=None if running is None else cycle_resource(running))


@router.post("/v1/cycles/{cycle_id}/cancel", summary="End a cycle as held: its training or duel stops, the champion stays")
def cancel_cycle(cycle_id: str, context: Here, actor: Actor, body: CancelRequest | None = None) -> CycleResource:
    reason = (body.reason if body is not None else None) or BY_HAND
    ended = stage.cancel(context.store, cycle_id, reason=reason, actor=actor, policy=context.policy)
    context.notify()
    return cycle_resource(ended)


@router.get("/v1/datasets", summary="Datasets, newest first")
def list_datasets(context: Here, limit: Limit = 20, after: After = None) -> Page[DatasetResource]:
    with context.store.reading() as c:
        found = datasets.list_(c, context.policy_name, after=after, limit=limit + 1)
    return page([_dataset_resource(context, dataset) for dataset in found], limit=limit)


@router.get("/v1/datasets/{dataset_id}", summary="One dataset: what was kept, and why the rest was not")
def get_dataset(dataset_id: str, context: Here) -> DatasetResource:
    with context.store.reading() as c:
        return _dataset_resource(context, _dataset(c, dataset_id))


@router.post(
    "/v1/datasets/{dataset_id}/export",
    summary="A dataset's training rows as JSON lines, for another trainer or as rows of any family",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}}},
)
def export_dataset(
    dataset_id: str, context: Here, format: Format = "openai", skip_refused: SkipRefused = False
) -> StreamingResponse:
    with context.store.reading() as c:
        dataset = datasets.current(c, _dataset(c, dataset_id).dataset_id)
    if dataset is None:
        raise NotFoundError(f"the rows of {dataset_id} were removed: privacy.keep_days is over", param="dataset_id")
    path = context.store.artifacts.local(dataset.path) / snapshot.TRAIN_FILE

    def lines(rows: Rows) -> Iterator[str]:
        return rows.lines(snapshot.read_rows(path))

    try:
        rows = Rows(format)
        if not skip_refused:
            # Once the first line is out there is no more refusing: so the rows are looked through before.
            for _ in lines(rows):
                pass
            rows.or_raise()
    except UserError as error:
        raise InvalidRequestError(str(error), param="format") from error
    return StreamingResponse(lines(Rows(format)), media_type="application/jsonl")


@router.get("/v1/duels", summary="Duels, newest first: against the champion (gate) and against the base (seed)")
def list_duels(context: Here, limit: Limit = 20, after: After = None) -> Page[DuelResource]:
    with context.store.reading() as c:
        found = duels.list_(c, context.policy_name, limit + 1, after=after, kind=None)
        picks = duels.counts_of_picks(c, [duel.duel_id for duel in found])
    return page([duel_resource(duel, picks.get(duel.duel_id, 0)) for duel in found], limit=limit)


@router.get("/v1/duels/{duel_id}", summary="One duel")
def get_duel(duel_id: str, context: Here) -> DuelResource:
    with context.store.reading() as c:
        found = duels.get(c, duel_id)
        if found is None:
            raise NotFoundError(f"no duel {duel_id!r}", param="duel_id")
        return duel_resource(found, duels.count_picks(c, duel_id))


@router.get("/v1/gates", summary="What the gate said about each cycle's challenger, newest first")
def list_gates(context: Here, limit: Limit = 20, after: After = None) -> Page[GateResource]:
    with context.store.reading() as c:
        found = cycles.with_verdicts(c, context.policy_name, limit + 1, after=after)
        return page([gate_resource(cycle_id, verdicts.for_cycle(c, cycle_id)) for cycle_id in found], limit=limit)


@router.get("/v1/gates/{cycle_id}", summary="All verdicts about one cycle's challenger, with their reasons")
def get_gate(cycle_id: str, context: Here) -> GateResource:
    with context.store.reading() as c:
        history = verdicts.for_cycle(c, cycle_id)
    if not history:
        raise NotFoundError(f"no verdict about a cycle {cycle_id!r}", param="cycle_id")
    return gate_resource(cycle_id, history)


@router.get("/v1/status", summary="Where the loop stands: champion, running cycle, duel, last verdict, curve of versions")
def status(context: Here) -> dict[str, Any]:
    return context.board.read().as_json()


def check_policy(context: Context, name: str, *, param: str = "policy") -> None:
    if name != context.policy_name:
        raise NotFoundError(f"no policy {name!r}; this server has {context.policy_name!r}", param=param)


def _policy(context: Context, c: Connection) -> PolicyResource:
    name, settings = context.policy_name, context.config.policy

    def alias(which: Alias) -> str | None:
        number = versions.alias(c, name, which)
        return None if number is None else f"{name}@{number}"

    return PolicyResource(
        id=name,
        model=settings.model,
        method=settings.method,
        champion=alias(Alias.CHAMPION),
        challenger=alias(Alias.CHALLENGER),
        canary=alias(Alias.CANARY),
        versions=versions.count(c, name),
        groups=groups.count(c, name),
    )


def _aliases(context: Context, c: Connection) -> dict[int, list[str]]:
    """Version number → the aliases that name it."""
    named: dict[int, list[str]] = {}
    for alias in Alias:
        number = versions.alias(c, context.policy_name, alias)
        if number is not None:
            named.setdefault(number, []).append(alias.value)
    return named


def version_of(context: Context, c: Connection, wanted: str, *, param: str = "version") -> Version:
    name, _, number = wanted.rpartition("@")
    found = versions.get(c, name, int(number)) if name == context.policy_name and _NUMBER.fullmatch(number) else None
    if found is None:
        raise NotFoundError(f"no version {wanted!r}", param=param)
    return found


def _dataset_resource(context: Context, dataset: Dataset) -> DatasetResource:
    return dataset_resource(dataset, context.store.artifacts.address(dataset.path))


def _dataset(c: Connection, dataset_id: str) -> Dataset:
    found = datasets.get(c, dataset_id)
    if found is None:
        raise NotFoundError(f"no dataset {dataset_id!r}", param="dataset_id")
    return found
