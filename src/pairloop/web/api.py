"""Our own resources: policies, versions, cycles, datasets, duels and gates; and the few things an operator does to them.

Plain functions: FastAPI runs them in its threads, so that no query holds up an answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from sqlalchemy import Connection

from pairloop.errors import InvalidRequestError, NotFoundError, UserError
from pairloop.formats import Rows, snapshot
from pairloop.loop import deploy
from pairloop.store import cycles, datasets, duels, groups, triggers, verdicts, versions
from pairloop.store.versions import Promotion
from pairloop.types import Alias, Dataset
from pairloop.web.context import Context, Here
from pairloop.web.resources import (
    CycleResource,
    DatasetResource,
    DuelResource,
    GateResource,
    Page,
    PolicyResource,
    VersionResource,
    cycle_resource,
    dataset_resource,
    duel_resource,
    gate_resource,
    page,
    version_resource,
)
from pairloop.web.wire import Body, Text512

router = APIRouter(tags=["loop"])

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(max_length=128)]
EVERYTHING = 1_000_000
BY_HAND = "by hand, over the API"


class CycleRequest(Body):
    """Ask for a cycle now; where one is running it is kept as the one pending trigger."""

    reason: Text512 | None = None
    policy: Text512 | None = None


class MoveRequest(Body):
    """Why an alias is moved by hand."""

    reason: Text512 | None = None


class RollbackRequest(MoveRequest):
    """``to`` defaults to the champion before the present one."""

    to: int | None = Field(default=None, ge=0)


class Triggered(BaseModel):
    object: str = "cycle.trigger"
    policy: str
    reason: str
    running: CycleResource | None


class Moved(BaseModel):
    object: str = "promotion"
    action: str
    champion: str
    previous: str | None
    reason: str


@router.get("/v1/policies", summary="Policies")
def list_policies(context: Here, limit: Limit = 20, after: After = None) -> Page[PolicyResource]:
    with context.store.reading() as c:
        return page([_policy(context, c)], limit=limit, after=after)


@router.get("/v1/policies/{name}", summary="One policy")
def get_policy(name: str, context: Here) -> PolicyResource:
    _check_policy(context, name)
    with context.store.reading() as c:
        return _policy(context, c)


@router.post("/v1/policies/{name}/rollback", summary="Make an earlier champion the champion again")
def rollback(name: str, context: Here, body: RollbackRequest | None = None) -> Moved:
    _check_policy(context, name)
    to, reason = (body.to, body.reason) if body is not None else (None, None)
    moved = deploy.rollback(context.store, name, to=to, reason=reason or BY_HAND, policy=context.policy)
    context.notify()
    return _moved(moved)


@router.get("/v1/versions", summary="Versions, the base first")
def list_versions(context: Here, limit: Limit = 20, after: After = None) -> Page[VersionResource]:
    with context.store.reading() as c:
        return page(_versions(context, c), limit=limit, after=after)


@router.get("/v1/versions/{version_id}", summary="One version, by its name such as support-bot@3")
def get_version(version_id: str, context: Here) -> VersionResource:
    with context.store.reading() as c:
        return _one(_versions(context, c), version_id, "version")


@router.post("/v1/versions/{version_id}/promote", summary="Make a version the champion, past the gate")
def promote(version_id: str, context: Here, body: MoveRequest | None = None) -> Moved:
    with context.store.reading() as c:
        number = _one(_versions(context, c), version_id, "version").number
    reason = (body.reason if body is not None else None) or BY_HAND
    moved = deploy.promote_by_hand(context.store, context.policy, context.policy_name, number=number, reason=reason)
    context.notify()
    return _moved(moved)


@router.get("/v1/cycles", summary="Cycles, newest first")
def list_cycles(context: Here, limit: Limit = 20, after: After = None) -> Page[CycleResource]:
    with context.store.reading() as c:
        found = cycles.list_(c, context.policy_name, EVERYTHING if after else limit + 1)
    return page([cycle_resource(cycle) for cycle in found], limit=limit, after=after)


@router.get("/v1/cycles/{cycle_id}", summary="One cycle with its steps")
def get_cycle(cycle_id: str, context: Here) -> CycleResource:
    with context.store.reading() as c:
        found = cycles.get(c, cycle_id)
    if found is None:
        raise NotFoundError(f"no cycle {cycle_id!r}", param="cycle_id")
    return cycle_resource(found)


@router.post("/v1/cycles", status_code=202, summary="Run a cycle now")
def run_cycle(context: Here, body: CycleRequest | None = None) -> Triggered:
    policy = (body.policy if body is not None else None) or context.policy_name
    _check_policy(context, policy)
    reason = (body.reason if body is not None else None) or BY_HAND
    context.store.write(lambda c: triggers.put(c, policy, reason, datetime.now(UTC)))
    context.notify()
    with context.store.reading() as c:
        running = cycles.current(c, policy)
    return Triggered(policy=policy, reason=reason, running=None if running is None else cycle_resource(running))


@router.get("/v1/datasets", summary="Datasets, newest first")
def list_datasets(context: Here, limit: Limit = 20, after: After = None) -> Page[DatasetResource]:
    with context.store.reading() as c:
        found = datasets.list_(c, context.policy_name)
    return page([dataset_resource(dataset) for dataset in found], limit=limit, after=after)


@router.get("/v1/datasets/{dataset_id}", summary="One dataset: what was kept, and why the rest was not")
def get_dataset(dataset_id: str, context: Here) -> DatasetResource:
    return dataset_resource(_dataset(context, dataset_id))


@router.post(
    "/v1/datasets/{dataset_id}/export",
    summary="A dataset's training rows as JSON lines, for another trainer or as rows of any family",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}}},
)
def export_dataset(
    dataset_id: str,
    context: Here,
    format_name: Annotated[str, Query(alias="format", max_length=64)] = "openai",
    skip_refused: Annotated[bool, Query(description="Leave out what the format cannot hold.")] = False,
) -> StreamingResponse:
    path = Path(_dataset(context, dataset_id).path) / snapshot.TRAIN_FILE

    def lines(rows: Rows) -> Iterator[str]:
        return rows.lines(snapshot.read(path))

    try:
        rows = Rows(format_name)
        if not skip_refused:
            # Once the first line is out there is no more refusing: so the rows are looked through before.
            for _ in lines(rows):
                pass
            rows.or_raise()
    except UserError as error:
        raise InvalidRequestError(str(error), param="format") from error
    return StreamingResponse(lines(Rows(format_name)), media_type="application/jsonl")


@router.get("/v1/duels", summary="Duels, newest first")
def list_duels(context: Here, limit: Limit = 20, after: After = None) -> Page[DuelResource]:
    with context.store.reading() as c:
        found = duels.list_(c, context.policy_name, EVERYTHING if after else limit + 1)
        shown = [duel_resource(duel, duels.count_picks(c, duel.duel_id)) for duel in found]
    return page(shown, limit=limit, after=after)


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
        histories = [(cycle.cycle_id, verdicts.for_cycle(c, cycle.cycle_id)) for cycle in cycles.list_(c, context.policy_name)]
    return page([gate_resource(cycle_id, history) for cycle_id, history in histories if history], limit=limit, after=after)


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


def _dataset(context: Context, dataset_id: str) -> Dataset:
    with context.store.reading() as c:
        found = datasets.get(c, dataset_id)
    if found is None:
        raise NotFoundError(f"no dataset {dataset_id!r}", param="dataset_id")
    return found


def _check_policy(context: Context, name: str) -> None:
    if name != context.policy_name:
        raise NotFoundError(f"no policy {name!r}; this server has {context.policy_name!r}", param="policy")


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
        versions=len(versions.list_(c, name)),
        groups=groups.count(c, name),
    )


def _versions(context: Context, c: Connection) -> list[VersionResource]:
    name = context.policy_name
    named = {alias.value: versions.alias(c, name, alias) for alias in Alias}
    return [
        version_resource(version, [alias for alias, number in named.items() if number == version.number])
        for version in versions.list_(c, name)
    ]


def _one(found: list[VersionResource], wanted: str, what: str) -> VersionResource:
    for item in found:
        if item.id == wanted:
            return item
    raise NotFoundError(f"no {what} {wanted!r}", param=what)


def _moved(moved: Promotion) -> Moved:
    return Moved(
        action=moved.action,
        champion=f"{moved.policy}@{moved.number}",
        previous=None if moved.previous is None else f"{moved.policy}@{moved.previous}",
        reason=moved.reason,
    )
