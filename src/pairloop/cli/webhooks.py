"""webhooks: who is told of what, whether they took it, and again."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from pairloop.cli.output import EXIT_SYSTEM_FAILURE, config_option, show, table, verb
from pairloop.cli.verbs import Verbs


@click.group(cls=Verbs)
def webhooks() -> None:
    """Who is told of what, and whether they took it."""


@webhooks.command("list")
@config_option
@click.option("--status", type=click.Choice(["pending", "delivered", "failed"]), help="Only deliveries in this state.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1), help="Newest deliveries shown.")
@verb
def list_(config_path: Path, status: str | None, limit: int, as_json: bool) -> None:
    """The endpoints, and the newest deliveries to them."""
    from pairloop.cli.opening import open_store
    from pairloop.store import deliveries
    from pairloop.store.deliveries import DeliveryStatus

    with open_store(config_path) as (config, store), store.reading() as c:
        wanted = None if status is None else DeliveryStatus(status)
        found = deliveries.list_(c, config.policy.name, status=wanted, limit=limit)
    endpoints = config.webhooks.endpoints
    who = table(("name", "url", "events"), [(one.name, one.url, ", ".join(one.events) or "all") for one in endpoints])
    rows = [
        (one.event.event_id, one.event.type, one.endpoint, one.status, one.attempts, one.next_at.isoformat(), one.error)
        for one in found
    ]
    what = table(("event", "type", "endpoint", "status", "attempts", "next at", "error"), rows)
    text = f"{who}\n\n{what}" if endpoints else "no webhooks are configured; docs/operations.md says how"
    show({"endpoints": [one.model_dump() for one in endpoints], "deliveries": found}, text, as_json=as_json)


@webhooks.command()
@config_option
@click.argument("endpoint")
@verb
def test(config_path: Path, endpoint: str, as_json: bool) -> None:
    """Send a signed `webhook.test` to ENDPOINT now. Exit code 1 where it was not taken."""
    from pairloop.cli.opening import open_store
    from pairloop.webhooks import send_test

    with open_store(config_path) as (config, store):
        event_id, error = send_test(store, config, endpoint)
    text = f"{endpoint} took {event_id}" if error is None else f"{endpoint} did not take {event_id}: {error}"
    show({"endpoint": endpoint, "event_id": event_id, "delivered": error is None, "error": error}, text, as_json=as_json)
    if error is not None:
        raise SystemExit(EXIT_SYSTEM_FAILURE)


@webhooks.command()
@config_option
@click.argument("event_id", required=False)
@click.option("--endpoint", help="Only to this endpoint.")
@verb
def redeliver(config_path: Path, event_id: str | None, endpoint: str | None, as_json: bool) -> None:
    """Have the running server send again: EVENT_ID, or every delivery that was given up."""
    from pairloop.cli.opening import open_store
    from pairloop.errors import NotFoundError
    from pairloop.store import deliveries

    with open_store(config_path) as (config, store):
        now, known = datetime.now(UTC), [one.name for one in config.webhooks.endpoints]
        if endpoint is not None and endpoint not in known:
            raise NotFoundError(f"no webhook {endpoint!r}; the configuration has: {', '.join(known) or 'none'}")
        policy, names = config.policy.name, known if endpoint is None else [endpoint]
        number = store.write(
            lambda c: sum(deliveries.again(c, policy, now, endpoint=name, event_id=event_id) for name in names)
        )
    if number == 0 and event_id is not None:
        raise NotFoundError(f"no delivery of {event_id!r}; `pairloop webhooks list` names them")
    show({"pending": number}, f"{number} deliveries will be sent again", as_json=as_json)


COMMANDS = (webhooks,)
