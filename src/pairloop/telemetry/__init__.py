"""What a process says of itself while it works: ``logs`` (structured, on standard logging) and ``traces`` (OpenTelemetry)."""

from pairloop.telemetry import logs, traces

__all__ = ["logs", "traces"]
