"""Metrics: what is exposed parses, says what the store says, is documented, and is cheap to ask for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Connection
from tests.loop_rig import Rig, open_rig, settings
from tests.server import POLICY, RunningServer, World, chat_body, fake_config, user_of
from tests.store_rows import a_group, a_pick

from pairloop.errors import StoreError
from pairloop.loop import cycle
from pairloop.metrics import exporting, live_registry
from pairloop.store import deliveries, events, feedback, groups, keys, leases, quarantines
from pairloop.store.deliveries import DeliveryStatus
from pairloop.store.keys import Scope
from pairloop.store.quarantines import Action, Quarantine
from pairloop.types import CycleState, Group, Pool
from pairloop.web.metrics import Metrics

Serve = Callable[..., RunningServer]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
DOCS = Path(__file__).parent.parent / "docs"
RULES = DOCS / "prometheus-rules.yaml"


def samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found[f"pairloop_{name}", frozenset(labels.items())]


def scraped(server: RunningServer) -> Samples:
    return samples(server.http.get("/metrics").text)


def test_what_requests_leave_behind(serve: Serve) -> None:
    server = serve()
    server.chat()
    picked = server.chat(n=2, user=user_of(Pool.TRAIN)).json()["id"]
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as reply:
        reply.read()
    assert server.http.post("/v1/preferences", json={"inference_id": picked, "chosen_index": 0}).status_code == 201
    assert server.chat(model="nobody").status_code == 404
    server.http.get("/nowhere")
    found = scraped(server)
    chats = {"route": "/v1/chat/completions", "method": "POST"}
    assert value(found, "requests_total", **chats, status="200") == 3
    assert value(found, "request_seconds_count", route="/v1/chat/completions") == 4
    assert value(found, "overhead_seconds_count") == 3, "only where something was sampled"
    assert 0 < value(found, "overhead_seconds_sum") < 3
    assert value(found, "first_token_seconds_count") == 1, "only of streams"
    assert value(found, "picks_total", label="A") == 1
    assert value(found, "errors_total", code="model_not_found") == 1
    assert value(found, "requests_total", route="unmatched", method="GET", status="404") == 1
    assert value(found, "store_up") == 1
    assert value(found, "draining") == 0
    assert value(found, "process_resident_memory_bytes") > 1e6
    assert 0 < value(found, "disk_free_ratio", folder="state") <= 1
    assert value(found, "database_bytes") > 4_096


@pytest.mark.sqlite("its memory")
def test_of_the_memory_sqlites_part_is_told(serve: Serve) -> None:
    found = scraped(serve())
    assert 100_000 < value(found, "sqlite_memory_bytes") < value(found, "process_resident_memory_bytes")


@pytest.mark.slow
def test_a_whole_cycle_is_seen_and_survives_a_restart(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with open_rig(config) as rig:
        rig.serve(40)
        cycle.run(rig.loop, trigger="test")
        rig.judge(60)
        cycle.run(rig.loop, trigger="test")
        during = _live(rig)
        rig.judge(240)
        ended = cycle.run(rig.loop, trigger="test")
        assert ended.state is CycleState.PROMOTED
    with open_rig(config) as rig:
        found = _live(rig)
    assert value(during, "cycle_state", state="duelling") == 1
    assert value(during, "duel_picks") == 60
    assert value(during, "duel_e_value") > 0
    assert value(found, "champion_version") == 1
    assert value(found, "cycles_total", state="promoted") == 1
    assert value(found, "gate_verdicts_total", kind="PROMOTE") == 1
    assert value(found, "promotions_total", action="promote") == 1
    assert value(found, "runs_total", status="succeeded") == 1
    assert value(found, "last_cycle", state="promoted") == 1
    assert value(found, "cycle_step_seconds", state="training") > 0
    assert value(found, "round_stopped", reason="completed") == 1
    assert value(found, "round_kl", to="base") >= 0
    assert value(found, "gate_rule_passed", rule="sides") == 1
    assert not [name for name, _ in found if name.startswith("pairloop_duel_")], "no duel is open"


def _live(rig: Rig) -> Samples:
    return samples(generate_latest(live_registry(rig.store, rig.loop.config, dict)).decode())


def test_what_needs_care_is_seen(tmp_path: Path) -> None:
    endpoint = {"name": "ops", "url": "http://127.0.0.1:1", "secret_env": "HOOK_KEY"}
    config = fake_config(tmp_path, webhooks={"endpoints": [endpoint]})
    now = datetime.now(UTC)
    key, _ = keys.new("till tomorrow", [Scope.ADMIN], expires_at=now + timedelta(days=1))

    def write(c: Connection) -> None:
        keys.insert(c, key)
        leases.acquire(c, "cycle:support-bot", "host:1", now=now - timedelta(seconds=100), ttl_s=60)
        quarantines.insert(c, POLICY, Quarantine("someone", Action.QUARANTINE, "always left", now))
        deliveries.begin(c, POLICY, "ops")
        events.put(c, events.BACKUP, POLICY, {}, now - timedelta(days=3))
        events.put(c, "disk.low", POLICY, {}, now)
        deliveries.plan(c, POLICY, "ops", (), now - timedelta(seconds=50))

    with World(tmp_path / "world", config=config) as world:
        world.store.write(write)
        found = samples(Metrics(world.store, world.policy, config, dict).render().decode())
    assert 86_000 < value(found, "key_expires_in_seconds") <= 86_400
    assert -45 < value(found, "lease_expires_in_seconds", lease="cycle:support-bot") < -35
    assert value(found, "quarantined_raters") == 1
    assert value(found, "backup_age_seconds") == pytest.approx(3 * 86_400, abs=60)
    assert value(found, "webhook_deliveries", endpoint="ops", status=DeliveryStatus.PENDING.value) == 2
    assert value(found, "webhook_deliveries", endpoint="ops", status=DeliveryStatus.FAILED.value) == 0
    assert 45 < value(found, "webhook_pending_seconds", endpoint="ops") < 120
    assert value(found, "jobs", status="queued") == 0


def test_a_store_that_cannot_be_read_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise StoreError("unreachable")

    with World(tmp_path) as world:
        metrics = Metrics(world.store, world.policy, world.config, dict)
        monkeypatch.setattr(world.store, "reading", broken)
        found = samples(metrics.render().decode())
    assert value(found, "store_up") == 0
    assert value(found, "queue") == 0
    assert "pairloop_champion_version" not in {name for name, _ in found}


def test_a_worker_shows_its_own(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        registry = live_registry(world.store, world.config, lambda: {"running": True, "new_pairs": 7})
        with exporting(registry, "127.0.0.1", 0) as port:
            text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    found = samples(text)
    assert (value(found, "scheduler_running"), value(found, "new_pairs")) == (1, 7)


# --- what is written about them


@pytest.fixture
def names(tmp_path: Path) -> set[str]:
    """Every name that a sample may have: of a histogram or counter those of its series."""
    with World(tmp_path / "names") as world:
        text = Metrics(world.store, world.policy, world.config, dict).render().decode()
    found = set()
    for family in text_string_to_metric_families(text):
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
        found |= {family.name + ending for ending in endings}
    return found


def rules() -> list[Mapping[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_every_alarm_asks_for_metrics_that_exist_and_has_a_runbook(names: set[str]) -> None:
    runbook = (DOCS / "runbook.md").read_text()
    assert len(rules()) > 20
    for rule in rules():
        asked = set(re.findall(r"pairloop_\w+", rule["expr"]))
        assert asked <= names, rule["alert"]
        assert asked or "up{" in rule["expr"], rule["alert"]
        assert rule["expr"].count("(") == rule["expr"].count(")"), rule["alert"]
        assert f"| `{rule['alert']}` |" in runbook, f"{rule['alert']} has no line in the runbook"
        assert rule["annotations"]["summary"]
    assert set(re.findall(r"^\| `(Pairloop\w+)` \|", runbook, re.M)) == {rule["alert"] for rule in rules()}


def test_what_an_alarm_counts_is_there_before_it_happens_and_what_it_joins_matches(tmp_path: Path) -> None:
    """A series that begins at 1 has no increase, and `and` pairs only what has the same labels."""
    endpoint = {"name": "ops", "url": "http://127.0.0.1:1", "secret_env": "HOOK_KEY"}
    config = fake_config(tmp_path, webhooks={"endpoints": [endpoint]})
    with World(tmp_path / "world", config=config) as world:
        found = samples(Metrics(world.store, world.policy, config, dict).render().decode())
    selected = r'(pairloop_\w+)\{(\w+)="(\w+)"\}'
    counted = [match for rule in rules() for match in re.findall(rf"(?:increase|delta)\({selected}", rule["expr"])]
    assert len(counted) >= 4
    for name, label, wanted in counted:
        assert any(which == name and (label, wanted) in labels for which, labels in found), f"{name} {label}={wanted}"
    for rule in rules():
        chosen = re.findall(selected, rule["expr"])
        if len(set(chosen)) > 1 and re.search(r" (?:and|unless) ", rule["expr"]):
            assert re.search(r" (?:and|unless) on \(", rule["expr"]), rule["alert"]


def test_every_metric_is_documented(names: set[str]) -> None:
    documented = set(re.findall(r"^\| `(pairloop_\w+)`", (DOCS / "metrics.md").read_text(), re.M))
    series = {re.sub(r"_(bucket|count|sum)$", "", name) for name in names}
    assert series <= documented


@pytest.mark.slow
def test_a_scrape_stays_cheap_with_a_hundred_thousand_groups(tmp_path: Path) -> None:
    label = {"verifier": "tests.loop_rig:score"}
    config = fake_config(tmp_path, label=label)
    with World(tmp_path / "world", config=config) as world:
        for batch in range(100):
            made = [a_group(policy=POLICY) for _ in range(1_000)]
            world.store.write(partial(_put, made=made, picked=batch > 5))
        metrics = Metrics(world.store, world.policy, config, dict)
        first, spent = _cost_s(metrics), sorted(_cost_s(metrics) for _ in range(20))
    print(f"100,000 groups: the first scrape {1000 * first:.1f} ms of CPU, then {1000 * spent[10]:.1f} ms in the median of 20")
    assert spent[10] < 0.02


def _put(c: Connection, made: list[Group], picked: bool) -> None:
    for group in made:
        groups.insert(c, group)
        if picked:
            feedback.insert(c, a_pick(group.group_id))


def _cost_s(metrics: Metrics) -> float:
    begun = time.process_time()
    metrics.render()
    return time.process_time() - begun
