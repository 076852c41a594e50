"""The clock of a schedule as people say it: hourly, daily, weekly, every so often, or a cron line."""

from __future__ import annotations

import re
from typing import NamedTuple

from pairloop.config import ScheduleSection

CADENCES = {
    "none": "no clock",
    "hourly": "every hour",
    "daily": "every day",
    "weekly": "every week",
    "every": "so long after the last began",
    "cron": "a cron line",
    "both": "an interval and a cron line",
}
DAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_PLAIN = re.compile(r"(?P<minute>[0-5]?\d) (?P<hour>\*|[01]?\d|2[0-3]) \* \* (?P<day>\*|[0-6])")


class Cadence(NamedTuple):
    """``kind``: of `CADENCES`; what is not of this kind is filled with what a person might begin with."""

    kind: str
    minute: int
    time: str
    day: int
    every: str
    cron: str


def cadence_of(section: ScheduleSection) -> Cadence:
    """How a schedule's ``every`` and ``cron`` are said."""
    every, cron = section.every or "6h", section.cron or "0 3 * * *"
    plain = Cadence("none", 0, "03:00", 1, every, cron)
    if section.cron is None:
        return plain if section.every is None else plain._replace(kind="every")
    if section.every is not None:
        return plain._replace(kind="both")
    match = _PLAIN.fullmatch(section.cron)
    if match is None or (match["hour"] == "*" and match["day"] != "*"):
        return plain._replace(kind="cron")
    minute = int(match["minute"])
    if match["hour"] == "*":
        return plain._replace(kind="hourly", minute=minute)
    at = plain._replace(kind="daily", time=f"{int(match['hour']):02}:{minute:02}")
    return at if match["day"] == "*" else at._replace(kind="weekly", day=int(match["day"]))
