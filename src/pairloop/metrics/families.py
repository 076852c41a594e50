"""How families are made: the prefix, and the labels that come with each value."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from datetime import datetime

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pairloop.errors import StoreError

logger = logging.getLogger(__name__)

PREFIX = "pairloop_"


def gauge(name: str, text: str, value: float | None) -> Metric:
    """One value; without samples where it is not known."""
    family = GaugeMetricFamily(PREFIX + name, text)
    if value is not None:
        family.add_metric([], value)
    return family


def gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def totals(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    """Counters that the store remembers, so that a restart does not set them back."""
    family = CounterMetricFamily(PREFIX + name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def age_s(at: datetime | None, now: datetime) -> float | None:
    return None if at is None else max(0.0, (now - at).total_seconds())


class Live(Collector):
    """A collector whose families are read at the moment of the scrape; what cannot be read then is left out and logged."""

    def collect(self) -> Iterable[Metric]:
        try:
            return list(self.read())
        except StoreError as error:
            logger.warning("metrics of the store are left out: %s", error)
            return ()

    @abstractmethod
    def read(self) -> Iterable[Metric]:
        """The families; may raise StoreError."""

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: the store is not read while the registry is being filled."""
        return ()
