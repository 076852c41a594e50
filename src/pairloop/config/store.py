"""Where evidence and artifacts live, and when a write counts as done."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pairloop.config.artifacts import check_place
from pairloop.config.section import Section, duration_s

Durability = Literal["commit", "group", "async"]


class StoreSection(Section):
    """Where evidence and artifacts live."""

    database: str | None = None
    """SQLAlchemy URL; by default SQLite in the state directory."""
    artifacts: str | None = None
    """Folder of datasets and versions, or a URL such as ``s3://bucket/pairloop`` where several machines share them; by default
    ``artifacts`` in the state directory."""
    artifacts_options: dict[str, Any] = Field(default={})
    """What fsspec is told of that URL, such as ``{endpoint_url = "http://minio:9000"}``; never a secret: those come from the
    environment, as everywhere on AWS."""
    artifacts_cache_gb: float = Field(default=20.0, gt=0)
    """Of what lies at a URL, so much is kept in ``cache`` in the state directory; the longest unused goes first."""
    artifacts_checkpoints: bool = True
    """Whether the newest checkpoint of a run or fine-tuning job is kept at that URL, too, until it ends: another machine then
    goes on from it. Of a full model it is some three times its size."""
    durability: Durability = "group"
    """When a write is acknowledged. ``group``: once it is on the disk (fsync), together with all that waited with it.
    ``commit``: the same, each write in a transaction and an fsync of its own; slow. ``async``: once it is committed, and on the
    disk within a second: survives a killed process, but not always a power failure."""
    max_waiting: int = Field(default=2_048, ge=1)
    """Writes of clients that may wait for the database; beyond, they are refused with 503 and ``retry-after``."""
    max_wait: str = "5s"
    """How long the oldest write may have been waiting before clients' further writes are refused in the same way."""

    @model_validator(mode="after")
    def _artifacts_are_somewhere(self) -> Self:
        check_place(self.artifacts, self.artifacts_options)
        return self

    @field_validator("max_wait")
    @classmethod
    def _durations(cls, value: str) -> str:
        duration_s(value)
        return value
