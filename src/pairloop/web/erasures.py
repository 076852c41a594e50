"""Erasures over HTTP: a person's words and picks are erased, and what was erased can be looked up (never who)."""

from __future__ import annotations

from typing import Self

from fastapi import APIRouter
from pydantic import Field, model_validator

from pairloop.client.shapes import ErasureResource, Page
from pairloop.errors import NotFoundError
from pairloop.loop import privacy
from pairloop.loop.privacy import Effect
from pairloop.store import erasures
from pairloop.store.erasures import Erasure
from pairloop.web.audit import Actor
from pairloop.web.context import Here
from pairloop.web.paging import After, Limit, page
from pairloop.web.resources import seconds
from pairloop.web.wire import Body, Text512, field_error

router = APIRouter(tags=["erasures"])


class ErasureBody(Body):
    """Who is erased: a `user` of requests or a `rater` of picks (the same ids). `reason` is kept, so it should name nobody."""

    user: Text512 | None = None
    rater: Text512 | None = None
    reason: Text512 = Field(default="asked to be erased", examples=["request of 27 November"])
    dryrun: bool = False

    @model_validator(mode="after")
    def _one_person(self) -> Self:
        if (self.user is None) == (self.rater is None):
            raise field_error("user", "name either a user or a rater")
        return self


@router.post("/v1/erasures", status_code=201, summary="Erase a person: their words, their picks, and what rests on them")
def erase(body: ErasureBody, context: Here, actor: Actor) -> ErasureResource:
    """Groups they asked for lose their texts, what they said of any answer is deleted, datasets lose the rows that rest on
    either, and versions that had been trained on these are marked. `dryrun` says what it would take. An id is looked for as it
    is and as its pseudonym; an operator is the `user` whom the audit trail names (`account:ada`), and a customer whose id has
    that form is named as `rater`. 409 where `user` could be either: then the operator is `operator:account:ada`.

    409 also while that account can still sign in, and while a cycle builds, trains or measures. Later requests of theirs are
    served as anybody's.
    """
    person = privacy.person_of(context.store, context.config, user=body.user, rater=body.rater)
    if body.dryrun:
        return _of_effect(privacy.preview(context.store, context.config, person), None)
    effect = privacy.erase(context.store, context.config, person, reason=body.reason, actor=actor)
    context.notify()
    return _of_effect(effect, body.reason)


@router.get("/v1/erasures", summary="Erasures, newest first")
def list_erasures(context: Here, limit: Limit = 20, after: After = None) -> Page[ErasureResource]:
    with context.store.reading() as c:
        if after is not None and erasures.get(c, after) is None:
            raise NotFoundError(f"no erasure {after!r}", param="after")
        found = erasures.list_(c, after=after, limit=limit + 1)
    return page([_of_row(one) for one in found], limit=limit)


@router.get("/v1/erasures/{erasure_id}", summary="One erasure, with the versions that had seen the person")
def get_erasure(erasure_id: str, context: Here) -> ErasureResource:
    with context.store.reading() as c:
        found = erasures.get(c, erasure_id)
        marks = erasures.marks(c, context.policy_name)
    if found is None:
        raise NotFoundError(f"no erasure {erasure_id!r}", param="erasure_id")
    shown = _of_row(found)
    shown.versions = {f"{mark.policy}@{mark.number}": mark.rows for mark in marks if mark.erasure_id == erasure_id}
    return shown


def _of_effect(effect: Effect, reason: str | None) -> ErasureResource:
    return ErasureResource(
        id=effect.erasure_id,
        reason=reason if effect.erasure_id is not None else None,
        counts=dict(effect.counts),
        versions=dict(effect.versions),
        datasets=dict(effect.datasets),
        scrubbed=effect.is_scrubbed if effect.erasure_id is not None else None,
        created_at=seconds(effect.created_at) if effect.created_at is not None else None,
    )


def _of_row(one: Erasure) -> ErasureResource:
    return ErasureResource(id=one.erasure_id, reason=one.reason, counts=dict(one.counts), created_at=seconds(one.created_at))
