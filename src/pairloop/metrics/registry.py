"""The registry that every process of ours has; a serving process adds what it counts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics

from pairloop.config import Config
from pairloop.metrics.machine import Machine
from pairloop.metrics.standing import SchedulerStatus, Standing
from pairloop.metrics.upkeep import Upkeep
from pairloop.store import Store


def live_registry(store: Store, config: Config, scheduler: SchedulerStatus) -> CollectorRegistry:
    """A registry of its own; its collectors read the store at each scrape."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody asks for
    registry = CollectorRegistry()
    for collector in (Standing(store, config, scheduler), Upkeep(store, config), Machine(store, config)):
        registry.register(collector)
    ProcessCollector(namespace="pairloop", registry=registry)
    return registry
