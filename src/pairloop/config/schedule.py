"""When cycles begin: the section, and the part of it that an operator may set while everything runs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import Field, ValidationError, field_validator

from pairloop.config.section import Section, duration_s
from pairloop.errors import InvalidRequestError

LONGEST_EVERY_S = 10 * 365 * 86_400
LONGEST_CRON = 200
SETTINGS = ("enabled", "every", "cron", "min_pairs")
"""What decides when a cycle begins, and may be set in the store, for all processes; the rest is one process's own."""


class ScheduleSection(Section):
    """When a cycle starts: a clock, a cron line, new pairs, or any mix (the first that is due).

    ``enabled``, ``every``, ``cron`` and ``min_pairs`` may also be set while everything runs, on the page Schedule, with
    ``pairloop schedule`` or ``POST /v1/schedules/NAME``: that holds for every process on the database, before the file.
    """

    enabled: bool = True
    """Whether this process starts cycles by itself; where it does not, one begins only when it is asked for."""
    every: str | None = None
    """Start a cycle this long after the last one began, such as ``6h``."""
    cron: str | None = None
    """Start a cycle at these times (UTC), such as ``0 3 * * *``."""
    min_pairs: int = Field(default=500, ge=0, le=1_000_000_000)
    """New usable pairs since the last snapshot that start a cycle; 0 never starts one by count."""
    poll: str = "1s"
    """How often the scheduler looks when nothing wakes it."""
    lease: str = "60s"
    """How long a silent process holds a cycle or a fine-tuning job before another takes it up."""
    jobs: bool = True
    """Whether this process trains fine-tuning jobs, one after the other."""

    @field_validator("every", "poll", "lease")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None and duration_s(value) > LONGEST_EVERY_S:
            raise ValueError(f"{value!r} is longer than ten years")
        return value

    @field_validator("cron")
    @classmethod
    def _cron(cls, value: str | None) -> str | None:
        from cronsim import CronSim, CronSimError

        shape = "write minute, hour, day of month, month and day of week, such as 0 3 * * * (daily at 03:00 UTC)"
        if value is not None and len(value) > LONGEST_CRON:
            raise ValueError(f"a cron line has at most {LONGEST_CRON} characters; {shape}")
        try:
            is_never = value is not None and next(CronSim(value, datetime.now(UTC)), None) is None
        except CronSimError as error:
            raise ValueError(f"{value!r} is not a cron line: {error}; {shape}") from error
        if is_never:
            raise ValueError(f"no such time comes within fifty years: {value!r}; {shape}")
        return value


def with_settings(section: ScheduleSection, values: Mapping[str, Any]) -> ScheduleSection:
    """The section with ``values`` laid over it, checked as the file is.

    InvalidRequestError names the setting that is unknown or wrong, and what is allowed.
    """
    for key in values:
        if key not in SETTINGS:
            raise InvalidRequestError(f"{key!r} is no setting of the schedule; there are {', '.join(SETTINGS)}", param=key)
    try:
        return ScheduleSection.model_validate({**section.model_dump(exclude_unset=True), **values})
    except ValidationError as error:
        item = error.errors()[0]
        key = str(item["loc"][0])
        raise InvalidRequestError(f"{key}: {str(item['msg']).removeprefix('Value error, ')}", param=key) from error
