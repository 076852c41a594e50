"""audit: who did what to the loop, when and why."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from pairloop.cli.output import config_option, show, table, verb


@click.command()
@config_option
@click.option("--since", help="Only what is younger: 7d, 12h, or a date such as 2026-03-01 (UTC).")
@click.option("--action", help="Only this: promote, rollback, canary_start, quarantine, key_create, …")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1), help="Newest entries to show.")
@verb
def audit(config_path: Path, since: str | None, action: str | None, limit: int, as_json: bool) -> None:
    """What was done to the loop, newest first: by whom (a key, an address, someone's command line, the scheduler) and why."""
    from pairloop.cli.opening import open_store
    from pairloop.store import audit as rows

    begin = _begin(since)
    with open_store(config_path) as (_, store), store.reading() as c:
        found = rows.list_(c, limit=limit, since=begin, action=action)
    cells = [(f"{one.at:%Y-%m-%d %H:%M:%S}", one.actor, one.action, one.subject, one.reason) for one in found]
    text = table(("at (UTC)", "actor", "action", "subject", "reason"), cells) if cells else "nothing was done yet"
    show({"audit": found}, text, as_json=as_json)


def _begin(since: str | None) -> datetime | None:
    """From when on: a duration before now, or a date."""
    from pairloop.config import duration_s
    from pairloop.errors import InvalidRequestError

    if since is None:
        return None
    try:
        day = datetime.fromisoformat(since)
        return day.replace(tzinfo=UTC) if day.tzinfo is None else day
    except ValueError:
        pass
    try:
        return datetime.now(UTC) - timedelta(seconds=duration_s(since))
    except (ValueError, OverflowError) as error:
        raise InvalidRequestError(
            f"--since: {since!r} is neither a duration such as 7d nor a date such as 2026-03-01"
        ) from error


COMMANDS = (audit,)
