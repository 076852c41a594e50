"""What ``pairloop worker`` does: turns the loop, tells webhooks, shows metrics, and ends in order."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from pairloop.cli.opening import open_loop
from pairloop.config import load_config
from pairloop.errors import TEXTS
from pairloop.loop.schedule import Scheduler
from pairloop.metrics import exporting, live_registry
from pairloop.telemetry import logs, traces
from pairloop.webhooks import Sender


def work(config_path: Path, metrics_port: int | None, *, say: Callable[[str], None]) -> None:
    """Until SIGTERM or SIGINT: then a training stops at its next step, and leases are given back. A second one ends at once."""
    config = load_config(config_path, begin_log=partial(logs.setup, background=True))
    TEXTS.disabled = not config.privacy.log_texts
    port = config.metrics.port if metrics_port is None else metrics_port
    with ExitStack() as closers:
        loop = closers.enter_context(open_loop(config_path))
        signals: SimpleQueue[int] = SimpleQueue()  # whose put() a signal handler may call at any moment
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda found, _: signals.put(found))
        traces.setup(config.otel)
        closers.callback(traces.use, None)
        scheduler, sender = Scheduler(loop), Sender(loop.store, config, loop.owner)
        if port:
            registry = live_registry(loop.store, config, scheduler.status)
            closers.enter_context(exporting(registry, config.metrics.host, port))
        sender.start()
        closers.callback(sender.stop)
        scheduler.start()
        closers.callback(scheduler.stop)
        say(f"turning the loop of {config.policy.name}")
        signals.get()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: logs.end_at_once())
