"""Prometheus metrics of one serving process, in a registry of its own; names begin with ``pairloop_``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pairloop.policy.protocols import ReplicaState, ReplicaStatus, Sampler
from pairloop.store import Store, canaries, cycles, versions
from pairloop.store.writer import Committed
from pairloop.types import BASE_VERSION, Alias, CycleState, Group

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

COMMIT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters that routes feed, and gauges that are read from store and sampler when someone asks."""

    def __init__(self, store: Store, sampler: Sampler, policy: str) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "HTTP requests by route, method and status", ["route", "method", "status"])
        self.latency = Histogram(
            "pairloop_request_seconds", "Seconds until the response began", ["route"], registry=self._registry, buckets=SECONDS
        )
        self.groups = self._counter("groups", "Groups answered, by kind and pool", ["kind", "pool"])
        self.tokens = self._counter("tokens", "Tokens read (prompt) and written (completion)", ["part"])
        self.picks = self._counter("picks", "Picks recorded, by label", ["label"])
        self.values = self._counter("values", "Other feedback recorded, by metric of the wire", ["metric"])
        self.retries = self._counter("retried_requests", "Requests that their client had sent before", [])
        self.commit_s = Histogram(
            "pairloop_commit_seconds",
            "Seconds of a commit, its fsync included",
            registry=self._registry,
            buckets=COMMIT_SECONDS,
        )
        self.commit_batch = Histogram(
            "pairloop_commit_batch", "Writes that shared a commit", registry=self._registry, buckets=BATCHES
        )
        store.watch_commits(self._committed)
        self._registry.register(_Live(store, sampler, policy))

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"pairloop_{name}", text, labels, registry=self._registry)

    def _committed(self, one: Committed) -> None:
        self.commit_s.observe(one.commit_s)
        self.commit_batch.observe(one.batch)

    def answered(self, group: Group) -> None:
        self.groups.labels(group.kind.value, group.pool.value).inc()
        self.tokens.labels("prompt").inc(len(group.prompt_token_ids))
        self.tokens.labels("completion").inc(sum(len(completion.token_ids) for completion in group.completions))

    def render(self) -> bytes:
        """The exposition text; reads the store."""
        return generate_latest(self._registry)


def _replicas(found: Sequence[ReplicaStatus]) -> Iterable[Metric]:
    """What is known of each engine server; nothing where this process samples."""
    if not found:
        return
    ready = GaugeMetricFamily("pairloop_replica_ready", "1 where the engine gets requests", labels=["replica"])
    outstanding = GaugeMetricFamily("pairloop_replica_outstanding", "Requests in flight at the engine", labels=["replica"])
    recorded = GaugeMetricFamily(
        "pairloop_replica_recorded_logps",
        "1 where the engine's log-probs are the trainer's and are recorded",
        labels=["replica"],
    )
    circuit = GaugeMetricFamily(
        "pairloop_replica_circuit_closed", "0 while its failures keep requests away", labels=["replica"]
    )
    for replica in found:
        ready.add_metric([replica.url], float(replica.state is ReplicaState.READY))
        outstanding.add_metric([replica.url], replica.outstanding)
        recorded.add_metric([replica.url], float(replica.recorded))
        circuit.add_metric([replica.url], float(replica.circuit == "closed"))
    yield from (ready, outstanding, recorded, circuit)


class _Live(Collector):
    """Gauges read at the moment of the scrape."""

    def __init__(self, store: Store, sampler: Sampler, policy: str) -> None:
        self._store = store
        self._sampler = sampler
        self._policy = policy

    def collect(self) -> Iterable[Metric]:
        with self._store.reading() as c:
            champion = versions.alias(c, self._policy, Alias.CHAMPION)
            current = cycles.current(c, self._policy)
            canary = canaries.current(c, self._policy)
        yield GaugeMetricFamily("pairloop_queue", "Requests waiting for the sampler or running", value=self._sampler.queued())
        yield GaugeMetricFamily("pairloop_champion_version", "Number of the champion", value=champion or BASE_VERSION)
        share = 0.0 if canary is None else canary.share
        yield GaugeMetricFamily("pairloop_canary_share", "Share of users whom a canary answers; 0 without one", value=share)
        yield GaugeMetricFamily("pairloop_versions_loaded", "Versions in memory", value=len(self._sampler.loaded()))
        yield GaugeMetricFamily("pairloop_writes_waiting", "Writes that wait for their commit", value=self._store.waiting)
        yield from _replicas(self._sampler.replicas())
        state = GaugeMetricFamily("pairloop_cycle_state", "1 for the state of the running cycle", labels=["state"])
        for name in CycleState:
            if not name.is_terminal:
                state.add_metric([name.value], float(current is not None and current.state is name))
        yield state

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: the store is not read while the registry is being filled."""
        return ()
