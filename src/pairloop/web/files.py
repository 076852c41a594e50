"""The files of the OpenAI wire: rows to train on come in, results go out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Path, Query, Request, Response, UploadFile
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel

from pairloop.errors import InvalidRequestError
from pairloop.loop import jobs
from pairloop.store import files
from pairloop.store.files import Purpose, StoredFile
from pairloop.web.audit import BY_HAND, Actor
from pairloop.web.context import Here, context_of
from pairloop.web.errors import error_response
from pairloop.web.paging import After
from pairloop.web.resources import seconds


class _OneFile(Request):
    """A form of one file and one field: parts beyond would each be held in memory before anything looks at them."""

    def form(self, **_: Any) -> Any:
        return super().form(max_files=1, max_fields=8)


class _OneFileRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_one_file(request: Request) -> Response:
            return await handle(_OneFile(request.scope, request.receive))

        return handle_one_file


router = APIRouter(tags=["fine-tuning"], route_class=_OneFileRoute)

UPLOAD_PATH = "/v1/files"
_FIELDS = frozenset({"file", "purpose"})
_MEDIA = {Purpose.FINE_TUNE: "application/jsonl", Purpose.RESULTS: "text/csv"}

FileId = Annotated[str, Path(max_length=128)]


class FileResource(BaseModel):
    object: Literal["file"] = "file"
    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    status_details: str | None = None


class FileList(BaseModel):
    """``first_id`` and ``last_id`` are empty where ``data`` is: by OpenAI's schema they are always strings."""

    object: Literal["list"] = "list"
    data: list[FileResource]
    first_id: str
    last_id: str
    has_more: bool


class FileDeleted(BaseModel):
    object: Literal["file"] = "file"
    id: str
    deleted: Literal[True] = True


@router.post(
    UPLOAD_PATH,
    summary="Upload rows to train on (multipart: file, and purpose fine-tune)",
    response_model=FileResource,
    response_model_exclude_none=True,
)
async def upload(
    request: Request, file: Annotated[UploadFile, File()], purpose: Annotated[str, Form(max_length=128)]
) -> FileResource | Response:
    context = context_of(request)
    unknown = sorted(set(await request.form()) - _FIELDS)
    if unknown:
        raise InvalidRequestError(f"Unsupported parameter: '{unknown[0]}' is not supported by this server.", param=unknown[0])
    try:
        kept = await asyncio.to_thread(
            jobs.upload, context.store, context.config, file.file, filename=file.filename or "file", purpose=purpose
        )
    except jobs.TooLarge as error:
        return error_response(413, str(error), param=error.param)
    return file_resource(kept)


@router.get(UPLOAD_PATH, summary="Files, newest first", response_model_exclude_none=True)
def list_files(
    context: Here,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: After = None,
) -> FileList:
    with context.store.reading() as c:
        found = files.list_(c, limit=limit + 1, after=after, purpose=purpose, newest_first=order == "desc")
    shown = [file_resource(file) for file in found[:limit]]
    ends = (shown[0].id, shown[-1].id) if shown else ("", "")
    return FileList(data=shown, first_id=ends[0], last_id=ends[1], has_more=len(found) > limit)


@router.get("/v1/files/{file_id}", summary="One file", response_model_exclude_none=True)
def get_file(file_id: FileId, context: Here) -> FileResource:
    with context.store.reading() as c:
        return file_resource(jobs.get_file(c, file_id))


@router.delete("/v1/files/{file_id}", summary="Delete a file's content, unless a job that has not ended needs it")
def delete_file(file_id: FileId, context: Here, actor: Actor) -> FileDeleted:
    jobs.delete_file(context.store, file_id, actor=actor, reason=BY_HAND)
    return FileDeleted(id=file_id)


@router.get("/v1/files/{file_id}/content", summary="A file's content, as it is", response_class=FileResponse)
def content(file_id: FileId, context: Here) -> FileResponse:
    with context.store.reading() as c:
        file = jobs.get_file(c, file_id)
    return FileResponse(context.store.artifacts.local(file.path), media_type=_MEDIA[file.purpose], filename=file.filename)


def file_resource(file: StoredFile) -> FileResource:
    return FileResource(
        id=file.file_id,
        bytes=file.size,
        created_at=seconds(file.created_at),
        filename=file.filename,
        purpose=file.purpose.value,
        status=file.status.value,
        status_details=file.status_details,
    )
