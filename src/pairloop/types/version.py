"""The members of a policy's lineage, and the names that move between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

BASE_VERSION = 0
"""Version 0 of every policy is its base model."""


class Alias(StrEnum):
    CHAMPION = "champion"
    CHALLENGER = "challenger"
    CANARY = "canary"


class VersionKind(StrEnum):
    BASE = "base"
    FULL = "full"
    ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class Version:
    """An immutable member of a policy's lineage: version 0 is the base, numbers count up and are never reused.

    What a fine-tuning job made has its ``job_id`` and is also known by its ``model_name`` (``ft:...``); a checkpoint of one
    has the ``step_number`` after which it was taken, and the ``metrics`` of then. ``record``: its own recipe and result, since
    a folder of the same bytes may be another version's too, whose manifest it then has.
    """

    policy: str
    number: int
    kind: VersionKind
    path: str
    artifact_hash: str
    parent: int | None
    dataset_id: str | None
    run_id: str | None
    created_at: datetime
    job_id: str | None = None
    step_number: int | None = None
    model_name: str | None = None
    metrics: Mapping[str, float] | None = None
    record: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.policy}@{self.number}"
