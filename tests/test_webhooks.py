"""Webhooks: what happened reaches its receivers, signed, at least once, under one id, and holds nothing up."""

from __future__ import annotations

import base64
import json
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import InvalidWebhookSignatureError, OpenAI
from openai.types.webhooks import FineTuningJobSucceededWebhookEvent
from sqlalchemy import Connection
from tests.server import POLICY, World, fake_config
from tests.waiting import PATIENCE_S, until

from pairloop.cli import pairloop
from pairloop.config import Config, load_config
from pairloop.errors import ConfigError
from pairloop.loop.cycle import register_base
from pairloop.scaffold import write_config
from pairloop.store import Store, cycles, deliveries, events, files, jobs, leases, schema, versions
from pairloop.store.deliveries import DeliveryStatus
from pairloop.store.events import Event
from pairloop.store.files import FileStatus, Purpose, StoredFile
from pairloop.store.jobs import Job, JobStatus
from pairloop.types import Alias, CycleState, CycleStep
from pairloop.webhooks import Sender, message_of, sender, watch

KEY = "whsec_" + base64.b64encode(b"a key of 32 bytes, as it should be").decode()
NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
CLIENT = OpenAI(api_key="any")


@dataclass
class Receiver:
    """What came, and what is answered: ``answers`` in turn, then 204."""

    url: str = ""
    answers: list[int] = field(default_factory=list)
    came: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    more: threading.Condition = field(default_factory=threading.Condition)

    def wait(self, number: int) -> list[dict[str, Any]]:
        """The bodies, once so many have come."""
        with self.more:
            assert self.more.wait_for(lambda: len(self.came) >= number, PATIENCE_S), self.types()
            return [json.loads(body) for _, body in self.came]

    def types(self) -> list[str]:
        return [json.loads(body)["type"] for _, body in self.came]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@contextmanager
def receiving() -> Iterator[Receiver]:
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            with found.more:
                status = found.answers.pop(0) if found.answers else 204
                found.came.append(({name.lower(): value for name, value in self.headers.items()}, body))
                found.more.notify_all()
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("location", f"{found.url}/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_KEY", KEY)
    monkeypatch.setattr(sender, "POLL_S", 0.01)
    monkeypatch.setattr(sender, "FIRST_RETRY_S", 0.01)


def config_to(folder: Path, receiver: Receiver, *, url: str | None = None, **settings: Any) -> Config:
    kinds = settings.pop("events", ())
    endpoint = {"name": "ops", "url": url or receiver.url, "secret_env": "HOOK_KEY", "events": kinds}
    # The disk that tests run on may be nearly full, which is told, too.
    return fake_config(folder, webhooks={"endpoints": [endpoint], "disk_low": 0.0, **settings})


@contextmanager
def sending(store: Store, config: Config, owner: str = "here:0") -> Iterator[Sender]:
    found = Sender(store, config, owner)
    found.start()
    try:
        yield found
    finally:
        found.stop()


def status_of(store: Store, wanted: Callable[[list[deliveries.Delivery]], bool]) -> list[deliveries.Delivery]:
    """The deliveries, once they are as wanted."""

    def found() -> list[deliveries.Delivery]:
        with store.reading() as c:
            return deliveries.list_(c, POLICY)

    return until(lambda: (rows,) if wanted(rows := found()) else None, why=found)[0]


def all_are(status: DeliveryStatus, number: int) -> Callable[[list[deliveries.Delivery]], bool]:
    return lambda found: [one.status for one in found] == [status] * number


def promote(c: Connection) -> None:
    move: Any = {"number": 0, "previous": None, "action": "promote", "reason": "by hand", "cycle_id": None, "at": NOW}
    versions.record_promotion(c, POLICY, **move)


# --- what is sent


@settings(max_examples=20)
@given(key=st.binary(min_size=1, max_size=64), reason=st.text(max_size=40), flip=st.integers(0, 10_000))
def test_openais_client_takes_the_signature_and_refuses_any_other_body(key: bytes, reason: str, flip: int) -> None:
    secret = "whsec_" + base64.b64encode(key).decode()
    event = Event(1, "evt_1", "version.promoted", POLICY, {"id": f"{POLICY}@3", "reason": reason}, NOW)
    message = message_of(event, key, sent_at=int(datetime.now(UTC).timestamp()))
    found = CLIENT.webhooks.unwrap(message.body, message.headers, secret=secret)
    assert (found.id, found.type) == ("evt_1", "version.promoted")
    body = bytearray(message.body)
    body[flip % len(body)] ^= 1
    with pytest.raises((InvalidWebhookSignatureError, UnicodeDecodeError)):
        CLIENT.webhooks.unwrap(bytes(body), message.headers, secret=secret)
    other = {**message.headers, "webhook-id": "evt_2"}
    with pytest.raises(InvalidWebhookSignatureError):
        CLIENT.webhooks.unwrap(message.body, other, secret=secret)


def test_a_duel_its_end_and_a_promotion_are_told_in_order(tmp_path: Path, receiver: Receiver) -> None:
    config = config_to(tmp_path, receiver)
    with World(tmp_path / "world", config=config) as world, sending(world.store, config):
        world.add_version(1)
        duel = world.open_duel(1)
        world.close_duel(duel, CycleState.HELD, {"reason": "2,000 picks\nlast words of a process", "version": 1})
        world.store.write(promote)
        bodies = receiver.wait(4)
        found = status_of(world.store, all_are(DeliveryStatus.DELIVERED, 4))
    assert [body["type"] for body in bodies] == ["cycle.started", "cycle.ended", "gate.held", "version.promoted"]
    assert bodies[1]["data"] == {
        "id": "cycle_1", "policy": POLICY, "number": 1, "state": "held", "version": 1, "reason": "2,000 picks",
    }  # fmt: skip
    assert bodies[3]["data"]["id"] == f"{POLICY}@0"
    assert {one.attempts for one in found} == {1}
    for headers, body in receiver.came:
        assert CLIENT.webhooks.unwrap(body, headers, secret=KEY).id == headers["webhook-id"]


def test_a_job_is_told_as_openai_tells_it_once(tmp_path: Path, receiver: Receiver) -> None:
    config = config_to(tmp_path, receiver)
    rows = StoredFile(
        "file-1", "rows.jsonl", Purpose.FINE_TUNE, 1, "hash", str(tmp_path / "rows"), FileStatus.PROCESSED, None, NOW
    )
    job = Job("ftjob-1", JobStatus.RUNNING, POLICY, "a lineage of its own", 0, rows.file_id, {}, 0, NOW)
    with World(tmp_path / "world", config=config) as world, sending(world.store, config):

        def work(c: Connection) -> None:
            files.insert(c, rows)
            jobs.insert(c, job)
            assert jobs.update(c, job, progress={"step": 1})
            assert jobs.update(c, job, status=JobStatus.SUCCEEDED, finished_at=NOW)
            assert not jobs.update(c, job, status=JobStatus.SUCCEEDED, finished_at=NOW), "it has ended"

        world.store.write(work)
        world.store.write(promote)
        assert [body["type"] for body in receiver.wait(2)] == ["fine_tuning.job.succeeded", "version.promoted"]
    headers, body = receiver.came[0]
    found = CLIENT.webhooks.unwrap(body, headers, secret=KEY)
    assert isinstance(found, FineTuningJobSucceededWebhookEvent)
    assert found.data.id == "ftjob-1"


def test_what_was_rolled_back_did_not_happen(tmp_path: Path, receiver: Receiver) -> None:
    config = config_to(tmp_path, receiver)
    with World(tmp_path / "world", config=config) as world, sending(world.store, config):
        world.add_version(1)
        world.open_duel(1)

        def fail(c: Connection) -> None:
            cycles.step(c, "cycle_1", CycleStep(CycleState.FAILED, {"reason": "never"}, NOW))
            raise RuntimeError("the act failed after its row")

        with pytest.raises(RuntimeError):
            world.store.write(fail)
        world.store.write(promote)
        assert [body["type"] for body in receiver.wait(2)] == ["cycle.started", "version.promoted"]


# --- until it is taken


def test_a_refusal_is_tried_again_under_the_same_id(tmp_path: Path, receiver: Receiver) -> None:
    receiver.answers = [500, 429, 302]
    config = config_to(tmp_path, receiver)
    with World(tmp_path / "world", config=config) as world, sending(world.store, config):
        world.store.write(promote)
        receiver.wait(4)
        (one,) = status_of(world.store, all_are(DeliveryStatus.DELIVERED, 1))
    assert one.attempts == 4
    assert len({headers["webhook-id"] for headers, _ in receiver.came}) == 1, "and no redirect was followed"
    assert len({body for _, body in receiver.came}) == 1


def test_what_no_one_took_is_sent_by_the_next_process_and_a_new_endpoint_hears_no_history(
    tmp_path: Path, receiver: Receiver
) -> None:
    with receiving() as gone:
        dead = config_to(tmp_path, receiver, url=gone.url)
    with World(tmp_path / "world", config=dead) as world:
        world.store.write(promote)
        with sending(world.store, dead, "here:1"):
            world.store.write(promote)
            (first,) = status_of(world.store, lambda found: bool(found) and found[0].attempts > 0)
        assert first.error is not None
        assert "ConnectError" in first.error
        with sending(world.store, config_to(tmp_path, receiver), "here:2"):
            (body,) = receiver.wait(1)
            status_of(world.store, all_are(DeliveryStatus.DELIVERED, 1))
    assert body["id"] == first.event.event_id


@pytest.mark.parametrize(("answers", "give_up"), [([410], "24h"), ([500] * 50, "0.05s")])
def test_it_gives_up_when_told_to_or_in_the_end_and_can_be_asked_again(
    tmp_path: Path, receiver: Receiver, answers: list[int], give_up: str
) -> None:
    receiver.answers = list(answers)
    config = config_to(tmp_path, receiver, give_up=give_up)
    with World(tmp_path / "world", config=config) as world, sending(world.store, config):
        world.store.write(promote)
        status_of(world.store, all_are(DeliveryStatus.FAILED, 1))
        receiver.answers.clear()
        assert world.store.write(lambda c: deliveries.again(c, POLICY, datetime.now(UTC))) == 1
        status_of(world.store, all_are(DeliveryStatus.DELIVERED, 1))


def test_a_filter_holds_and_two_processes_tell_once(tmp_path: Path, receiver: Receiver) -> None:
    config = config_to(tmp_path, receiver, events=["version.promoted"])
    with World(tmp_path / "world", config=config) as world:
        with sending(world.store, config, "here:1"), sending(world.store, config, "elsewhere:2"):
            world.add_version(1)
            world.open_duel(1)
            for _ in range(30):
                world.store.write(promote)
            receiver.wait(30)
            status_of(world.store, all_are(DeliveryStatus.DELIVERED, 30))
        ids = [headers["webhook-id"] for headers, _ in receiver.came]
    assert set(receiver.types()) == {"version.promoted"}
    assert len(ids) == len(set(ids)) == 30


def test_who_has_nothing_to_tell_holds_no_lease(tmp_path: Path, receiver: Receiver) -> None:
    config = config_to(tmp_path, receiver)
    with World(tmp_path / "world", config=config) as world, sending(world.store, config):
        lease = f"webhooks:{POLICY}"
        for number in (1, 2):
            world.store.write(promote)
            status_of(world.store, all_are(DeliveryStatus.DELIVERED, number))
            until(lambda: holder_of(world.store, lease) is None)


def holder_of(store: Store, lease: str) -> str | None:
    with store.reading() as c:
        return leases.holder(c, lease)


def test_who_left_the_configuration_is_waited_for_no_longer(tmp_path: Path) -> None:
    with receiving() as gone:
        config = config_to(tmp_path, gone)
    with World(tmp_path / "world", config=config) as world:
        with sending(world.store, config):
            world.store.write(promote)
            status_of(world.store, lambda found: bool(found) and found[0].attempts > 0)
        with sending(world.store, fake_config(tmp_path)):
            (one,) = status_of(world.store, all_are(DeliveryStatus.FAILED, 1))
    assert one.error == "the endpoint left the configuration"


def test_waits_grow_to_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "FIRST_RETRY_S", 5.0)
    middles = [sender.retry_s(attempt, _Middle()) for attempt in (1, 2, 3, 12, 2_000)]
    assert middles == [5, 10, 20, 3_600, 3_600]
    assert 2.5 <= sender.retry_s(1) <= 7.5


class _Middle(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


def test_a_full_disk_is_told_once_until_it_had_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free: dict[str, float | None] = {"share": 0.5}
    monkeypatch.setattr(watch, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(watch, "free_share", lambda _: free["share"])
    with World(tmp_path) as world:
        disk = watch.DiskWatch(world.store, world.config)
        told = []
        for share in (0.5, 0.09, 0.05, 0.11, 0.09, 0.2, 0.02, None):
            free["share"] = share
            disk.look()
            with world.store.reading() as c:
                told.append(events.newest_seq(c))
    assert told == [0, 2, 2, 2, 2, 2, 4, 4], "one for each folder, each time that it falls"


# --- for the operator


def test_the_verbs_list_test_and_redeliver(tmp_path: Path, receiver: Receiver) -> None:
    endpoint = {"name": "ops", "url": receiver.url, "secret_env": "HOOK_KEY"}
    path = write_config(tmp_path / "bot", {"policy": {"model": "fake"}})
    text = "".join(f'{name} = "{value}"\n' for name, value in endpoint.items())
    path.write_text(path.read_text() + f"\n[[webhooks.endpoints]]\n{text}")
    run = CliRunner()

    def ask(*arguments: str) -> Mapping[str, Any]:
        done = run.invoke(pairloop, ["webhooks", *arguments, "--config", str(path), "--json"])
        return {"exit": done.exit_code, **json.loads(done.stdout)}

    sent = ask("test", "ops")
    assert (sent["exit"], sent["delivered"]) == (0, True)
    assert str(CLIENT.webhooks.unwrap(receiver.came[0][1], receiver.came[0][0], secret=KEY).type) == "webhook.test"
    receiver.answers = [500]
    refused = ask("test", "ops")
    assert (refused["exit"], refused["error"]) == (1, "the receiver answered 500")
    assert ask("test", "nobody")["error"]["message"] == "no webhook 'nobody'; the configuration has: ops"
    assert ask("list")["endpoints"][0]["name"] == "ops"
    assert KEY not in run.invoke(pairloop, ["webhooks", "list", "--config", str(path)]).stdout
    assert ask("redeliver")["pending"] == 0
    assert ask("redeliver", "--endpoint", "nobody")["error"]["message"] == "no webhook 'nobody'; the configuration has: ops"
    assert "no delivery of 'evt_x'" in ask("redeliver", "evt_x")["error"]["message"]


def test_what_the_doctor_finds_is_told(tmp_path: Path) -> None:
    path = write_config(tmp_path / "bot", {"policy": {"model": "fake"}})
    config = load_config(path, env={})
    with Store.open(config) as store:
        register_base(store, config)
        store.write(lambda c: versions.set_alias(c, POLICY, Alias.CHAMPION, None))
    assert CliRunner().invoke(pairloop, ["doctor", "--config", str(path)]).exit_code == 1
    with Store.open(config) as store, store.reading() as c:
        (row,) = c.execute(sa.select(schema.events))
        assert (row.type, row.policy, row.data) == ("doctor.problem", POLICY, {"problems": 1, "codes": ["no_champion"]})


def test_a_missing_or_broken_key_is_refused_at_start(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_to(tmp_path, receiver)
    with World(tmp_path / "world", config=config) as world:
        monkeypatch.setenv("HOOK_KEY", "whsec_not base64")
        with pytest.raises(ConfigError, match="HOOK_KEY begins with whsec_"):
            Sender(world.store, config, "here:0")
        monkeypatch.setenv("HOOK_KEY", "whsec_")
        with pytest.raises(ConfigError, match="HOOK_KEY begins with whsec_, but nothing follows"):
            Sender(world.store, config, "here:0")
        monkeypatch.delenv("HOOK_KEY")
        with pytest.raises(ConfigError, match="HOOK_KEY is not set"):
            Sender(world.store, config, "here:0")


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ({"url": "file:///etc/passwd"}, "is not a URL"),
        ({"events": ["cycle.begun"]}, "cycle.started"),
        ({"secret_env": None}, "secret_env"),
    ],
)
def test_bad_endpoints_are_refused(tmp_path: Path, endpoint: dict[str, Any], reason: str) -> None:
    good = {"name": "ops", "url": "http://127.0.0.1:1", "secret_env": "HOOK_KEY"}
    with pytest.raises(ConfigError, match=reason):
        fake_config(tmp_path, webhooks={"endpoints": [{**good, **endpoint}]})
