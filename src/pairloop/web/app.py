"""The application: wiring, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from pairloop import __version__
from pairloop.config import Config
from pairloop.loop.serve import ChatService
from pairloop.policy.protocols import Policy
from pairloop.store import Store
from pairloop.web import api, chat, errors, evidence, files, fine_tuning, health, pages, picks, stored
from pairloop.web.context import Context, SchedulerLike
from pairloop.web.metrics import Metrics
from pairloop.web.middleware import BodyLimit, Outermost, SameSite
from pairloop.web.status import StatusBoard

DESCRIPTION = "Two answers, a pick, a better model: an OpenAI-compatible server that trains its policy on the picks it records."


def create_app(store: Store, policy: Policy, config: Config, scheduler: SchedulerLike | None) -> FastAPI:
    """The HTTP side of one serving process. Its lifespan starts and stops ``scheduler``; store and policy stay the caller's."""
    metrics = Metrics(store, policy, config.policy.name)
    board = StatusBoard(store, config, scheduler.status if scheduler is not None else dict)
    context = Context(store, policy, config, scheduler, ChatService(store, policy, config), metrics, board)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if scheduler is not None:
            await asyncio.to_thread(scheduler.start)
        try:
            yield
        finally:
            context.draining = True
            if scheduler is not None:
                await asyncio.to_thread(scheduler.stop)

    app = FastAPI(
        title="pairloop", version=__version__, description=DESCRIPTION, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.context = context
    errors.install(app)
    for room in (chat, stored, picks, evidence, files, fine_tuning, api, health, pages):
        app.include_router(room.router)
    pages.mount_static(app)
    # The last one added is the outermost.
    uploads = files.body_limits(config.serve.max_file_bytes)
    app.add_middleware(BodyLimit, limit=config.serve.max_body_bytes, uploads=uploads)
    app.add_middleware(SameSite)
    app.add_middleware(Outermost, metrics=metrics)
    return app
