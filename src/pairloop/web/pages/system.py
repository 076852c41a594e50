"""Health: what is well, what needs care, and what to do about it; and the doctor, where somebody asks for him."""

from __future__ import annotations

import asyncio
import platform
from typing import Any

from fastapi import APIRouter, Request, Response

from pairloop.errors import StoreError
from pairloop.store import audit
from pairloop.store.audit import AuditAction, AuditEntry
from pairloop.web.checks import Check, checks, worst
from pairloop.web.context import Context, Here
from pairloop.web.pages.rendering import PageRoute, page

WORDS = {"ok": "All is well", "warn": "Something needs care", "bad": "Something is broken"}

router = APIRouter(include_in_schema=False, route_class=PageRoute)


@router.get("/system")
async def system_page(request: Request, context: Here) -> Response:
    found = await asyncio.to_thread(checks, context)
    state = worst(found)
    values: dict[str, Any] = {
        "checks": sorted(found, key=_order),
        "state": state,
        "verdict": WORDS[state],
        "doctor": context.doctor.finding,
    }
    values |= {"errors": errors_by_code(context), "python": platform.python_version(), "repairs": await _repairs(context)}
    return page(request, context, "system.html", title="Health", **values)


def errors_by_code(context: Context) -> list[tuple[str, int]]:
    """Errors that clients were told since this process began, the most frequent first."""
    samples = (sample for family in context.metrics.errors.collect() for sample in family.samples)
    counted = [(sample.labels["code"], int(sample.value)) for sample in samples if sample.name.endswith("_total")]
    return sorted((one for one in counted if one[1]), key=lambda one: (-one[1], one[0]))


def _order(check: Check) -> int:
    return ("bad", "warn", "ok").index(check.state)


async def _repairs(context: Context) -> list[AuditEntry]:
    """The newest ones; none where the store cannot be read, which the checks tell."""

    def read() -> list[AuditEntry]:
        try:
            with context.store.reading() as c:
                return audit.list_(c, limit=3, action=AuditAction.REPAIR)
        except StoreError:
            return []

    return await asyncio.to_thread(read)
