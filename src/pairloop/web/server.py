"""The serving process: opens store, policy and scheduler, listens, says so in one line, and ends in order."""

from __future__ import annotations

import asyncio
import errno
import gc
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager

import uvicorn
from fastapi import FastAPI

from pairloop.config import Config, duration_s, is_loopback
from pairloop.errors import TEXTS, ConfigError
from pairloop.loop.cycle import Loop, ensure_base
from pairloop.loop.schedule import Scheduler
from pairloop.policy.engine import open_policy
from pairloop.store import Store, accounts
from pairloop.telemetry import logs, traces
from pairloop.web.allocator import share_arenas
from pairloop.web.app import create_app
from pairloop.web.context import Context
from pairloop.web.status import Status
from pairloop.webhooks import Sender

logger = logging.getLogger(__name__)

CUT_S = 5.0
"""How long requests that were cut off at the end of ``serve.drain`` may take to tell their clients."""


def run(config: Config, *, turning: bool = True, say: Callable[[str], None] = print) -> None:
    """Serve until SIGTERM or SIGINT; returns after a graceful end. ConfigError where host or port cannot be listened on.

    ``turning`` False leaves cycles and jobs, also those that were begun, to workers.
    """
    share_arenas()  # before the first thread
    TEXTS.disabled = not config.privacy.log_texts
    with ExitStack() as closers:
        listener = closers.enter_context(closing(listen(config.serve.host, config.serve.port)))
        store = closers.enter_context(Store.open(config))
        refuse_open_doors(store, config)
        store.artifacts.reach()
        policy = closers.enter_context(closing(open_policy(config, fetch=store.artifacts.hold)))
        ensure_base(store, policy, config)
        owner = f"{socket.gethostname()}:{os.getpid()}"
        scheduler = Scheduler(Loop(store, policy, config, owner=owner)) if turning else None
        traces.setup(config.otel)
        closers.callback(traces.use, None)
        app = create_app(store, policy, config, scheduler)
        sender = Sender(store, config, owner)
        sender.start()
        closers.callback(sender.stop)
        Server(app, lambda: say(f"pairloop is listening on {url_of(listener)}")).run(sockets=[listener])
        logger.info("stopped")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. ConfigError names what is wrong, and with which port."""
    family, address = _address(host)
    # With the protocol named, asyncio turns off Nagle on what it accepts; without, each answer waits 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            hint = "another process listens there; stop it, or choose another port with --port (0 takes a free one)"
            raise ConfigError(f"port {port} on {host} is in use: {hint}") from error
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def refuse_open_doors(store: Store, config: Config) -> None:
    """ConfigError where other machines could reach a server without keys and accounts: they could train and roll back."""
    host, names, proxies = config.serve.host, config.serve.allowed_hosts, config.serve.trusted_proxies
    if is_loopback(host) and not names and not proxies:
        return
    with store.reading() as c:
        if accounts.is_locked(c):
            return
    what = f"serve.allowed_hosts = {list(names)}" if names else f"serve.trusted_proxies = {list(proxies)}"
    what = what if is_loopback(host) else f"serve.host = {host!r} is not loopback and"
    raise ConfigError(
        f"{what} opens the server to others, and it has no API key and no account yet: make one with `pairloop keys create "
        "--scope admin` or `pairloop accounts create NAME --role admin`, or "
        'leave serve.host at "127.0.0.1", and serve.allowed_hosts and serve.trusted_proxies empty'
    )


def _address(host: str) -> tuple[socket.AddressFamily, str]:
    """Family and address of a host."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as error:
        raise ConfigError(f"serve.host = {host!r} is not an address; use 127.0.0.1, ::1, localhost or 0.0.0.0") from error
    return (socket.AF_INET6 if address.version == 6 else socket.AF_INET), str(address)


def freeze() -> None:
    """Take what is there from now on for good: libraries, routes and weights are not searched for garbage again.

    Without this each full collection walks through all of it, and no request is answered for 80 ms (with torch, for longer).
    """
    gc.collect()
    gc.freeze()


class Server(uvicorn.Server):
    """uvicorn with our own signals: the first one drains and ends, the second one ends at once.

    Draining: ``/health/ready`` says 503, and requests are taken for ``serve.drain_delay``; then nobody can connect, answers
    under way have ``serve.drain`` to end, and those that do not are told so. A training stops at its next step meanwhile.
    """

    def __init__(self, app: FastAPI, listening: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="auto",  # uvloop and httptools, which are dependencies wherever they exist
                http="auto",
                log_config=None,
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=round(duration_s(app.state.context.config.serve.drain) + CUT_S),
                server_header=False,
                proxy_headers=False,  # serve.trusted_proxies, in the application
                ws="none",
            )
        )
        self._context: Context = app.state.context
        self._listening = listening
        self._first_look: asyncio.Task[Status] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            freeze()
            self._listening()
            # Who comes first need not wait until the picks that no dataset has are counted: of 90,000 for 0.1 s of CPU.
            self._first_look = asyncio.create_task(asyncio.to_thread(self._context.board.read))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self._first_look is not None:
            await asyncio.gather(self._first_look, return_exceptions=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        context = self._context
        if context.draining:
            logs.end_at_once()
        context.drain()
        logger.info("draining")
        if context.scheduler is not None:  # the step under way and a checkpoint take their time: they begin now
            threading.Thread(target=context.scheduler.stop, name="stopping", daemon=True).start()
        asyncio.get_running_loop().call_later(context.config.serve.drain_delay_s, self._close)

    def _close(self) -> None:
        self.should_exit = True
        asyncio.get_running_loop().call_later(duration_s(self._context.config.serve.drain), self._cut)

    def _cut(self) -> None:
        cut = self._context.service.cut()
        if cut:
            logger.warning("%d answers had not ended within serve.drain, and were cut off", cut)
