"""The loop over servers on loopback: no alias flips before every replica passed, and the wire says what is wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection
from tests.loop_rig import Rig, settings
from tests.server import RunningServer, World, fake_config, sse_chunks
from tests.test_remote import opened, states, version
from tests.vllm_server import Faults, VllmServer, fleet
from tests.waiting import until

from pairloop.errors import EngineError, PairloopError
from pairloop.loop import deploy
from pairloop.loop.cycle import Loop, ensure_base, run
from pairloop.policy.protocols import ReplicaState
from pairloop.policy.remote import RemotePolicy
from pairloop.policy.remote.policy import adapter_name
from pairloop.store import Store, versions
from pairloop.types import Alias, CycleState, Label, Version


def champion(world: World) -> int | None:
    with world.store.reading() as c:
        return versions.alias(c, "support-bot", Alias.CHAMPION)


def registered(world: World, number: int) -> Version:
    made = version(world.folder, number)
    world.store.write(lambda c: versions.insert(c, made))
    return made


def lora(folder: Path) -> Any:
    return fake_config(folder, policy={"method": "lora"})


@pytest.mark.parametrize(
    "fault", [Faults(stale=True), Faults(unlisted=True), Faults(load="load_rank"), Faults(load_status=503), Faults(status=500)]
)
@pytest.mark.parametrize("place", [0, 2])
def test_no_alias_flips_where_one_replica_of_three_fails(tmp_path: Path, fault: Faults, place: int) -> None:
    with (
        fleet(3) as servers,
        opened(servers, tmp_path) as policy,
        World(tmp_path / "w", config=lora(tmp_path), policy=policy) as w,
    ):
        made = registered(w, 1)
        servers[place].faults = fault
        with pytest.raises(PairloopError):
            deploy.promote(w.store, policy, made, reason="test")
        assert champion(w) == 0
        assert not any(server.adapters for i, server in enumerate(servers) if i != place)
        servers[place].faults = Faults()
        deploy.promote(w.store, policy, made, reason="test")
        assert champion(w) == 1


def test_every_replica_was_probed_when_the_alias_flips(tmp_path: Path) -> None:
    """Whatever deploy commits, it commits after each server answered under the new name."""
    seen: list[list[int]] = []
    with (
        fleet(3) as servers,
        opened(servers, tmp_path) as policy,
        World(tmp_path / "w", config=lora(tmp_path), policy=policy) as w,
    ):
        made = registered(w, 1)

        def look(_: Connection) -> None:
            seen.append([server.asked_as("support-bot--v1-00000001") for server in servers])

        deploy.promote(w.store, policy, made, reason="test", also=look)
        assert champion(w) == 1
        assert seen
        assert all(min(asked) >= 1 for asked in seen)


def test_a_replica_that_dies_in_the_middle_of_a_deployment_has_to_pass_it_later(tmp_path: Path) -> None:
    with (
        fleet(2) as servers,
        opened(servers, tmp_path) as policy,
        World(tmp_path / "w", config=lora(tmp_path), policy=policy) as w,
    ):
        made = registered(w, 1)
        servers[0].die()
        deploy.promote(w.store, policy, made, reason="test")
        assert champion(w) == 1
        assert "support-bot--v1-00000001" not in servers[0].adapters
        servers[0].rise()
        until(lambda: states(policy) == [ReplicaState.READY] * 2)
        assert "support-bot--v1-00000001" in servers[0].adapters


Serve = Callable[..., RunningServer]


def serving(serve: Serve, folder: Path, policy: RemotePolicy) -> RunningServer:
    return serve(config=lora(folder), policy=policy)


def test_chats_and_streams_are_answered_over_http_twice(tmp_path: Path, serve: Serve) -> None:
    with fleet(2) as servers, opened(servers, tmp_path) as policy:
        server = serving(serve, tmp_path, policy)
        reply = server.chat(n=2, logprobs=True).json()
        assert len(reply["choices"]) == 2
        for choice in reply["choices"]:
            content = choice["logprobs"]["content"]
            assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
        stored = server.group(reply["id"])
        assert all(len(c.logps) == len(c.token_ids) > 0 for c in stored.completions)
        chunks = sse_chunks(server.chat(n=2, stream=True).text)
        assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1}
        metrics = server.http.get("/metrics").text
        assert f'pairloop_replica_ready{{replica="{servers[0].url}"}} 1.0' in metrics
        assert f'pairloop_replica_recorded_logps{{replica="{servers[1].url}"}} 1.0' in metrics
        assert server.http.get("/health").json()["engines"] == {"ready": 2, "recorded_logps": True}


def test_without_any_engine_clients_are_told_to_come_back(tmp_path: Path, serve: Serve) -> None:
    with fleet(1) as servers, opened(servers, tmp_path) as policy:
        server = serving(serve, tmp_path, policy)
        servers[0].die()
        for stream in (False, True):
            reply = server.chat(stream=stream)
            assert reply.status_code == 503
            assert reply.headers["retry-after"]
            assert reply.json()["error"]["code"] == "engine_unavailable"
        ready = server.http.get("/health/ready")
        assert ready.status_code == 503
        assert servers[0].url not in ready.text
        servers[0].rise()
        until(lambda: server.http.get("/health/ready").status_code == 200)
        assert server.chat().status_code == 200


def test_an_engine_s_garbage_is_a_503_and_the_server_goes_on(tmp_path: Path, serve: Serve) -> None:
    with fleet(1) as servers, opened(servers, tmp_path) as policy:
        server = serving(serve, tmp_path, policy)
        servers[0].faults = Faults(spoil={"token_ids": [70_000]})
        reply = server.chat()
        assert reply.status_code == 503
        assert "token id 70000" in reply.json()["error"]["message"]
        servers[0].faults = Faults()
        until(lambda: policy.replicas()[0].circuit == "half-open")
        assert server.chat().status_code == 200


def test_adapters_are_administered_on_the_engines_only(tmp_path: Path, serve: Serve) -> None:
    with fleet(1) as servers, opened(servers, tmp_path) as policy:
        server = serving(serve, tmp_path, policy)
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            assert server.http.post(path, json={"lora_name": "x", "lora_path": "/x"}).status_code == 404
        assert not servers[0].adapters


def test_nothing_is_lost_while_versions_swap_and_a_server_restarts(tmp_path: Path, serve: Serve) -> None:
    """Chats one after another, while a version is promoted and then a replica goes and comes back."""
    with fleet(2) as servers, opened(servers, tmp_path) as policy:
        server = serving(serve, tmp_path, policy)
        made = registered(server, 1)
        codes = [server.chat(n=2).status_code for _ in range(4)]
        deploy.promote(server.store, policy, made, reason="test")
        codes += [server.chat(n=2).status_code for _ in range(4)]
        assert server.chat().json()["model"] == "support-bot@1"
        kill_and_chat(server, servers[1], codes)
        until(lambda: states(policy) == [ReplicaState.READY] * 2)
        codes += [server.chat(n=2).status_code for _ in range(4)]
        assert codes == [200] * len(codes)
        assert "support-bot--v1-00000001" in servers[1].adapters


def kill_and_chat(server: RunningServer, engine: VllmServer, codes: list[int]) -> None:
    engine.die()
    codes += [server.chat(n=2).status_code for _ in range(4)]
    engine.rise()


@pytest.mark.slow
def test_a_whole_cycle_over_two_servers_of_which_one_records_nothing(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with fleet(2) as servers, Store.open(config) as store:
        servers[1].faults = Faults(offset=0.01)
        with opened(servers, config.artifacts_dir) as policy:
            ensure_base(store, policy, config)
            rig = Rig(Loop(store, policy, config, "tester:0"), random.Random(0))
            rig.serve(40)
            cycle = run(rig.loop, trigger="test")
            assert cycle.state is CycleState.DUELLING
            name = adapter_name(registered_version(rig, 1))
            assert all(name in server.adapters for server in servers)
            # Two digits drawn: an entropy of 2 ln 10 or less, and not halved by what was not recorded.
            report = next(step.record["report"] for step in cycle.steps if "report" in step.record)
            assert 3.0 < report["metrics"]["entropy"]["mean"] < 4.61
            assert 0.0 < report["metrics"]["kl_base"]["mean"] < 1.0
            rig.judge(80, lambda _, a, __: Label.A if a.version == 1 else Label.B)
            assert run(rig.loop, trigger="test").state is CycleState.PROMOTED
            assert rig.champion == 1


def registered_version(rig: Rig, number: int) -> Version:
    with rig.store.reading() as c:
        found = versions.get(c, rig.loop.name, number)
    assert found is not None
    return found


def test_an_engine_that_cannot_be_reached_is_no_reason_to_forget_a_version(tmp_path: Path) -> None:
    with (
        fleet(1) as servers,
        opened(servers, tmp_path) as policy,
        World(tmp_path / "w", config=lora(tmp_path), policy=policy) as w,
    ):
        made = registered(w, 1)
        servers[0].die()
        with pytest.raises(EngineError, match=r"no engine could load|cannot be reached"):
            deploy.promote(w.store, policy, made, reason="test")
        assert champion(w) == 0
        servers[0].rise()
        until(lambda: states(policy) == [ReplicaState.READY])
        deploy.promote(w.store, policy, made, reason="test")
        assert champion(w) == 1
