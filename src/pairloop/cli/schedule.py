"""schedule: when cycles begin, as it is set in the store for every process of the policy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pairloop.cli.output import config_option, show, table, verb
from pairloop.cli.verbs import Verbs

if TYPE_CHECKING:
    from pairloop.loop.outlook import Origin
    from pairloop.store.schedules import Schedule

_reason = click.option("--reason", required=True, help="Kept in the audit trail.")
_NO_CLOCK = "none"


@click.group(cls=Verbs)
def schedule() -> None:
    """When cycles begin: look at it, set it, pause it, and go back to what pairloop.toml says.

    What is set here holds for every process on the database from its next look on, and goes before the file.
    """


@schedule.command("show")
@config_option
@verb
def schedule_show(config_path: Path, as_json: bool) -> None:
    """What starts the next cycle and when, and where each setting comes from."""
    _act(config_path, None, "", as_json=as_json)


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
    _act(config_path, partial(schedules.set_, values=values), reason, as_json=as_json)


@schedule.command("pause")
@config_option
@_reason
@verb
def schedule_pause(config_path: Path, reason: str, as_json: bool) -> None:
    """Have no cycle begin by itself; one that is open goes on, and one that is asked for begins."""
    from pairloop.store import schedules

    _act(config_path, partial(schedules.set_, values={"enabled": False}), reason, as_json=as_json)


@schedule.command("resume")
@config_option
@_reason
@verb
def schedule_resume(config_path: Path, reason: str, as_json: bool) -> None:
    """Undo a pause. Where the file itself says `enabled = false`, `schedule set --enabled` goes before it."""
    from pairloop.store import schedules

    _act(config_path, partial(schedules.reset, settings=["enabled"]), reason, as_json=as_json)


@schedule.command("reset")
@click.argument("settings", nargs=-1, metavar="[SETTING]...")
@config_option
@_reason
@verb
def schedule_reset(settings: tuple[str, ...], config_path: Path, reason: str, as_json: bool) -> None:
    """Go back to the file's values: of every, cron, min_pairs, enabled, or of all where none is named."""
    from pairloop.store import schedules

    _act(config_path, partial(schedules.reset, settings=settings), reason, as_json=as_json)


def _act(config_path: Path, change: Callable[..., Schedule] | None, reason: str, *, as_json: bool) -> None:
    """Change the schedule for ``reason``, as far as the store keeps its words, and tell how it is then."""
    from pairloop.cli.opening import actor, open_store
    from pairloop.loop import outlook, pairs

    with open_store(config_path) as (config, store):
        if change is not None:
            words = store.kept_words(reason)
            store.write(lambda c: change(c, config, actor=actor(), reason=words))
        new_pairs = pairs.count_new(store, config)
        with store.reading() as c:
            found = outlook.look(c, config, new_pairs)
    document = {
        "policy": config.policy.name,
        "enabled": found.section.enabled,
        "new_pairs": new_pairs,
        "pending": found.pending,
        "runs": found.runs,
        "due": found.due,
        "text": found.text,
        "settings": found.settings,
        "unusable": found.unusable,
    }
    rows = [(key, _shown(one.value), _origin(one), _shown(one.file_value)) for key, one in found.settings.items()]
    lines = [table(("setting", "value", "comes from", "the file says"), rows)]
    lines += [f"not used, the file's value holds: {text}" for text in found.unusable]
    show(document, "\n".join([*lines, found.text]), as_json=as_json)


def _origin(one: Origin) -> str:
    return one.origin if one.set_at is None else f"set {one.set_at:%Y-%m-%d %H:%M} by {one.set_by}: {one.reason}"


def _shown(value: Any) -> str:
    from pairloop.scaffold import toml_value

    return "–" if value is None else toml_value(value)


COMMANDS = (schedule,)
