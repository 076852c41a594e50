"""The doctor over HTTP: it looks and reports; repairs are `pairloop doctor --repair`'s, at the machine itself."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from pairloop.web.context import Here
from pairloop.web.examination import Finding
from pairloop.web.resources import seconds

router = APIRouter(tags=["operation"])

WAIT_S = 20.0
"""So long the request waits for the visit's end, which goes on by itself."""


class ProblemResource(BaseModel):
    """A finding: its code, in words, what `--repair` would do about it and what is left to a person."""

    code: str
    text: str
    repair: str | None
    by_hand: str


class ExaminationResource(BaseModel):
    """The last visit; `took_s` is what it took, or has taken so far."""

    object: Literal["doctor"] = "doctor"
    status: Literal["never", "running", "done", "failed"]
    began_at: int | None
    took_s: float
    problems: list[ProblemResource]
    error: str | None


@router.post("/v1/doctor", summary="Check the store as `pairloop doctor` does, and report; nothing is repaired")
async def examine(context: Here) -> ExaminationResource:
    """Answers after 20 seconds at the latest, with status `running` where it takes longer; one visit at a time."""
    visit = asyncio.wrap_future(context.doctor.begin(context.store))
    await asyncio.wait({visit}, timeout=WAIT_S)
    return _resource(context.doctor.finding)


@router.get("/v1/doctor", summary="What the doctor's last visit to this process found")
async def last_examination(context: Here) -> ExaminationResource:
    return _resource(context.doctor.finding)


def _resource(found: Finding) -> ExaminationResource:
    problems = [ProblemResource(code=one.code, text=one.text, repair=one.repair, by_hand=one.by_hand) for one in found.problems]
    return ExaminationResource(
        status=found.status,
        began_at=None if found.began_at is None else seconds(found.began_at),
        took_s=found.took_s,
        problems=problems,
        error=found.error,
    )
