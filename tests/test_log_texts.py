"""The log never holds what people wrote or were answered, whatever goes wrong, unless `privacy.log_texts` says so."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tests.loop_rig import open_rig, settings
from tests.server import RunningServer, World, fake_config
from tests.waiting import until

from pairloop.config import PrivacySection, override
from pairloop.errors import TEXTS, place_of, trace_of
from pairloop.loop import label
from pairloop.loop.deploy.watch import Watch
from pairloop.loop.schedule import Scheduler
from pairloop.loop.serve.recorder import Recorder
from pairloop.policy.fake import FakePolicy
from pairloop.policy.protocols import SampleRequest
from pairloop.redaction import Redactor, hook_of
from pairloop.store.writer import GroupCommitWriter
from pairloop.types import Completion
from pairloop.webhooks import Sender

S = "sentinel-of-the-log"


class Everything(logging.Handler):
    """Every record at every level, as any formatter could write it."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name} {record.levelname} {logging.Formatter().format(record)} {record.args!r}")


@pytest.fixture
def log() -> Iterator[Everything]:
    root, handler = logging.getLogger(), Everything()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    root.setLevel(before)
    TEXTS.disabled = True


class Quoting(FakePolicy):
    """Samples, until it is told to fail; then it raises what it was asked, as a careless engine does."""

    failing = False
    midway = False

    def sample(self, request: SampleRequest) -> Future[tuple[Completion, ...]]:
        if not self.failing:
            return super().sample(request)
        if not self.midway:
            raise RuntimeError(f"cannot answer {S}")
        done: Future[tuple[Completion, ...]] = Future()
        inner = super().sample(request)

        def fail(_: Any) -> None:
            done.set_exception(ValueError(f"broke off at {S}"))

        inner.add_done_callback(fail)
        return done


def explode(text: str) -> str:
    """A redaction hook: ``tests.test_log_texts:explode``."""
    raise KeyError(text)


def judge(_messages: Any, completion: str) -> float:
    """A verifier: ``tests.test_log_texts:judge``."""
    raise AssertionError(f"{S} {completion}")


def provoke(server: RunningServer, policy: Quoting) -> list[int]:
    """Requests that hold the sentinel wherever they can, good ones and those that fail in many ways; their status codes."""
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": S}], "metadata": {"a": S}, "user": "jane"}
    tool = {"type": "function", "function": {"name": "f", "description": S, "parameters": S}}
    http, codes = server.http, []
    good = server.chat(**ask, n=2)
    group_id = good.json()["id"]
    pick = {"id": "p", "inference_id": group_id, "chosen_index": 0, "reason": S, "edited_text": S, "tags": {"t": S}}
    bodies: list[tuple[str, Any]] = [
        ("/v1/preferences", pick),
        ("/v1/preferences", pick | {"reason": f"{S} again"}),
        ("/v1/preferences", pick | {"chosen_index": S}),
        ("/v1/feedback", {"inference_id": group_id, "metric_name": "comment", "value": S, "comment": S}),
        ("/v1/feedback", {"inference_id": group_id, "metric_name": "thumbs", "value": S}),
        ("/v1/feedback", {"conversation_id": "none", "metric_name": "resolved", "value": True, "comment": S}),
        ("/v1/chat/completions", {"model": "support-bot", "messages": S}),
        ("/v1/chat/completions", {"model": "support-bot", "messages": [{"role": S, "content": S}]}),
        ("/v1/chat/completions", {"model": "support-bot", **ask, "tools": [tool]}),
        ("/v1/chat/completions", {"model": "support-bot", "messages": [{"role": "user", "content": f"{S} " * 90_000}]}),
    ]
    codes += [
        http.post(path, json=body, headers={"idempotency-key": f"k{i}"}).status_code for i, (path, body) in enumerate(bodies)
    ]
    codes.append(http.post("/v1/chat/completions", content=f'{{"messages": [{S}').status_code)
    half = f'{{"model": "support-bot", "messages": [{{"role": "user", "content": "{S} \\ud800"}}]}}'
    codes.append(http.post("/v1/chat/completions", content=half).status_code)
    rows = {"file": ("rows.jsonl", f'{{"messages": "{S}'.encode())}
    codes.append(http.post("/v1/files", files=rows, data={"purpose": "fine-tune"}).status_code)
    codes.append(http.post("/v1/erasures", json={"user": "jane", "reason": S, "dryrun": True}).status_code)
    codes.append(server.chat(**ask, stream=True).status_code)
    policy.failing = True
    codes.append(server.chat(**ask).status_code)
    policy.midway = True
    codes.append(server.chat(**ask).status_code)
    codes.append(server.chat(**ask, stream=True).status_code)
    policy.failing = False
    hook = hook_of(PrivacySection(redact="tests.test_log_texts:explode"))
    assert hook is not None
    server.store.redactor = Redactor(hook, b"key")
    codes.append(server.chat(**ask).status_code)
    server.store.redactor = None
    server.store.write(lambda c: c.execute(sa.text("ALTER TABLE feedback RENAME TO gone")))
    codes.append(http.post("/v1/preferences", json=pick | {"id": "q"}).status_code)
    return codes


def test_no_line_of_any_level_holds_a_message(tmp_path: Path, log: Everything) -> None:
    policy = Quoting()
    with RunningServer(tmp_path, config=fake_config(tmp_path), policy=policy) as server:
        codes = provoke(server, policy)
    assert {200, 201, 400, 404, 409, 500, 503} <= set(codes), codes
    told = [line for line in log.lines if S in line and not line.startswith(("httpx", "httpcore", "openai", "asyncio"))]
    assert told == []
    failures = [line for line in log.lines if line.startswith("pairloop.web") and " ERROR " in line]
    assert any("RuntimeError" in line and "test_log_texts.py" in line for line in failures), "what and where is told"


def test_a_labeller_and_a_cycle_that_fail_do_not_quote_either(tmp_path: Path, log: Everything) -> None:
    config = override(settings(tmp_path), {"label": {"verifier": "tests.test_log_texts:judge"}})
    with open_rig(config) as rig:
        rig.serve(3, train=None, gate=None)
        record = label.run(rig.store, config)
        assert (record.errors, S in str(record.reasons)) == (3, False)
        scheduler = Scheduler(rig.loop)
        scheduler._tick = lambda: (_ for _ in ()).throw(ValueError(S))  # type: ignore[method-assign]
        scheduler.start()

        def broke() -> bool:
            scheduler.notify()
            return any("the cycle broke" in line for line in log.lines)

        until(broke)
        scheduler.stop()
    assert [line for line in log.lines if S in line] == []


def test_what_works_in_the_background_and_fails_does_not_quote_either(
    tmp_path: Path, log: Everything, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise ValueError(S)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", S)

    def told(text: str) -> bool:
        return any(text in line and "Error" in line for line in log.lines)

    monkeypatch.setenv("HOOK_KEY", "key")
    endpoint = {"name": "ops", "url": "http://127.0.0.1:1", "secret_env": "HOOK_KEY"}
    config = fake_config(tmp_path, webhooks={"endpoints": [endpoint]})
    with World(tmp_path / "world", config=config) as world:
        sender, watch = Sender(world.store, config, "here:1"), Watch(world.store, world.policy, config, every_s=0.01)
        monkeypatch.setattr(sender, "_is_due", fails)
        monkeypatch.setattr(watch, "look", fails)
        sender.start()
        watch.start()
        recorder = Recorder(world.store, world.policy, config.policy.name, config.deploy)
        monkeypatch.setattr(recorder, "flush", lambda: world.store.submit(fails))
        asyncio.run(recorder._flushed())
        writer = GroupCommitWriter(world.store._writing, "picks", flush=full)
        writer.submit(lambda _: None).result()
        writer.close()
        wanted = ("webhooks broke", "live guards failed", "could not be written", "to the disk (No space left on device)")
        until(lambda: all(map(told, wanted)), why=lambda: [text for text in wanted if not told(text)])
        sender.stop()
        watch.stop()
    assert [line for line in log.lines if S in line] == []


@pytest.mark.slow
def test_a_setting_lets_the_log_say_it_all(tmp_path: Path, log: Everything) -> None:
    TEXTS.disabled = False
    policy = Quoting()
    policy.failing = True
    with RunningServer(tmp_path, policy=policy) as server:
        assert server.chat().status_code == 500
    assert any(line.startswith("pairloop.texts") and S in line for line in log.lines)


def test_an_error_is_told_by_type_and_place_with_its_causes() -> None:
    def fails() -> None:
        try:
            int("x")
        except ValueError as error:
            raise KeyError(S) from error

    with pytest.raises(KeyError) as failed:
        fails()
    assert place_of(failed.value).startswith("KeyError (test_log_texts.py:")
    lines = trace_of(failed.value).splitlines()
    assert [line for line in lines if not line.startswith("  ")] == ["KeyError", "ValueError"]
    assert S not in "".join(lines)
