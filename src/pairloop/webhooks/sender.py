"""The thread that tells receivers: plans who hears of what, sends, tries again later and later, and gives up in the end.

At least once: a delivery counts when its receiver answered 2xx, and what a crash left open is sent again under the same id. Of
several processes on one database the holder of a lease sends.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial

import httpx
from sqlalchemy import Connection

from pairloop.config import Config, WebhookEndpoint, duration_s
from pairloop.errors import NotFoundError, PairloopError, log_failure
from pairloop.loop.cycle import is_gone, owning
from pairloop.store import Store, deliveries, events, leases, new_id
from pairloop.store.deliveries import Delivery, DeliveryStatus
from pairloop.webhooks.message import key_of, message_of
from pairloop.webhooks.watch import DiskWatch

logger = logging.getLogger(__name__)

POLL_S = 1.0
BATCH = 20
"""Deliveries to one receiver between two looks."""
FIRST_RETRY_S = 5.0
LONGEST_RETRY_S = 3_600.0
GONE = 410
"""The receiver says that it wants no more."""
LONGEST_ERROR = 300


class Sender:
    """Sends in a thread of its own; ``start`` and ``stop`` may be called once each. ConfigError where a key is missing."""

    def __init__(self, store: Store, config: Config, owner: str) -> None:
        self._store = store
        self._policy = config.policy.name
        self._endpoints = config.webhooks.endpoints
        self._keys: Mapping[str, bytes] = {endpoint.name: key_of(endpoint) for endpoint in self._endpoints}
        self._give_up = timedelta(seconds=duration_s(config.webhooks.give_up))
        self._lease, self._lease_s = f"webhooks:{self._policy}", duration_s(config.schedule.lease)
        self._owner = f"{owner}/{new_id('webhooks')}"
        self._disk = DiskWatch(store, config)
        self._client = httpx.Client(timeout=duration_s(config.webhooks.timeout), follow_redirects=False)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> None:
        """From here on what happens is told, where anybody is to be told."""
        self._store.write(self._begin)
        if self._endpoints:
            self._thread.start()

    def stop(self) -> None:
        """Finish the request under way, and let another process go on."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
            try:
                self._store.write(self._release)
            except PairloopError as error:  # it runs out by itself
                logger.warning("%s could not be given back: %s", self._lease, error)
        self._client.close()

    def _begin(self, c: Connection) -> None:
        for endpoint in self._endpoints:
            deliveries.begin(c, self._policy, endpoint.name)
        left = deliveries.give_up_others(c, self._policy, [endpoint.name for endpoint in self._endpoints], datetime.now(UTC))
        if left:
            logger.warning("%d deliveries to webhooks that left the configuration are given up", left)

    def _run(self) -> None:
        pool = ThreadPoolExecutor(max_workers=min(8, len(self._endpoints)), thread_name_prefix="webhook")
        was_due = False
        with owning(self._owner), pool:
            while not self._stopping.is_set():
                try:
                    self._disk.look()
                    is_due = self._is_due()
                    # Once more after the last event: on PostgreSQL one with a lower number may become visible only now.
                    if is_due or was_due:
                        was_due = True
                        if self._store.write(self._plan):
                            list(pool.map(self._tell, self._endpoints))
                        if not is_due:  # a lease that is kept and not renewed would look as if its holder were dead
                            self._store.write(self._release)
                    was_due = is_due
                except PairloopError as error:  # the store, say: what is planned is kept, and tried again
                    logger.warning("webhooks wait: %s", error)
                except Exception as error:  # noqa: BLE001 - the supervisor: receivers are told later, the loop goes on
                    log_failure(logger, error, "webhooks broke")
                self._stopping.wait(POLL_S)

    def _is_due(self) -> bool:
        names = [endpoint.name for endpoint in self._endpoints]
        with self._store.reading() as c:
            return deliveries.anything_new(c, self._policy, names, datetime.now(UTC))

    def _plan(self, c: Connection) -> bool:
        """A row for each new event and each receiver of it; False while another process sends."""
        now = datetime.now(UTC)
        if not self._take(c, now):
            return False
        for endpoint in self._endpoints:
            deliveries.plan(c, self._policy, endpoint.name, endpoint.events, now)
        return True

    def _take(self, c: Connection, now: datetime) -> bool:
        if leases.acquire(c, self._lease, self._owner, now=now, ttl_s=self._lease_s) is not None:
            return True
        holder = leases.holder(c, self._lease)
        if holder is None or not is_gone(holder):
            return False
        leases.release(c, self._lease, holder)
        return leases.acquire(c, self._lease, self._owner, now=now, ttl_s=self._lease_s) is not None

    def _release(self, c: Connection) -> None:
        leases.release(c, self._lease, self._owner)

    def _tell(self, endpoint: WebhookEndpoint) -> None:
        """Send what is due to one receiver, until it fails: then the rest waits, too."""
        with self._store.reading() as c:
            found = deliveries.due(c, self._policy, endpoint.name, datetime.now(UTC), BATCH)
        for delivery in found:
            if self._stopping.is_set():
                return
            error, wanted = post(self._client, endpoint, delivery.event, self._keys[endpoint.name])
            if not self._store.write(partial(self._settle, delivery=delivery, error=error, wanted=wanted)) or error:
                return

    def _settle(self, c: Connection, delivery: Delivery, error: str | None, wanted: bool) -> bool:
        """Write down an attempt; False where another process has taken over."""
        now = datetime.now(UTC)
        if not self._take(c, now):
            return False
        status, next_at = DeliveryStatus.DELIVERED, now
        if error is not None:
            next_at = now + timedelta(seconds=retry_s(delivery.attempts + 1))
            is_over = not wanted or next_at > delivery.created_at + self._give_up
            status = DeliveryStatus.FAILED if is_over else DeliveryStatus.PENDING
            about = (delivery.endpoint, delivery.event.type, delivery.event.event_id, delivery.attempts + 1, error)
            if is_over:
                logger.error("webhook %s was not told of %s (%s): given up after %d attempts: %s", *about)
            else:
                logger.warning("webhook %s was not told of %s (%s) yet, attempt %d: %s", *about)
        deliveries.settle(c, self._policy, delivery, status, error=error, next_at=next_at, at=now)
        return True


def retry_s(attempt: int, rng: random.Random | None = None) -> float:
    """Seconds until the next attempt: 5 s, twice as long each time, an hour at most; by half more or less, so that the
    receivers of several servers do not hear of them all at once."""
    wait_s = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(attempt - 1, 20))
    return wait_s * (rng or random).uniform(0.5, 1.5)


def post(client: httpx.Client, endpoint: WebhookEndpoint, event: events.Event, key: bytes) -> tuple[str | None, bool]:
    """Send one event; what went wrong, if anything did, and whether another try makes sense."""
    message = message_of(event, key, sent_at=int(time.time()))
    try:
        with client.stream("POST", endpoint.url, content=message.body, headers=dict(message.headers)) as reply:
            status = reply.status_code
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"[:LONGEST_ERROR], True
    if 200 <= status < 300:
        return None, True
    hint = ", and redirects are not followed" if 300 <= status < 400 else ""
    return f"the receiver answered {status}{hint}", status != GONE


def send_test(store: Store, config: Config, name: str) -> tuple[str, str | None]:
    """Tell one receiver, now and once, that this is a test: the event's id, and what went wrong.

    NotFoundError for an unknown name, ConfigError where its key is missing.
    """
    endpoint = next((found for found in config.webhooks.endpoints if found.name == name), None)
    if endpoint is None:
        known = ", ".join(found.name for found in config.webhooks.endpoints) or "none"
        raise NotFoundError(f"no webhook {name!r}; the configuration has: {known}")
    key, policy, now = key_of(endpoint), config.policy.name, datetime.now(UTC)
    event_id = store.write(lambda c: events.put(c, "webhook.test", policy, {"endpoint": name, "policy": policy}, now))
    with store.reading() as c:
        event = events.get(c, event_id)
    assert event is not None, "it has just been written"
    with httpx.Client(timeout=duration_s(config.webhooks.timeout), follow_redirects=False) as client:
        error, _ = post(client, endpoint, event, key)
    return event_id, error
