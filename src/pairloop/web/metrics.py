"""Prometheus metrics of one serving process, in a registry of its own; names begin with ``pairloop_``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from starlette.types import Message

from pairloop.config import Config
from pairloop.metrics import live_registry
from pairloop.metrics.families import Live, gauge
from pairloop.metrics.standing import SchedulerStatus
from pairloop.policy.protocols import ReplicaState, ReplicaStatus, Sampler
from pairloop.store import Store
from pairloop.store.writer import Committed
from pairloop.types import Group

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
EVENTS = b"text/event-stream"
OVERHEAD_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
COMMIT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters that routes feed, and gauges that are read from store and sampler when someone asks."""

    def __init__(self, store: Store, sampler: Sampler, config: Config, scheduler: SchedulerStatus) -> None:
        self._registry = live_registry(store, config, scheduler)
        self.requests = self._counter("requests", "HTTP requests by route, method and status", ["route", "method", "status"])
        self.errors = self._counter("errors", "Errors told to clients, also in the middle of a stream, by code", ["code"])
        self.latency = self._histogram("request_seconds", "Seconds until the response began", SECONDS, ["route"])
        self.overhead = self._histogram("overhead_seconds", "Seconds of a chat request beside its sampling", OVERHEAD_S)
        self.first_token = self._histogram("first_token_seconds", "Seconds until a stream's first token", SECONDS)
        self.draining = Gauge("pairloop_draining", "1 from the signal to stop on", registry=self._registry)
        self.groups = self._counter("groups", "Groups answered, by kind and pool", ["kind", "pool"])
        self.tokens = self._counter("tokens", "Tokens read (prompt) and written (completion)", ["part"])
        self.picks = self._counter("picks", "Picks recorded, by label", ["label"])
        self.values = self._counter("values", "Other feedback recorded, by metric of the wire", ["metric"])
        self.retries = self._counter("retried_requests", "Requests that their client had sent before", [])
        self.commit_s = self._histogram("commit_seconds", "Seconds of a commit, its fsync included", COMMIT_SECONDS)
        self.commit_batch = self._histogram("commit_batch", "Writes that shared a commit", BATCHES)
        store.watch_commits(self._committed)
        self._registry.register(_Sampling(store, sampler))

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"pairloop_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(f"pairloop_{name}", text, labels, registry=self._registry, buckets=buckets)

    def sampled(self, start: Message, elapsed_s: float, overhead_s: float) -> None:
        """The response to a request that something was sampled for begins with ``start``."""
        self.overhead.observe(overhead_s)
        if any(name == b"content-type" and value.startswith(EVENTS) for name, value in start["headers"]):
            self.first_token.observe(elapsed_s)

    def _committed(self, one: Committed) -> None:
        self.commit_s.observe(one.commit_s)
        self.commit_batch.observe(one.batch)

    def answered(self, group: Group) -> None:
        self.groups.labels(group.kind.value, group.pool.value).inc()
        self.tokens.labels("prompt").inc(len(group.prompt_token_ids))
        self.tokens.labels("completion").inc(sum(len(completion.token_ids) for completion in group.completions))

    def families(self) -> Iterable[Metric]:
        """All that is exposed; reads the store."""
        return self._registry.collect()

    def render(self) -> bytes:
        """The exposition text; reads the store."""
        return generate_latest(self._registry)


def _replicas(found: Sequence[ReplicaStatus]) -> Iterable[Metric]:
    """What is known of each engine server; without samples where this process samples."""
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


class _Sampling(Live):
    """What the sampler and the writer of this process are doing."""

    def __init__(self, store: Store, sampler: Sampler) -> None:
        self._store = store
        self._sampler = sampler

    def read(self) -> Iterable[Metric]:
        yield gauge("queue", "Requests waiting for the sampler or running", self._sampler.queued())
        yield gauge("versions_loaded", "Versions in memory", len(self._sampler.loaded()))
        yield gauge("writes_waiting", "Writes that wait for their commit", self._store.waiting)
        yield from _replicas(self._sampler.replicas())
