"""What needs someone's care: queues, leases, silent workers, receivers that do not answer, keys that run out."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from time import monotonic

from prometheus_client.core import GaugeMetricFamily, Metric
from sqlalchemy import Connection

from pairloop.config import Config
from pairloop.metrics.families import Live, age_s, gauge, gauges
from pairloop.store import Store, counts, events, quarantines
from pairloop.store.deliveries import DeliveryStatus
from pairloop.store.jobs import JobStatus

COUNT_EVERY_S = 60.0
"""The least time between two counts of what waits for the labeller, which reads many groups."""


class Upkeep(Live):
    """Gauges of one database."""

    def __init__(self, store: Store, config: Config) -> None:
        self._store = store
        self._config = config
        self._policy = config.policy.name
        self._unlabelled: tuple[float, int | None] = (float("-inf"), None)

    def read(self) -> Iterable[Metric]:
        now = datetime.now(UTC)
        with self._store.reading() as c:
            yield from self._queues(c)
            yield from self._signs_of_life(c, now)
            yield from self._webhooks(c, now)
            expires_at = counts.soonest_key_expiry(c, now)
            left_s = None if expires_at is None else (expires_at - now).total_seconds()
            yield gauge("key_expires_in_seconds", "Until the next API key expires", left_s)
            backup_s = age_s(events.newest_at(c, events.BACKUP), now)
            yield gauge("backup_age_seconds", "Since the last backup by `pairloop backup`", backup_s)
            held = len(quarantines.current(c, self._policy))
            yield gauge("quarantined_raters", "Raters whose votes are set aside", held)
            left_out = counts.dropped(c, self._policy)
            yield gauges("snapshot_dropped", "Rows that the newest snapshot left out, by reason", "reason", left_out)

    def _queues(self, c: Connection) -> Iterable[Metric]:
        by_status = counts.jobs_by_status(c)
        jobs = {status.value: float(by_status.get(status.value, 0)) for status in JobStatus}
        yield gauges("jobs", "Fine-tuning jobs, by status", "status", jobs)
        yield gauge("unlabelled_groups", "Comparisons that wait for the labeller, 10,000 at most", self._waiting(c))

    def _waiting(self, c: Connection) -> int | None:
        """None where nothing labels."""
        label = self._config.label
        if label.verifier is None and label.judge_url is None:
            return None
        counted_at, found = self._unlabelled
        if monotonic() - counted_at > COUNT_EVERY_S:
            found = counts.unlabelled(c, self._policy, datetime.now(UTC) - timedelta(seconds=label.after_s))
            self._unlabelled = (monotonic(), found)
        return found

    def _signs_of_life(self, c: Connection, now: datetime) -> Iterable[Metric]:
        left = {lease.name: (lease.expires_at - now).total_seconds() for lease in counts.held_leases(c)}
        yield gauges(
            "lease_expires_in_seconds", "Until a held lease runs out; negative where its holder is silent", "lease", left
        )
        run_s = age_s(counts.oldest_run_beat(c, self._policy), now)
        yield gauge("run_heartbeat_age_seconds", "Since the running training of a cycle last moved", run_s)
        job_s = age_s(counts.oldest_job_beat(c), now)
        yield gauge("job_heartbeat_age_seconds", "Since the worker of a fine-tuning job last spoke", job_s)

    def _webhooks(self, c: Connection, now: datetime) -> Iterable[Metric]:
        names = [endpoint.name for endpoint in self._config.webhooks.endpoints]
        told = {(found.endpoint, found.status): found for found in counts.deliveries(c, self._policy)}
        family = GaugeMetricFamily(
            "pairloop_webhook_deliveries", "Webhook deliveries, by endpoint and status", labels=["endpoint", "status"]
        )
        oldest: dict[str, float] = {}
        for name in names:
            for status in DeliveryStatus:
                found = told.get((name, status.value))
                family.add_metric([name, status.value], 0 if found is None else found.number)
            pending = told.get((name, DeliveryStatus.PENDING.value))
            oldest[name] = 0.0 if pending is None else (now - pending.oldest_at).total_seconds()
        yield family
        yield gauges("webhook_pending_seconds", "How long the oldest pending delivery has waited", "endpoint", oldest)
