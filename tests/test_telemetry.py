"""Log and traces: what they say, that it parses, and that nobody's words or keys are in it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.server import POLICY, RunningServer, World, chat_body, user_of

from pairloop.cli.working import work
from pairloop.config import LogSection, OtelSection, log_of_child
from pairloop.errors import TEXTS, ConfigError, StoreError
from pairloop.scaffold import write_config
from pairloop.store import keys
from pairloop.store.keys import Scope
from pairloop.telemetry import logs, traces
from pairloop.telemetry.otel import OtelRecorder
from pairloop.types import Cycle, CycleState, CycleStep, Pool

Serve = Callable[..., RunningServer]
WORDS = "where-is-my-parcel-4711"
NOW = datetime(2026, 5, 4, 3, 2, 1, 123000, tzinfo=UTC)


@pytest.fixture
def restored() -> Iterator[None]:
    """Takes back what ``logs.setup`` changes in the process."""
    loggers = [logging.getLogger(name) for name in (None, "pairloop", "uvicorn")]
    levels = [logger.level for logger in loggers]
    yield
    if logs._installed is not None:
        logging.getLogger().removeHandler(logs._installed[1])
        logs._installed[1].close()
        logs._installed = None
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def record(message: str, **fields: logs.Field) -> logging.LogRecord:
    made = logging.LogRecord("pairloop.test", logging.INFO, __file__, 1, message, None, None)
    made.created = NOW.timestamp()
    made.fields = fields
    return made


# --- the log


@settings(max_examples=40)
@given(st.text(), st.dictionaries(st.sampled_from(["policy", "cycle", "run", "time"]), st.text() | st.integers()))
def test_a_json_line_is_one_line_and_says_what_was_said(message: str, fields: dict[str, str | int]) -> None:
    line = logs.JsonFormatter().format(record(message, **fields))
    assert "\n" not in line
    found = json.loads(line)
    assert found["message"] == message
    assert found["time"] == "2026-05-04T03:02:01.123Z"
    assert {name: found[name] for name in fields if name != "time"} == {k: v for k, v in fields.items() if k != "time"}


def test_a_text_line_is_one_line_and_keys_are_taken_out() -> None:
    _, token = keys.new("any", [Scope.ADMIN])
    for formatter in (logs.TextFormatter(), logs.JsonFormatter()):
        line = formatter.format(record(f"a\nb {token}", policy="bot", cycle=None))
        assert all(one.startswith(" ") for one in line.split("\n")[1:])
        assert "sk-pairloop-…" in line
        assert token.rsplit("-", 1)[1] not in line
    line = logs.TextFormatter().format(record("a\nb", policy="bot", cycle=None))
    assert line == "2026-05-04T03:02:01.123Z INFO pairloop.test: a\n    b [policy=bot]"


@settings(max_examples=40)
@given(st.text(st.characters(categories=["Cc", "Zl", "Zp", "Lu"])), st.text(st.characters(categories=["Cc", "Zl", "Zp", "Lu"])))
def test_no_text_makes_a_line_of_its_own(message: str, value: str) -> None:
    """Nor in what is read as lines elsewhere: a form feed, say, or an escape of a terminal."""
    lines = logs.TextFormatter().format(record(message, path=value)).splitlines()
    assert [line for line in lines if not line.startswith("    ")] == lines[:1]
    assert not any(character < " " and character != "\t" for line in lines for character in line)


def test_fields_of_a_text_line_cannot_forge_another() -> None:
    line = logs.TextFormatter().format(record("asked", path="/v1/x\n2026-05-04T03:02:01.123Z ERROR pairloop: all is lost"))
    assert line.endswith("asked [path=/v1/x\\n2026-05-04T03:02:01.123Z ERROR pairloop: all is lost]")


@pytest.mark.usefixtures("restored")
def test_lines_say_what_they_are_about_also_in_tasks_and_what_was_raised(tmp_path: Path) -> None:
    logs.setup(LogSection(format="json", file=str(tmp_path / "log")), background=True)
    logger = logging.getLogger("pairloop.test")

    async def work() -> None:
        with logs.about(policy="bot", cycle=3):
            await asyncio.gather(*(asyncio.to_thread(logger.info, "in a thread") for _ in range(2)))
            with logs.about(run="run_1"):
                logger.info("inside", extra=logs.extra(cycle=4))
        logger.info("after")

    asyncio.run(work())
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("it broke")
    logging.getLogger("somebody.else").info("not shown")
    assert logs._installed is not None
    logs._installed[1].close()
    found = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    about = [{name: line.get(name) for name in ("message", "policy", "cycle", "run")} for line in found]
    assert about == [
        {"message": "in a thread", "policy": "bot", "cycle": 3, "run": None},
        {"message": "in a thread", "policy": "bot", "cycle": 3, "run": None},
        {"message": "inside", "policy": "bot", "cycle": 4, "run": "run_1"},
        {"message": "after", "policy": None, "cycle": None, "run": None},
        {"message": "it broke", "policy": None, "cycle": None, "run": None},
    ]
    assert "ValueError: broken" in found[-1]["exception"]


def test_a_log_that_nobody_reads_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "WAITING_LINES", 10)
    open_, written = threading.Event(), []

    class Stuck(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            open_.wait(20)
            written.append(self.format(record))

    handler = logs._Background(Stuck())
    handler.setFormatter(logs.TextFormatter())
    for number in range(100):
        handler.handle(record(f"line {number}"))
    open_.set()
    handler.close()
    lost = [line for line in written if "lines were lost" in line]
    kept = len(written) - len(lost)
    assert 10 <= kept <= 11
    assert sum(int(line.split(": ", 1)[1].split(" ", 1)[0]) for line in lost) == 100 - kept


def test_a_child_logs_as_its_parent_does_on_its_own_stderr() -> None:
    env = {**dict(zip(logs.VARIABLES, ("json", "debug"), strict=True)), "PAIRLOOP_LOG_FILE": "/elsewhere"}
    assert log_of_child(env) == LogSection(format="json", level="debug")
    with pytest.raises(ConfigError, match=r"log\.file: /nowhere/at/all cannot be written"):
        logs.setup(LogSection(file="/nowhere/at/all"))


@pytest.mark.usefixtures("restored")
def test_a_servers_log_tells_who_asked_what_and_no_word_of_it(serve: Serve, tmp_path: Path) -> None:
    logs.setup(LogSection(format="json", level="debug", file=str(tmp_path / "log")), background=True)
    server = serve()
    key, token = keys.new("ours", [Scope.ADMIN])
    server.store.write(lambda c: keys.insert(c, key))
    server.app.state.context.keys.forget(key.key_id)
    headers = {"authorization": f"Bearer {token}", "traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    body = chat_body(n=2, messages=[{"role": "user", "content": WORDS}], user=f"{WORDS}@example.org")
    reply = server.http.post("/v1/chat/completions", json=body, headers=headers)
    pick = {"inference_id": reply.json()["id"], "chosen_index": 0, "reason": WORDS, "rater_id": WORDS}
    assert server.http.post("/v1/preferences", json=pick, headers=headers).status_code == 201
    assert server.http.get(f"/v1/raters/{WORDS}", headers=headers).status_code in (200, 404, 405)
    assert server.http.get(f"/v1/raters/{WORDS}").status_code == 401, "before a route is looked for"
    assert server.http.delete(f"/v1/raters/{WORDS}", headers=headers).status_code == 405
    assert server.http.get(f"/v1/nowhere/{WORDS}", headers=headers).status_code == 404
    server.store.write(lambda c: c.execute(sa.text("DROP TABLE stored_metadata")))
    server.http.post("/v1/chat/completions", json=body | {"metadata": {"a": WORDS}, "store": True}, headers=headers)
    assert logs._installed is not None
    logs._installed[1].close()
    text = (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    (asked,) = [line for line in lines if line.get("request_id") == reply.headers["x-request-id"] and "route" in line]
    wanted = {"route": "/v1/chat/completions", "method": "POST", "status": 200, "key": key.key_id, "trace_id": "ab" * 16}
    assert asked.items() >= wanted.items()
    assert asked["ms"] > 0
    assert {"/v1/raters", "/v1/nowhere"} <= {line.get("path") for line in lines}
    assert WORDS not in text
    assert token.rsplit("-", 1)[1] not in text


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("texts", [True, False])
def test_a_worker_minds_what_the_log_may_say(tmp_path: Path, texts: bool) -> None:
    path = write_config(tmp_path / "bot", {"policy": {"model": "fake"}, "privacy": {"log_texts": texts}})
    heard: list[bool] = []

    def say(_: str) -> None:
        heard.append(not TEXTS.disabled)
        os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        work(path, None, say=say)
    finally:
        TEXTS.disabled = True
        for number, handler in before.items():
            signal.signal(number, handler)
    assert heard == [texts]


def test_what_a_database_refuses_is_not_quoted(tmp_path: Path) -> None:
    with World(tmp_path) as world, pytest.raises(StoreError) as caught:
        world.store.write(lambda c: c.execute(sa.text("INSERT INTO nowhere VALUES (:words)"), {"words": WORDS}))
    assert WORDS not in "".join(traceback.format_exception(caught.value))


# --- traces


@pytest.fixture
def spans() -> Iterator[Callable[[], list[ReadableSpan]]]:
    exporter = InMemorySpanExporter()
    recorder = OtelRecorder(OtelSection(), exporter)
    traces.use(recorder)

    def found() -> list[ReadableSpan]:
        recorder._provider.force_flush()
        return list(exporter.get_finished_spans())

    yield found
    traces.use(None)


def of(span: ReadableSpan) -> Mapping[str, Any]:
    return dict(span.attributes or {})


def test_a_chat_is_a_span_of_its_callers_trace_and_a_pick_an_evaluation(
    serve: Serve, spans: Callable[[], list[ReadableSpan]]
) -> None:
    server = serve()
    trace = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    words = [{"role": "user", "content": WORDS}]
    body = chat_body(n=2, user=user_of(Pool.TRAIN), messages=words, temperature=0.9, metadata={"conversation_id": "talk"})
    answered = server.http.post("/v1/chat/completions", json=body, headers=trace).json()
    server.http.post("/v1/preferences", json={"inference_id": answered["id"], "chosen_index": 1, "reason": WORDS})
    server.http.post(
        "/v1/feedback", json={"inference_id": answered["id"], "choice_index": 0, "metric_name": "score", "value": 0.5}
    )
    server.http.post("/v1/chat/completions", json=chat_body(stream=True, messages=words))
    server.chat(model="nobody")
    chat, pick, score, streamed, failed = spans()
    assert chat.name == f"chat {POLICY}"
    assert chat.context is not None
    assert f"{chat.context.trace_id:032x}" == "ab" * 16
    assert chat.parent is not None
    assert f"{chat.parent.span_id:016x}" == "cd" * 8
    wanted = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": POLICY,
        "gen_ai.response.model": f"{POLICY}@0",
        "gen_ai.response.id": answered["id"],
        "gen_ai.conversation.id": "talk",
        "gen_ai.request.temperature": 0.9,
        "gen_ai.request.choice.count": 2,
        "gen_ai.usage.input_tokens": answered["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": answered["usage"]["completion_tokens"],
        "gen_ai.response.finish_reasons": ("stop", "stop"),
        "server.address": "127.0.0.1",
    }
    assert of(chat).items() >= wanted.items()
    for span, about in (
        (pick, {"gen_ai.evaluation.name": "preference", "gen_ai.evaluation.score.label": "B"}),
        (score, {"gen_ai.evaluation.name": "score", "gen_ai.evaluation.score.value": 0.5}),
    ):
        (event,) = span.events
        assert event.name == "gen_ai.evaluation.result"
        assert dict(event.attributes or {}).items() >= {**about, "gen_ai.response.id": answered["id"]}.items()
        assert [link.context for link in span.links] == [chat.context]
    assert of(streamed)["gen_ai.request.stream"] is True
    assert of(streamed)["gen_ai.usage.output_tokens"] > 0
    assert of(failed)["error.type"] == "NotFoundError"
    assert WORDS not in "".join(span.to_json() for span in spans())


def test_a_duels_span_names_no_version(serve: Serve, spans: Callable[[], list[ReadableSpan]]) -> None:
    server = serve()
    server.add_version(1)
    server.open_duel(1)
    for stream in (False, True):
        server.chat(n=2, user=user_of(Pool.GATE), stream=stream)
    found = spans()
    assert len(found) == 2
    for span in found:
        assert "gen_ai.response.model" not in of(span)
        assert f"{POLICY}@" not in span.to_json()
        assert "duel" not in span.to_json()


def test_a_cycle_is_one_trace_across_processes(spans: Callable[[], list[ReadableSpan]]) -> None:
    steps: tuple[CycleStep, ...] = ()
    for number, state in enumerate((CycleState.BUILDING, CycleState.TRAINING, CycleState.FAILED)):
        steps = (*steps, CycleStep(state, {}, NOW + timedelta(seconds=number)))
        if number:
            traces.cycle_moved(Cycle("cycle_1", POLICY, 7, 0, "test", NOW, steps))
    building, training, whole = spans()
    assert [span.name for span in (building, training, whole)] == ["cycle building", "cycle training", "cycle"]
    assert whole.context is not None
    for child in (building, training):
        assert child.context is not None
        assert child.parent is not None
        assert (child.parent.trace_id, child.parent.span_id) == (whole.context.trace_id, whole.context.span_id)
        assert (child.end_time or 0) - (child.start_time or 0) == pytest.approx(1e9, rel=1e-6)
    assert whole.parent is None or not whole.parent.is_valid
    assert not whole.status.is_ok
    assert of(whole)["pairloop.cycle.state"] == "failed"


def test_a_collector_gets_them_by_otlp() -> None:
    came: list[tuple[str, ExportTraceServiceRequest]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            came.append((self.path, request))
            body = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    collector = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        section = OtelSection(endpoint=f"http://127.0.0.1:{collector.server_port}", service_name="our-bot")
        traces.setup(section)
        traces.chat("bot", {}, {}).end()
        traces.use(None)
    finally:
        collector.shutdown()
        thread.join()
        collector.server_close()
    ((path, request),) = came
    assert path == "/v1/traces"
    (resource,) = request.resource_spans
    assert {one.key: one.value.string_value for one in resource.resource.attributes}["service.name"] == "our-bot"
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["chat bot"]


def test_a_bad_endpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="is not the URL of an OTLP/HTTP receiver"):
        OtelSection(endpoint="collector:4318")


@pytest.mark.slow
def test_neither_sdk_nor_exporter_is_imported_where_it_is_off() -> None:
    """The bare API is: FastAPI brings it."""
    names = "('opentelemetry.sdk', 'opentelemetry.exporter', 'pairloop.telemetry.otel')"
    code = f"import sys, pairloop.web.server, pairloop.cli.working; print([n for n in sys.modules if n.startswith({names})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
