"""What a process says of itself while it runs: its log and its metrics."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pairloop.config.section import Section


class LogSection(Section):
    """The log: on standard error or in a file, as text or as one JSON object a line; never a message, an answer or a key."""

    format: Literal["text", "json"] = "text"
    """``json``: one object a line, with time (UTC), level, logger, message, and fields such as request_id, policy and cycle."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged; ``info`` has a line for each request, ``warning`` has none."""
    file: str | None = None
    """Where it goes instead of standard error; opened anew when it was moved away, as logrotate does."""


class MetricsSection(Section):
    """Prometheus metrics: of `pairloop serve` at ``/metrics``, of `pairloop worker` on a port of its own."""

    port: int = Field(default=0, ge=0, le=65535)
    """Port of a worker's ``/metrics``, on loopback; 0 is none."""
    host: str = "127.0.0.1"
    """Address of a worker's ``/metrics``. It asks for no key: beyond loopback only on a private network."""
