"""schedule: when cycles begin, as it is set in the store for every process of the policy."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pairloop.cli.output import config_option, show, table, verb

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from pairloop.config import Config
    from pairloop.store.schedules import Schedule

_reason = click.option("--reason", required=True, help="Kept in the audit trail.")
_NO_CLOCK = "none"


@click.group()
def schedule() -> None:
    """When cycles begin: look at it, set it, pause it, and go back to what pairloop.toml says.

    What is set here holds for every process on the database from its next look on, and goes before the file.
    """


@schedule.command("show")
@config_option
@verb
def schedule_show(config_path: Path, as_json: bool) -> None:
    """What starts the next cycle and when, and where each setting comes from."""
    _act(config_path, None, as_json=as_json)


@schedule.command("set")
@config_option
@click.option(
    "--every", metavar="DURATION", help="Start a cycle this long after the last one began: 6h, 1d. none: no such clock."
)
@click.option("--cron", metavar="LINE", help="Start a cycle at these times (UTC): '0 3 * * *'. none: no such clock.")
@click.option("--min-pairs", type=int, help="New usable pairs that start a cycle; 0 never starts one by count.")
@click.option("--enabled/--paused", "enabled", default=None, help="Whether cycles begin by themselves.")
@_reason
@verb
def schedule_set(
    config_path: Path,
    every: str | None,
    cron: str | None,
    min_pairs: int | None,
    enabled: bool | None,
    reason: str,
    as_json: bool,
) -> None:
    """Set when cycles begin; what is not named stays as it is."""
    from pairloop.cli.opening import actor
    from pairloop.errors import UserError
    from pairloop.store import schedules

    values: dict[str, Any] = {
        key: value for key, value in (("min_pairs", min_pairs), ("enabled", enabled)) if value is not None
    }
    for key, text in (("every", every), ("cron", cron)):
        if text is not None:
            values[key] = None if text == _NO_CLOCK else text
    if not values:
        raise UserError("nothing to set: give --every, --cron, --min-pairs, --enabled or --paused")
    _act(config_path, lambda c, config: schedules.set_(c, config, values, actor=actor(), reason=reason), as_json=as_json)


@schedule.command("pause")
@config_option
@_reason
@verb
def schedule_pause(config_path: Path, reason: str, as_json: bool) -> None:
    """Have no cycle begin by itself; one that is open goes on, and one that is asked for begins."""
    from pairloop.cli.opening import actor
    from pairloop.store import schedules

    paused = {"enabled": False}
    _act(config_path, lambda c, config: schedules.set_(c, config, paused, actor=actor(), reason=reason), as_json=as_json)


@schedule.command("resume")
@config_option
@_reason
@verb
def schedule_resume(config_path: Path, reason: str, as_json: bool) -> None:
    """Undo a pause. Where the file itself says `enabled = false`, `schedule set --enabled` goes before it."""
    from pairloop.cli.opening import actor
    from pairloop.store import schedules

    _act(config_path, lambda c, config: schedules.reset(c, config, ["enabled"], actor=actor(), reason=reason), as_json=as_json)


@schedule.command("reset")
@click.argument("settings", nargs=-1, metavar="[SETTING]...")
@config_option
@_reason
@verb
def schedule_reset(settings: tuple[str, ...], config_path: Path, reason: str, as_json: bool) -> None:
    """Go back to the file's values: of every, cron, min_pairs, enabled, or of all where none is named."""
    from pairloop.cli.opening import actor
    from pairloop.store import schedules

    _act(config_path, lambda c, config: schedules.reset(c, config, settings, actor=actor(), reason=reason), as_json=as_json)


def _act(config_path: Path, change: Callable[[Connection, Config], Schedule] | None, *, as_json: bool) -> None:
    """Change the schedule, and tell how it is then."""
    from pairloop.cli.opening import open_store
    from pairloop.loop import cycle as stage
    from pairloop.store import schedules

    with open_store(config_path) as (config, store):
        if change is not None:
            store.write(lambda c: change(c, config))
        status = stage.status(store, config)
        with store.reading() as c:
            found = schedules.current(c, config)
    settings = _settings(config, found)
    document = {
        "policy": config.policy.name,
        "enabled": status.enabled,
        "new_pairs": status.new_pairs,
        "pending": status.pending,
        "next_run_at": status.next_run_at,
        "settings": settings,
        "unusable": found.unusable,
    }
    rows = [(key, _shown(one["value"]), _origin(one), _shown(one["file_value"])) for key, one in settings.items()]
    head = table(("setting", "value", "comes from", "the file says"), rows)
    wrong = [f"not used, the file's value holds: {text}" for text in found.unusable]
    show(
        document,
        "\n".join([head, *wrong, _next(status.enabled, status.next_run_at, status.min_pairs, status.new_pairs)]),
        as_json=as_json,
    )


def _settings(config: Config, found: Schedule) -> dict[str, dict[str, Any]]:
    from pairloop.config import SCHEDULE_SETTINGS, set_by

    settings: dict[str, dict[str, Any]] = {}
    for key in SCHEDULE_SETTINGS:
        here = found.set_here.get(key)
        settings[key] = {
            "value": getattr(found.section, key),
            "file_value": getattr(found.file, key),
            "origin": "set" if here is not None else set_by(config, "schedule", key) or "default",
            "set_by": None if here is None else here.actor,
            "set_at": None if here is None else here.set_at,
            "reason": None if here is None else here.reason,
        }
    return settings


def _origin(one: dict[str, Any]) -> str:
    if one["origin"] != "set":
        return str(one["origin"])
    return f"set {one['set_at']:%Y-%m-%d %H:%M} by {one['set_by']}: {one['reason']}"


def _shown(value: Any) -> str:
    from pairloop.scaffold import toml_value

    return "–" if value is None else toml_value(value)


def _next(enabled: bool, at: datetime | None, min_pairs: int | None, new_pairs: int) -> str:
    if not enabled:
        return "paused: a cycle begins only when it is asked for"
    ways = [] if at is None else [f"at {at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"]
    ways += [] if min_pairs is None else [f"at {min_pairs:,} new pairs ({new_pairs:,} so far)"]
    return f"the next cycle begins {', or '.join(ways) or 'only when it is asked for'}"


COMMANDS = (schedule,)
