"""The application: wiring, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from pairloop import __version__
from pairloop.config import Config, duration_s, is_loopback
from pairloop.loop.cycle import Unloader
from pairloop.loop.serve import ChatService
from pairloop.policy.protocols import Policy
from pairloop.store import Store
from pairloop.web import (
    accounts,
    afterwards,
    api,
    audit,
    chat,
    deployment,
    doctor,
    erasures,
    errors,
    evidence,
    exports,
    files,
    fine_tuning,
    groups,
    health,
    keys,
    login,
    openapi,
    pages,
    picks,
    queue,
    raters,
    replays,
    schedules,
    stored,
)
from pairloop.web.access import Access, InFlight
from pairloop.web.context import Context, SchedulerLike
from pairloop.web.idempotency import Idempotency
from pairloop.web.keyring import KeyRing
from pairloop.web.metrics import Metrics
from pairloop.web.middleware import BodyLimit, Outermost, Sites
from pairloop.web.overview import OverviewBoard
from pairloop.web.pages.docs import mount_static
from pairloop.web.proxies import Proxies
from pairloop.web.scopes import undeclared
from pairloop.web.short_way import ShortWay
from pairloop.web.status import StatusBoard

DESCRIPTION = "Two answers, a pick, a better model: an OpenAI-compatible server that trains its policy on the picks it records."
EXPOSED = (
    "x-request-id",
    "openai-processing-ms",
    "retry-after",
    "x-should-retry",
    "x-pairloop-model-version",
    "x-pairloop-overhead-ms",
)
"""Headers that a page of serve.allowed_origins may read."""


def create_app(store: Store, policy: Policy, config: Config, scheduler: SchedulerLike | None) -> FastAPI:
    """The HTTP side of one serving process. Its lifespan starts and stops ``scheduler``; store and policy stay the caller's."""
    scheduling = scheduler.status if scheduler is not None else dict
    metrics = Metrics(store, policy, config, scheduling)
    board = StatusBoard(store, config, scheduling)
    ring = KeyRing(store)
    overview = OverviewBoard(store, config, metrics)
    context = Context(store, policy, config, scheduler, ChatService(store, policy, config), metrics, board, ring, overview)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if scheduler is not None:
            await asyncio.to_thread(scheduler.start)
        beside = [asyncio.create_task(context.service.recorder.keep_flushing())]
        if scheduler is None:  # which looks itself
            looking = Unloader(store, policy, config).keep_looking(duration_s(config.schedule.poll))
            beside.append(asyncio.create_task(looking))
        try:
            yield
        finally:
            context.drain()
            await context.service.shadows_cast()
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            if scheduler is not None:
                await asyncio.to_thread(scheduler.stop)

    app = FastAPI(
        title="pairloop", version=__version__, description=DESCRIPTION, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.context = context
    errors.install(app, pages.rendering.error_page)
    mount_static(app)
    for room in (
        chat,
        stored,
        picks,
        groups,
        evidence,
        exports,
        afterwards,
        files,
        fine_tuning,
        api,
        audit,
        deployment,
        doctor,
        erasures,
        queue,
        raters,
        replays,
        schedules,
        keys,
        accounts,
        health,
        *pages.PAGES,
        login,
    ):
        # As they are: include_router builds every route once more, a tenth of a second of the first requests' time.
        app.router.routes.extend(room.router.routes)
    if missing := undeclared(app.routes):
        raise AssertionError(f"web/scopes.py does not say which scope opens {', '.join(missing)}")
    openapi.install(app)
    _add_layers(app, context)
    return app


def _add_layers(app: FastAPI, context: Context) -> None:
    """Between server and routes. The last one added is the outermost: what is to be refused is refused before it costs."""
    serve, store = context.config.serve, context.store
    app.add_middleware(ShortWay, context=context, shortcuts=picks.SHORTCUTS)
    app.add_middleware(Idempotency, store=store)
    app.add_middleware(
        BodyLimit,
        limit=serve.max_body_bytes,
        upload_limit=serve.max_file_bytes,
        timeout_s=duration_s(serve.body_timeout),
    )
    app.add_middleware(InFlight, limit=serve.queue_limit, store=store)
    app.add_middleware(
        Access, ring=context.keys, requests_per_minute=serve.requests_per_minute, error_page=pages.rendering.error_page
    )
    if serve.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=serve.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
            max_age=3600,
        )
    app.add_middleware(Sites, hosts=serve.allowed_hosts, origins=serve.allowed_origins, beyond=not is_loopback(serve.host))
    app.add_middleware(Outermost, metrics=context.metrics)
    app.add_middleware(Proxies, trusted=serve.trusted_proxies)
