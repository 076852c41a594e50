"""Who is told when something happened."""

from __future__ import annotations

from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from pairloop.config.section import Section, Share, duration_s

EventName = Literal[
    "cycle.started",
    "cycle.ended",
    "duel.opened",
    "gate.held",
    "version.promoted",
    "version.rolled_back",
    "guard.broken",
    "run.failed",
    "backup.taken",
    "disk.low",
    "doctor.problem",
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "webhook.test",
]
"""What may happen; ``webhook.test`` is what `pairloop webhooks test` sends."""


class WebhookEndpoint(Section):
    """One receiver."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """What log, metrics and `pairloop webhooks` call it. Another name is another endpoint, which is told what happens from then
    on."""
    url: str
    """Where its requests go; redirects are not followed."""
    secret_env: str
    """Name of the environment variable that holds the key of its signatures: ``whsec_`` and base64, or any text."""
    events: tuple[EventName, ...] = ()
    """Which events it is told; empty is all of them."""

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{value!r} is not a URL, such as https://hooks.example/pairloop")
        return value


class WebhooksSection(Section):
    """Who is told of cycles, promotions, failures and jobs, by signed requests (Standard Webhooks), sent until taken."""

    endpoints: tuple[WebhookEndpoint, ...] = ()
    """Receivers, each a table ``[[webhooks.endpoints]]`` with ``name``, ``url``, ``secret_env`` (the name of the environment
    variable that holds its key) and, where it does not want all, ``events``."""
    timeout: str = "10s"
    """How long a receiver may take to answer."""
    give_up: str = "24h"
    """How long a delivery is tried again, less and less often, before it counts as failed."""
    disk_low: Share = 0.1
    """Share of the state directory's or the artifacts' disk below which ``disk.low`` is sent."""

    @field_validator("timeout", "give_up")
    @classmethod
    def _durations(cls, value: str) -> str:
        duration_s(value)
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [endpoint.name for endpoint in self.endpoints]
        if len(set(names)) < len(names):
            raise ValueError("endpoints: two have the same name")
        return self
