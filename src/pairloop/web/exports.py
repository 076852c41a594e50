"""A version to take elsewhere: its files with model card and lineage, as one archive."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import StreamingResponse

from pairloop.loop import export
from pairloop.web.api import version_of
from pairloop.web.context import Here

router = APIRouter(tags=["loop"])
TAR = "application/x-tar"


@router.get(
    "/v1/exports/{version_id}",
    summary="A version's files as a tar archive: adapter or model, its model card and lineage",
    response_class=StreamingResponse,
    responses={200: {"content": {TAR: {"schema": {"type": "string", "format": "binary"}}}}},
)
def export_version(
    version_id: str,
    context: Here,
    base: Annotated[str | None, Query(max_length=255, description="How files and card call the base model.")] = None,
) -> StreamingResponse:
    """What `pairloop versions export` writes into a folder; merging, which takes the base into memory, is left to that command.

    Every file is checked against its hash before the first byte is sent: what is broken is told, as a 500. A version whose
    weights were removed is 404.
    """
    with context.store.reading() as c:
        version = version_of(context, c, version_id)
    found = export.stream(context.store, context.config, version, base_name=base)
    headers = {"content-disposition": f'attachment; filename="{found.name}"', "content-length": str(found.size)}
    return StreamingResponse(found.pieces(), media_type=TAR, headers=headers)
