"""keys: who may use a server, for what, and until when."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pairloop.cli.output import config_option, show, table, verb
from pairloop.cli.verbs import Verbs

if TYPE_CHECKING:
    from pairloop.store.keys import Key

SCOPES = ("inference", "feedback", "rate", "operate", "train", "admin")

NO_KEYS = "no keys yet: pairloop keys create --scope admin makes the first one, and locks the server for all who show none"


@click.group(cls=Verbs)
def keys() -> None:
    """Keys of the server: once there is one, every request to /v1 needs one."""


@keys.command()
@config_option
@click.option("--name", help="What it is for, and its own; who signs in with it picks under it.  [default: after its id]")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(SCOPES),
    multiple=True,
    help="What it may do; may be given more than once. By default inference and feedback; rate opens the pages chat and queue, "
    "admin everything.",
)
@click.option("--expires", help="How long it is good, such as 90d; by default until it is revoked.")
@click.option("--requests-per-minute", type=click.IntRange(0), help="Its own limit instead of serve.requests_per_minute.")
@verb
def create(
    config_path: Path,
    name: str | None,
    scopes: tuple[str, ...],
    expires: str | None,
    requests_per_minute: int | None,
    as_json: bool,
) -> None:
    """Make a key and print its token: this once, for only a hash of it is kept."""
    from pairloop.cli.opening import actor, open_store
    from pairloop.store import keys as rows

    wanted = [rows.Scope(scope) for scope in scopes or ("inference", "feedback")]
    key, token = rows.new(name, wanted, expires_at=_expiry(expires), requests_per_minute=requests_per_minute)
    with open_store(config_path) as (_, store):
        store.write(lambda c: rows.create(c, key, actor=actor(), reason="by hand"))
    text = f"{token}\nkey {key.key_id} ({key.name}): {', '.join(sorted(key.scopes))}. Note it down now: it is not stored."
    show({"token": token, **_key_json(key)}, text, as_json=as_json)


@keys.command("list")
@config_option
@verb
def list_keys(config_path: Path, as_json: bool) -> None:
    """All keys, newest first, revoked and expired ones included."""
    from pairloop.cli.opening import open_store
    from pairloop.store import keys as rows

    with open_store(config_path) as (_, store), store.reading() as c:
        found = rows.list_(c)
    cells = [
        (key.key_id, key.name, ", ".join(sorted(key.scopes)), _state(key), _day(key.created_at), _day(key.last_used_at))
        for key in found
    ]
    text = table(("key", "name", "scopes", "state", "made", "last used"), cells) if cells else NO_KEYS
    show({"keys": [_key_json(key) for key in found]}, text, as_json=as_json)


@keys.command()
@click.argument("key_id")
@config_option
@verb
def revoke(key_id: str, config_path: Path, as_json: bool) -> None:
    """Revoke a key for good; a running server refuses it within seconds."""
    from pairloop.cli.opening import actor, open_store
    from pairloop.store import keys as rows

    with open_store(config_path) as (_, store):
        key = store.write(lambda c: rows.revoke(c, key_id, datetime.now(UTC), actor=actor(), reason="by hand"))
    show(_key_json(key), f"revoked {key.key_id} ({key.name})", as_json=as_json)


def _expiry(text: str | None) -> datetime | None:
    from pairloop.config import duration_s
    from pairloop.errors import InvalidRequestError

    if text is None:
        return None
    try:
        return datetime.now(UTC) + timedelta(seconds=duration_s(text))
    except (ValueError, OverflowError) as error:
        raise InvalidRequestError(f"--expires: {error}", param="expires") from error


def _state(key: Key) -> str:
    if key.revoked_at is not None:
        return f"revoked {_day(key.revoked_at)}"
    if key.expires_at is not None:
        return f"{'expired' if key.expires_at <= datetime.now(UTC) else 'until'} {_day(key.expires_at)}"
    return "good"


def _day(at: datetime | None) -> str | None:
    return None if at is None else at.strftime("%Y-%m-%d %H:%M")


def _key_json(key: Key) -> dict[str, Any]:
    return {
        "key_id": key.key_id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "requests_per_minute": key.requests_per_minute,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "last_used_at": key.last_used_at,
        "revoked_at": key.revoked_at,
    }


COMMANDS = (keys,)
