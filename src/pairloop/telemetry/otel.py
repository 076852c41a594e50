"""OpenTelemetry's spans, by the semantic conventions for generative AI; the only file that imports it."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from pairloop import __version__
from pairloop.config import OtelSection
from pairloop.telemetry.traces import Value
from pairloop.types import PREFERENCE_METRIC, Cycle, Feedback

EVALUATION_EVENT = "gen_ai.evaluation.result"
REMEMBERED = 10_000
"""Answers whose spans an evaluation can still be linked to."""
STOP_MS = 3_000
_ROOT: ContextVar[SpanContext | None] = ContextVar("otel_root", default=None)


class OtelRecorder:
    """Spans by a provider of its own, so that another library's global one is left alone."""

    def __init__(self, section: OtelSection, exporter: SpanExporter) -> None:
        resource = Resource.create({SERVICE_NAME: section.service_name, SERVICE_VERSION: __version__})
        sampler = ParentBased(TraceIdRatioBased(section.sample))
        self._provider = TracerProvider(sampler, resource, shutdown_on_exit=False, id_generator=_Ids())
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("pairloop", __version__)
        self._answers: OrderedDict[str, SpanContext] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def to(cls, section: OtelSection) -> OtelRecorder:
        """By OTLP over HTTP; what cannot be sent is dropped, and nothing waits for it."""
        assert section.endpoint is not None, "only where there is one"
        return cls(section, OTLPSpanExporter(endpoint=f"{section.endpoint.rstrip('/')}/v1/traces"))

    def chat(self, model: str, attributes: Mapping[str, Value | None], headers: Mapping[str, str]) -> ChatSpan:
        parent = TraceContextTextMapPropagator().extract(dict(headers))
        span = self._tracer.start_span(f"chat {model}", context=parent, kind=SpanKind.SERVER)
        found = ChatSpan(span, self)
        found.set({gen_ai.GEN_AI_OPERATION_NAME: "chat", gen_ai.GEN_AI_REQUEST_MODEL: model, **attributes})
        return found

    def remember(self, group_id: str, context: SpanContext) -> None:
        with self._lock:
            self._answers[group_id] = context
            while len(self._answers) > REMEMBERED:
                self._answers.popitem(last=False)

    def evaluated(self, row: Feedback) -> None:
        with self._lock:
            answer = self._answers.get(row.group_id)
        links = [] if answer is None else [Link(answer)]
        name = "preference" if row.metric == PREFERENCE_METRIC else row.metric
        about: dict[str, AttributeValue] = {gen_ai.GEN_AI_EVALUATION_NAME: name, gen_ai.GEN_AI_RESPONSE_ID: row.group_id}
        if row.label is not None:
            about[gen_ai.GEN_AI_EVALUATION_SCORE_LABEL] = row.label.value
        if isinstance(row.value, bool | int | float):
            about[gen_ai.GEN_AI_EVALUATION_SCORE_VALUE] = float(row.value)
        if row.choice_index is not None:
            about["pairloop.choice.index"] = row.choice_index
        about["pairloop.feedback.source"] = row.source.value
        span = self._tracer.start_span(f"evaluate {name}", context=set_span_in_context(_none()), links=links)
        span.add_event(EVALUATION_EVENT, about)
        span.end()

    def cycle_moved(self, cycle: Cycle) -> None:
        """One trace for each cycle, with ids made of its own: its steps find each other across restarts and processes."""
        root = _root_of(cycle)
        left, entered = cycle.steps[-2:]
        about: dict[str, AttributeValue] = {"pairloop.policy": cycle.policy, "pairloop.cycle.number": cycle.number}
        inside = set_span_in_context(NonRecordingSpan(root))
        name, begun, ended = f"cycle {left.state.value}", _ns(left.created_at), _ns(entered.created_at)
        self._tracer.start_span(name, context=inside, start_time=begun, attributes=about).end(ended)
        if not entered.state.is_terminal:
            return
        token = _ROOT.set(root)
        try:
            about["pairloop.cycle.state"] = entered.state.value
            whole = self._tracer.start_span(
                "cycle", context=set_span_in_context(_none()), start_time=_ns(cycle.created_at), attributes=about
            )
        finally:
            _ROOT.reset(token)
        if entered.state.value == "failed":
            whole.set_status(Status(StatusCode.ERROR))
        whole.end(ended)

    def stop(self) -> None:
        """Send what waits, for a moment at most."""
        self._provider.force_flush(STOP_MS)
        self._provider.shutdown()


class ChatSpan:
    """The span of one chat request."""

    def __init__(self, span: OtelSpan, recorder: OtelRecorder) -> None:
        self._span = span
        self._recorder = recorder

    @property
    def trace_id(self) -> str | None:
        return f"{self._span.get_span_context().trace_id:032x}"

    def set(self, attributes: Mapping[str, Value | None]) -> None:
        self._span.set_attributes({name: _plain(value) for name, value in attributes.items() if value is not None})
        group_id = attributes.get(gen_ai.GEN_AI_RESPONSE_ID)
        if isinstance(group_id, str):
            self._recorder.remember(group_id, self._span.get_span_context())

    def fail(self, kind: str) -> None:
        self._span.set_attribute(ERROR_TYPE, kind)
        self._span.set_status(Status(StatusCode.ERROR))

    def end(self) -> None:
        if self._span.is_recording():
            self._span.end()


class _Ids(IdGenerator):
    """Random ids, but for a cycle's root span, whose children named it before it began."""

    def __init__(self) -> None:
        self._random = RandomIdGenerator()

    def generate_span_id(self) -> int:
        root = _ROOT.get()
        return self._random.generate_span_id() if root is None else root.span_id

    def generate_trace_id(self) -> int:
        root = _ROOT.get()
        return self._random.generate_trace_id() if root is None else root.trace_id


def _root_of(cycle: Cycle) -> SpanContext:
    digest = hashlib.sha256(cycle.cycle_id.encode()).digest()
    trace_id, span_id = int.from_bytes(digest[:16], "big"), int.from_bytes(digest[16:24], "big")
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def _none() -> OtelSpan:
    """No parent, whatever another library has made current."""
    return NonRecordingSpan(SpanContext(0, 0, is_remote=False))


def _plain(value: Value) -> AttributeValue:
    return value if isinstance(value, str | bool | int | float) else list(value)


def _ns(at: datetime) -> int:
    return int(at.timestamp() * 1e9)
