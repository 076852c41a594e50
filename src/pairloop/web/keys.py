"""Keys over HTTP: made (the token is shown once), listed, revoked."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from pairloop.client.shapes import KeyResource, NewKeyResource, Page
from pairloop.errors import NotFoundError
from pairloop.store import keys
from pairloop.store.keys import Key, Scope
from pairloop.web.audit import BY_HAND, LATEST_S, Actor
from pairloop.web.context import Here
from pairloop.web.paging import After, Limit, page
from pairloop.web.wire import MAX_INT32, Body, PlainText

router = APIRouter(tags=["keys"])


class KeyBody(Body):
    """A key to be made. ``expires_at`` is in Unix seconds; without it the key stays good until it is revoked."""

    name: PlainText = Field(min_length=1, max_length=keys.LONGEST_NAME, examples=["shop front"])
    scopes: Annotated[list[Annotated[Scope, Field(strict=False)]], Field(min_length=1, max_length=len(Scope))] = Field(
        examples=[["inference", "feedback"]]
    )
    expires_at: int | None = Field(default=None, ge=0, le=LATEST_S)
    requests_per_minute: int | None = Field(default=None, ge=0, le=MAX_INT32)


@router.post("/v1/keys", status_code=201, summary="Make a key; its token is in this reply and nowhere else")
def create_key(body: KeyBody, context: Here, actor: Actor) -> NewKeyResource:
    expires_at = None if body.expires_at is None else datetime.fromtimestamp(body.expires_at, UTC)
    key, token = keys.new(body.name, body.scopes, expires_at=expires_at, requests_per_minute=body.requests_per_minute)
    context.store.write(lambda c: keys.create(c, key, actor=actor, reason=BY_HAND))
    context.keys.forget(key.key_id)
    return NewKeyResource(token=token, **key_resource(key).model_dump())


@router.get("/v1/keys", summary="Keys, newest first")
def list_keys(context: Here, limit: Limit = 20, after: After = None) -> Page[KeyResource]:
    with context.store.reading() as c:
        found = keys.list_(c, after=after, limit=limit + 1)
    return page([key_resource(key) for key in found], limit=limit)


@router.get("/v1/keys/{key_id}", summary="One key")
def get_key(key_id: str, context: Here) -> KeyResource:
    with context.store.reading() as c:
        key = keys.get(c, key_id)
    if key is None:
        raise NotFoundError(f"no key {key_id!r}", param="key_id")
    return key_resource(key)


@router.delete("/v1/keys/{key_id}", summary="Revoke a key, at once and for good")
def revoke_key(key_id: str, context: Here, actor: Actor) -> KeyResource:
    now = datetime.now(UTC)
    key = context.store.write(lambda c: keys.revoke(c, key_id, now, actor=actor, reason=BY_HAND))
    context.keys.forget(key_id)
    return key_resource(key)


def key_resource(key: Key) -> KeyResource:
    def seconds(at: datetime | None) -> int | None:
        return None if at is None else int(at.timestamp())

    return KeyResource(
        id=key.key_id,
        name=key.name,
        scopes=sorted(key.scopes),
        requests_per_minute=key.requests_per_minute,
        created_at=int(key.created_at.timestamp()),
        expires_at=seconds(key.expires_at),
        last_used_at=seconds(key.last_used_at),
        revoked_at=seconds(key.revoked_at),
    )
