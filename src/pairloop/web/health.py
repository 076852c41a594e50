"""Health, version and metrics: what an operator's machinery asks."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Response

from pairloop import __version__
from pairloop.policy.protocols import ReplicaState, ReplicaStatus
from pairloop.store import Store, versions
from pairloop.types import BASE_VERSION, Alias
from pairloop.web.context import Here
from pairloop.web.errors import error_response
from pairloop.web.metrics import CONTENT_TYPE

router = APIRouter(tags=["operation"])


@router.get("/health", summary="The process answers and its store can be read")
async def health(context: Here) -> dict[str, Any]:
    champion = await asyncio.to_thread(_champion, context.store, context.policy_name)
    found = {"status": "ok", "policy": context.policy_name, "champion": champion}
    replicas = context.policy.replicas()
    return found | ({"engines": _engines(replicas)} if replicas else {})


@router.get("/health/live", summary="The process answers")
async def live() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/health/ready", summary="The server takes requests; 503 while it drains or has no engine", response_model=None)
async def ready(context: Here) -> Response | dict[str, str]:
    if context.draining:
        return error_response(503, "the server is about to stop", code="draining")
    replicas = context.policy.replicas()
    if replicas and not any(replica.state is ReplicaState.READY for replica in replicas):
        return error_response(503, "no engine is ready", code="engine_unavailable")
    return {"status": "ready"}


@router.get("/version", summary="The version of this program")
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/metrics", summary="Prometheus metrics", response_model=None)
async def metrics(context: Here) -> Response:
    return Response(await asyncio.to_thread(context.metrics.render), media_type=CONTENT_TYPE)


def _engines(replicas: Sequence[ReplicaStatus]) -> dict[str, Any]:
    """Counts only: where the engines are is nobody's business on a public port."""
    states = Counter(replica.state.value for replica in replicas)
    return {**states, "recorded_logps": all(r.recorded for r in replicas if r.state is ReplicaState.READY)}


def _champion(store: Store, policy: str) -> int:
    with store.reading() as c:
        return versions.alias(c, policy, Alias.CHAMPION) or BASE_VERSION
