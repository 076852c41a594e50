"""OpenTelemetry as an option: what to record, not how. Its SDK is imported only where ``otel.endpoint`` is set.

Figures and names only. A duel's spans name no version: whoever reads them may be the one who picks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from pairloop.config import OtelSection
from pairloop.types import Cycle, Feedback

Value = str | bool | int | float | Sequence[str]


class Span(Protocol):
    """A chat on its way. ``end`` may be called more than once."""

    @property
    def trace_id(self) -> str | None:
        """None where nothing is recorded."""
        ...

    def set(self, attributes: Mapping[str, Value | None]) -> None: ...

    def fail(self, kind: str) -> None:
        """What went wrong, by its stable code."""
        ...

    def end(self) -> None: ...


class Recorder(Protocol):
    """Where spans go; for any thread."""

    def chat(self, model: str, attributes: Mapping[str, Value | None], headers: Mapping[str, str]) -> Span: ...

    def evaluated(self, row: Feedback) -> None: ...

    def cycle_moved(self, cycle: Cycle) -> None: ...

    def stop(self) -> None: ...


class _NoSpan:
    """The span of a process that records nothing."""

    trace_id: str | None = None

    def set(self, attributes: Mapping[str, Value | None]) -> None: ...

    def fail(self, kind: str) -> None: ...

    def end(self) -> None: ...


_NOTHING = _NoSpan()
_recorder: Recorder | None = None


def setup(section: OtelSection) -> None:
    """Record from here on, if an endpoint is configured."""
    if section.endpoint is not None:
        from pairloop.telemetry.otel import OtelRecorder

        use(OtelRecorder.to(section))


def use(recorder: Recorder | None) -> None:
    """Record with this one, in place of the one before."""
    global _recorder
    if _recorder is not None:
        _recorder.stop()
    _recorder = recorder


def chat(model: str, attributes: Mapping[str, Value | None], headers: Mapping[str, str]) -> Span:
    """A span that begins now; its parent is the caller's, where ``headers`` have a ``traceparent``."""
    return _NOTHING if _recorder is None else _recorder.chat(model, attributes, headers)


def evaluated(row: Feedback) -> None:
    """A pick or a value, as an evaluation of the answer it is about; a comment or an edited answer is named, never quoted."""
    if _recorder is not None:
        _recorder.evaluated(row)


def cycle_moved(cycle: Cycle) -> None:
    """The state that a cycle has just left; where it has ended, the whole of it too."""
    if _recorder is not None:
        _recorder.cycle_moved(cycle)
