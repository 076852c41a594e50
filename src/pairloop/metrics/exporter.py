"""A worker's ``/metrics``: a small server of its own, for a process that answers nothing else."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from pairloop.errors import ConfigError


@contextmanager
def exporting(registry: CollectorRegistry, host: str, port: int) -> Iterator[int]:
    """Serve the registry while the block runs; the port. ConfigError where it cannot be listened on."""
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        why = "another process listens there" if error.errno == errno.EADDRINUSE else error.strerror
        raise ConfigError(f"metrics.port = {port} on {host}: {why}; choose another one, or 0 for none") from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
