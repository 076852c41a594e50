"""Where OpenTelemetry's spans go."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Self
from urllib.parse import urlsplit

from pydantic import field_validator, model_validator

from pairloop.config.section import Section, Share


class OtelSection(Section):
    """OpenTelemetry: spans of chats and cycles, and each pick as an evaluation; figures and names, never a text."""

    endpoint: str | None = None
    """An OTLP/HTTP receiver, such as ``http://localhost:4318``; nothing is recorded without one. Needs the extra ``otel``.
    Headers and certificates are read from OpenTelemetry's own environment variables."""
    service_name: str = "pairloop"
    """The resource's ``service.name``."""
    sample: Share = 1.0
    """Share of the traces begun here that are recorded; a caller's ``traceparent`` decides for its own."""

    @field_validator("endpoint")
    @classmethod
    def _is_a_url(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{value!r} is not the URL of an OTLP/HTTP receiver, such as http://localhost:4318")
        return value

    @model_validator(mode="after")
    def _is_installed(self) -> Self:
        if self.endpoint is not None and not _is_there():
            raise ValueError('endpoint: OpenTelemetry is not installed: pip install "pairloop[otel]", or leave it out')
        return self


def _is_there() -> bool:
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False
