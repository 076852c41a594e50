"""Prometheus metrics that are read when someone asks: ``standing`` (the loop), ``upkeep`` (what needs care), ``machine``.

What a serving process counts as it answers is in ``pairloop.web.metrics``; a worker has these alone (``exporter``). Names begin
with ``pairloop_``, and every family is always there, with or without samples.
"""

from pairloop.metrics.exporter import exporting
from pairloop.metrics.registry import live_registry

__all__ = ["exporting", "live_registry"]
