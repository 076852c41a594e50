"""The remote policy against servers on loopback: what it samples, loads, refuses, and how it gets over servers that fail."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.vllm_server import Faults, VllmServer, adapter_version, fleet
from tests.waiting import PATIENCE_S, until

from pairloop.config import PolicySection, parse_config
from pairloop.errors import ConfigError, EngineError, InvalidRequestError, ModelError
from pairloop.policy.fake import FakePolicy, write_skill
from pairloop.policy.protocols import ReplicaState, SampleRequest, TokenEvent, TokenSequence
from pairloop.policy.remote import RemotePolicy
from pairloop.policy.remote.breaker import FAILURES
from pairloop.policy.remote.policy import adapter_name
from pairloop.types import Completion, FinishReason, SamplingParams, Version, VersionKind

VOCAB = 257
MEASURED = 5
"""Completions that a replica is asked for before its first request."""
PROMPT = tuple(b"Where is my order?")


@contextmanager
def opened(servers: list[VllmServer], folder: Path, **keys: Any) -> Iterator[RemotePolicy]:
    options = {name: keys.pop(name) for name in ("key", "max_context") if name in keys}
    section = PolicySection.model_validate(
        {"engine": "vllm", "engine_urls": [server.url for server in servers], "engine_poll": "0.05s", "engine_wait": "5s"}
        | keys
    )
    scorer = FakePolicy()
    try:
        policy = RemotePolicy(section, scorer.tokens, scorer, vocab_size=VOCAB, artifacts=folder, **options)
    except BaseException:
        scorer.close()
        raise
    try:
        yield policy
    finally:
        policy.close()


def version(folder: Path, number: int, *, skill: int | None = None) -> Version:
    path = folder / f"adapter-{number}"
    path.mkdir(exist_ok=True)
    write_skill(path, number if skill is None else skill)
    return adapter_version(number, path)


def ask(policy: RemotePolicy, number: int = 0, n: int = 1, **options: Any) -> tuple[Completion, ...]:
    listener = options.pop("on_token", None)
    return policy.sample(SampleRequest(PROMPT, number, n, SamplingParams(**options), listener)).result(PATIENCE_S)


def asked(server: VllmServer) -> int:
    """How often the server was sent the question of ``ask``; its looks and measurements have others."""
    return sum(body.get("prompt") == list(PROMPT) for _, body in list(server.requests))


def states(policy: RemotePolicy) -> list[ReplicaState]:
    return [replica.state for replica in policy.replicas()]


# -- sampling ---------------------------------------------------------------------------------------------------------------


def test_it_samples_with_token_ids_and_log_probs_that_the_scorer_gives_too(tmp_path: Path) -> None:
    with fleet(1) as servers, opened(servers, tmp_path) as policy:
        policy.load(version(tmp_path, 4))
        for number in (0, 4):
            completions = ask(policy, number, n=3)
            assert len({c.text for c in completions}) > 1
            for completion in completions:
                assert completion.text == policy.tokens.decode(completion.token_ids)
                assert completion.finish_reason is FinishReason.STOP
                assert completion.version == number
                (own,) = policy.logps(number, [TokenSequence(PROMPT, completion.token_ids)])
                assert completion.logps == pytest.approx(own, abs=1e-6)
        assert policy.max_context == 256
        (status,) = policy.replicas()
        assert (status.state, status.circuit, status.recorded, status.outstanding) == ("ready", "closed", True, 0)


def test_tokens_are_told_as_they_come_and_add_up(tmp_path: Path) -> None:
    events: list[TokenEvent] = []
    with fleet(1) as servers, opened(servers, tmp_path) as policy:
        completions = ask(policy, n=2, on_token=events.append)
        assert {event.index for event in events[:2]} == {0, 1}, "the choices interleave"
        for index, completion in enumerate(completions):
            mine = [event for event in events if event.index == index]
            assert "".join(event.text for event in mine) == completion.text
            assert tuple(event.logp for event in mine) == completion.logps


def test_stop_strings_limits_and_greedy_groups(tmp_path: Path) -> None:
    events: list[TokenEvent] = []
    with fleet(1) as servers, opened(servers, tmp_path) as policy:
        (stopped,) = ask(policy, stop=("wer",))
        assert (stopped.text, len(stopped.token_ids), stopped.finish_reason) == ("ans", 6, FinishReason.STOP)
        (cut,) = ask(policy, max_tokens=5)
        assert (cut.text, cut.finish_reason) == ("answe", FinishReason.LENGTH)
        first, second = ask(policy, n=2, temperature=0.0, on_token=events.append)
        assert first == second
        assert sum(event.index == 1 for event in events) == len(first.token_ids)
        assert ask(policy, seed=7) == ask(policy, seed=7)
        assert servers[0].requests[-1][1]["stop_token_ids"] == [256]
        for wrong in ({"n": 0}, {"max_tokens": 0}, {"top_p": 0.0}, {"temperature": -1.0}):
            with pytest.raises(InvalidRequestError):
                ask(policy, **wrong)


def test_cancelling_ends_the_request_on_the_engine(tmp_path: Path) -> None:
    told = threading.Event()
    with fleet(1) as servers, opened(servers, tmp_path) as policy:
        servers[0].faults = Faults(hangs=True)
        future = policy.sample(SampleRequest(PROMPT, 0, on_token=lambda _: told.set()))
        assert told.wait(PATIENCE_S)
        assert policy.queued() == 1
        assert future.cancel()
        assert servers[0].hung_up.wait(PATIENCE_S)
        assert policy.queued() == 0
        until(lambda: policy.replicas()[0].outstanding == 0)
        assert policy.replicas()[0].circuit == "closed", "a client that goes away is not the engine's failure"


def test_a_listener_that_raises_ends_its_own_request_only(tmp_path: Path) -> None:
    def listener(_: TokenEvent) -> None:
        raise RuntimeError("gone")

    with fleet(1) as servers, opened(servers, tmp_path) as policy:
        with pytest.raises(EngineError, match="sampling failed: RuntimeError: gone"):
            ask(policy, on_token=listener)
        assert ask(policy)
        assert policy.replicas()[0].circuit == "closed"


def test_closing_ends_what_runs_with_a_reason(tmp_path: Path) -> None:
    told = threading.Event()
    with fleet(1) as servers, opened(servers, tmp_path) as policy:
        servers[0].faults = Faults(hangs=True)
        future = policy.sample(SampleRequest(PROMPT, 0, on_token=lambda _: told.set()))
        assert told.wait(PATIENCE_S)
        policy.close()
        with pytest.raises(EngineError, match="closed"):
            future.result(PATIENCE_S)
        with pytest.raises(EngineError, match="closed"):
            ask(policy)
        with pytest.raises(EngineError, match="closed"):
            policy.load(version(tmp_path, 1))


# -- versions ---------------------------------------------------------------------------------------------------------------


def test_a_version_is_loaded_under_its_one_name_and_probed_everywhere(tmp_path: Path) -> None:
    with fleet(2) as servers, opened(servers, tmp_path) as policy:
        first = version(tmp_path, 1)
        policy.load(first)
        name = adapter_name(first)
        assert name == "support-bot--v1-00000001"
        for server in servers:
            assert server.adapters[name][1] == first.path
            assert server.asked_as(name) == 1, "probed once, with an answer of its own"
        assert policy.loaded() == {0, 1}
        policy.load(first)
        assert [path for path, _ in servers[0].requests].count("/v1/load_lora_adapter") == 1
        policy.load(version(tmp_path, 2))
        policy.unload(1)
        assert policy.loaded() == {0, 2}
        assert set(servers[0].adapters) == {"support-bot--v2-00000002"}
        with pytest.raises(EngineError, match="version 1 is not loaded"):
            ask(policy, 1)
        policy.load(first)
        assert ask(policy, 1)[0].version == 1


def test_an_adapter_that_an_earlier_process_left_is_taken_and_probed(tmp_path: Path) -> None:
    with fleet(1) as servers:
        for _ in range(2):
            with opened(servers, tmp_path) as policy:
                policy.load(version(tmp_path, 1))
                assert ask(policy, 1)
        assert servers[0].asked_as("support-bot--v1-00000001") == 4


def test_unloading_waits_for_answers_in_flight(tmp_path: Path) -> None:
    with fleet(1) as servers, opened(servers, tmp_path) as policy:
        policy.load(version(tmp_path, 1))
        servers[0].gate.clear()
        future = policy.sample(SampleRequest(PROMPT, 1))
        policy.unload(1)
        assert policy.loaded() == {0}
        assert servers[0].adapters, "it still answers"
        servers[0].gate.set()
        assert future.result(PATIENCE_S)[0].version == 1
        until(lambda: not servers[0].adapters)


def test_the_engines_see_the_artifacts_under_a_path_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "mounted").symlink_to(tmp_path / "artifacts")
    with fleet(1) as servers, opened(servers, tmp_path / "artifacts", engine_artifacts=str(tmp_path / "mounted")) as policy:
        policy.load(version(tmp_path / "artifacts", 1))
        assert servers[0].adapters["support-bot--v1-00000001"][1] == str(tmp_path / "mounted" / "adapter-1")
        with pytest.raises(ModelError, match="is not in the artifacts folder"):
            policy.load(version(tmp_path, 2))


@pytest.mark.parametrize(
    ("fault", "kind", "reason"),
    [
        (Faults(stale=True), EngineError, "did not load support-bot--v3-00000003 as it is: it gives .*the base's"),
        (Faults(unlisted=True), EngineError, "does not list it on tiny"),
        (Faults(load="load_rank"), ModelError, "LoRA rank 32 is greater than max_lora_rank 16.*larger --max-lora-rank"),
        (Faults(load="load_missing"), ModelError, "finds no adapter at .*policy.engine_artifacts"),
        (Faults(load="no_route"), ModelError, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (Faults(load_status=500), EngineError, "answers 500: out of memory"),
        (Faults(load_status=400), ModelError, "refuses support-bot--v3-00000003"),
        (Faults(body=b"<html>"), EngineError, "not an event"),
        (Faults(offset=0.2), EngineError, "of other weights|the base's"),
    ],
)
def test_one_replica_that_fails_a_version_keeps_it_from_all(
    tmp_path: Path, fault: Faults, kind: type[Exception], reason: str
) -> None:
    with fleet(2) as servers, opened(servers, tmp_path) as policy:
        servers[1].faults = fault
        with pytest.raises(kind, match=reason):
            policy.load(version(tmp_path, 3))
        assert policy.loaded() == {0}
        assert not servers[0].adapters, "what was loaded elsewhere is taken back"
        with pytest.raises(EngineError, match="not loaded"):
            ask(policy, 3)
        servers[1].faults = Faults()
        policy.load(version(tmp_path, 3))
        assert ask(policy, 3)


def test_full_weights_and_strange_adapters_never_reach_an_engine(tmp_path: Path) -> None:
    with fleet(1) as servers, opened(servers, tmp_path) as policy:
        full = Version(
            "support-bot", 1, VersionKind.FULL, str(tmp_path), "0" * 64, 0, None, None, version(tmp_path, 1).created_at
        )
        with pytest.raises(ModelError, match="engines behind HTTP take LoRA adapters only"):
            policy.load(full)
        (tmp_path / "adapter-2").mkdir()
        with pytest.raises(ModelError, match="not a fake version"):
            policy.load(adapter_version(2, tmp_path / "adapter-2"))
        assert all(path == "/v1/completions" for path, _ in servers[0].requests)


def test_an_adapter_that_changes_nothing_yet_is_no_stale_one(tmp_path: Path) -> None:
    with fleet(1) as servers, opened(servers, tmp_path) as policy:
        policy.load(version(tmp_path, 1, skill=0))
        assert ask(policy, 1)


# -- servers that fail ------------------------------------------------------------------------------------------------------


def test_requests_in_flight_at_a_replica_that_is_killed_are_answered_by_another(tmp_path: Path) -> None:
    with fleet(2) as servers, opened(servers, tmp_path) as policy:
        policy.load(version(tmp_path, 1))
        for server in servers:
            server.gate.clear()
        futures = [policy.sample(SampleRequest(PROMPT, 1, 2)) for _ in range(24)]
        until(lambda: [replica.outstanding for replica in policy.replicas()] == [12, 12])
        for _ in range(1 + 12):
            assert servers[0].arrived.acquire(timeout=PATIENCE_S)
        servers[1].gate.set()
        servers[0].die()
        answers = [future.result(PATIENCE_S) for future in futures]
        assert all(len(answer) == 2 and answer[0].version == 1 for answer in answers)
        assert states(policy) == [ReplicaState.DOWN, ReplicaState.READY]
        servers[0].gate.set()


def test_a_replica_that_comes_back_without_adapters_gets_them_before_traffic(tmp_path: Path) -> None:
    with fleet(2) as servers, opened(servers, tmp_path) as policy:
        for number in (1, 2):
            policy.load(version(tmp_path, number))
        servers[0].die()
        until(lambda: states(policy)[0] is ReplicaState.DOWN)
        servers[0].requests.clear()
        servers[0].rise()
        until(lambda: states(policy)[0] is ReplicaState.READY)
        assert set(servers[0].adapters) == {"support-bot--v1-00000001", "support-bot--v2-00000002"}
        asked = [body["model"] for path, body in servers[0].requests if path == "/v1/completions"]
        assert asked[-2:] == ["support-bot--v1-00000001", "support-bot--v2-00000002"]
        assert set(asked[:-2]) == {"tiny"}, "its base is compared again"


def test_a_replica_that_comes_back_wrong_stays_out(tmp_path: Path) -> None:
    with fleet(2) as servers, opened(servers, tmp_path) as policy:
        policy.load(version(tmp_path, 1))
        servers[0].die()
        until(lambda: states(policy)[0] is ReplicaState.DOWN)
        rise = servers[0].rise
        servers[0].gate.clear()
        rise()
        servers[0].faults = Faults(stale=True)
        servers[0].gate.set()
        until(lambda: states(policy)[0] is ReplicaState.REFUSED)
        assert "the base's" in policy.replicas()[0].problem
        before = servers[0].asked_as("support-bot--v1-00000001")
        assert all(ask(policy, 1) for _ in range(4))
        assert servers[1].asked_as("support-bot--v1-00000001") >= 5
        servers[0].faults = Faults()
        until(lambda: states(policy)[0] is ReplicaState.READY)
        assert servers[0].asked_as("support-bot--v1-00000001") > before


def test_an_adapter_that_vanished_is_found_by_the_first_request_and_healed(tmp_path: Path) -> None:
    with fleet(2) as servers, opened(servers, tmp_path, engine_poll="1h") as policy:
        policy.load(version(tmp_path, 1))
        servers[0].adapters.clear()
        for _ in range(8):
            assert ask(policy, 1)[0].version == 1
        until(lambda: states(policy) == [ReplicaState.READY] * 2)
        assert servers[0].adapters
        assert policy.replicas()[0].circuit == "closed"


def test_an_adapter_that_vanished_from_the_only_replica_costs_no_answer(tmp_path: Path) -> None:
    with fleet(1) as servers, opened(servers, tmp_path, engine_poll="1h") as policy:
        policy.load(version(tmp_path, 1))
        servers[0].adapters.clear()
        assert ask(policy, 1)[0].version == 1
        assert servers[0].adapters


GARBAGE = {
    "html": Faults(body=b"<html>503</html>"),
    "nothing": Faults(body=b""),
    "half a stream": Faults(body=b"data: [DONE]\n\n"),
    "no object": Faults(body=b"data: 17\n\n"),
    "wrong index": Faults(spoil={"index": 7}),
    "no ids": Faults(spoil={"token_ids": None}),
    "strange ids": Faults(spoil={"token_ids": [9_999]}),
    "no log-probs": Faults(spoil={"logprobs": None}),
    "log-probs of text": Faults(spoil={"logprobs": {"token_logprobs": ["-1"], "top_logprobs": [{}]}}),
    "500": Faults(status=500),
    "cut": Faults(break_after=2),
}


@pytest.mark.parametrize("name", list(GARBAGE))
def test_garbage_is_retried_elsewhere_and_counted(tmp_path: Path, name: str) -> None:
    with fleet(2) as servers, opened(servers, tmp_path, engine_poll="1h") as policy:
        servers[0].faults = GARBAGE[name]
        for _ in range(8):
            assert ask(policy)[0].text.startswith("answer ")
        second = policy.replicas()[1]
        # One that only cuts connections is taken out by the first cut, and comes back when it says that it is well.
        assert name == "cut" or servers[0].asked_as("tiny") <= MEASURED + FAILURES
        assert (second.state, second.circuit) == (ReplicaState.READY, "closed")


def test_a_silent_replica_is_given_up_after_a_while(tmp_path: Path) -> None:
    with fleet(2) as servers, opened(servers, tmp_path, engine_timeout="1s") as policy:
        servers[0].faults = Faults(hangs=True)
        answers = [policy.sample(SampleRequest(PROMPT, 0)) for _ in range(6)]
        assert all(answer.result(PATIENCE_S) for answer in answers)
        assert servers[0].hung_up.wait(PATIENCE_S)
    with fleet(1) as servers, opened(servers, tmp_path, engine_timeout="0.5s") as policy:
        servers[0].faults = Faults(hangs=True)
        with pytest.raises(EngineError, match="engine 1 was silent for too long"):
            ask(policy)


def test_a_sick_replica_drains(tmp_path: Path) -> None:
    """No new requests for it, and those in flight end there."""
    with fleet(2) as servers, opened(servers, tmp_path) as policy:
        servers[0].gate.clear()
        servers[1].gate.clear()
        running = [policy.sample(SampleRequest(PROMPT, 0)) for _ in range(2)]
        until(lambda: [replica.outstanding for replica in policy.replicas()] == [1, 1])
        servers[0].faults = Faults(sick=True)
        until(lambda: states(policy)[0] is ReplicaState.DOWN)
        running += [policy.sample(SampleRequest(PROMPT, 0)) for _ in range(3)]
        until(lambda: [replica.outstanding for replica in policy.replicas()] == [1, 4])
        for server in servers:
            server.gate.set()
        assert all(future.result(PATIENCE_S) for future in running)
        assert asked(servers[0]) == 1
        servers[0].faults = Faults()
        until(lambda: states(policy) == [ReplicaState.READY] * 2)


def test_a_replica_whose_circuit_opened_is_tried_again_and_taken_back(tmp_path: Path) -> None:
    with fleet(1) as servers, opened(servers, tmp_path, engine_poll="1h") as policy:
        servers[0].faults = Faults(spoil={"index": 7})
        with pytest.raises(EngineError, match=r"a choice with index 7 where 1 were asked for"):
            ask(policy)
        with pytest.raises(EngineError, match=r"no engine takes requests: .* is ready, its circuit open"):
            ask(policy)
        servers[0].faults = Faults()
        until(lambda: policy.replicas()[0].circuit == "half-open")
        assert ask(policy)
        assert policy.replicas()[0].circuit == "closed"


def test_an_answer_that_was_partly_told_is_not_begun_again(tmp_path: Path) -> None:
    events: list[TokenEvent] = []
    with fleet(1) as servers, opened(servers, tmp_path) as policy:
        servers[0].faults = Faults(break_after=3)
        with pytest.raises(EngineError, match="broke off in the middle"):
            ask(policy, on_token=events.append)
        assert len(events) == 3
        assert asked(servers[0]) == 1


def test_a_request_at_fault_is_the_client_s_and_closes_no_circuit(tmp_path: Path) -> None:
    refusal = b'data: {"error": {"message": "Grammar error: Invalid type", "code": 400}}\n\n'
    with fleet(1) as servers, opened(servers, tmp_path) as policy:
        servers[0].faults = Faults(body=refusal)
        for _ in range(5):
            request = SampleRequest(PROMPT, 0, response_format={"type": "json_object"})
            with pytest.raises(InvalidRequestError, match="Grammar error") as caught:
                policy.sample(request).result(PATIENCE_S)
            assert caught.value.param == "response_format"
        assert policy.replicas()[0].circuit == "closed"


# -- at the start -----------------------------------------------------------------------------------------------------------


def test_log_probs_that_do_not_agree_are_told_but_not_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events: list[TokenEvent] = []
    with fleet(2) as servers:
        servers[1].faults = Faults(offset=0.01)
        with caplog.at_level(logging.WARNING), opened(servers, tmp_path) as policy:
            assert [replica.recorded for replica in policy.replicas()] == [True, False]
            assert "does not agree with the trainer: 0.01 nats at most" in caplog.text
            servers[0].die()
            until(lambda: states(policy)[0] is ReplicaState.DOWN)
            (completion,) = ask(policy, on_token=events.append)
            assert completion.logps == ()
            assert [event.token_id for event in events] == list(completion.token_ids)
            assert all(event.logp <= 0.01 for event in events)
            policy.load(version(tmp_path, 1))
            assert ask(policy, 1)[0].logps == ()


def test_a_server_of_another_model_is_refused(tmp_path: Path) -> None:
    with fleet(1) as servers:
        servers[0].faults = Faults(offset=-2.0)
        with (
            pytest.raises(ModelError, match=r"serves other weights than policy.model: its log-probs are 2.00 nats per token"),
            opened(servers, tmp_path),
        ):
            pass


def test_the_start_waits_for_a_first_server_and_says_why_it_gave_up(tmp_path: Path) -> None:
    with fleet(1) as servers:
        servers[0].die()
        with (
            pytest.raises(EngineError, match=r"no engine was ready within 2s: .* is down: .*cannot be reached"),
            opened(servers, tmp_path, engine_wait="2s"),
        ):
            pass
        rising = threading.Timer(0.1, servers[0].rise)
        rising.start()
        with opened(servers, tmp_path) as policy:
            assert ask(policy)
        rising.join()


def test_keys_names_and_contexts(tmp_path: Path) -> None:
    with fleet(1, key="secret", model="meta/base") as servers:
        with opened(servers, tmp_path, key="secret", engine_model="meta/base") as policy:
            assert ask(policy)
        with (
            pytest.raises(EngineError, match=r"answers 401: Unauthorized; put its key .* policy.engine_key_env"),
            opened(servers, tmp_path, engine_wait="2s"),
        ):
            pass
        with (
            pytest.raises(ModelError, match="--max-model-len 256, and 300 are served"),
            opened(servers, tmp_path, key="secret", max_context=300),
        ):
            pass
    with fleet(1) as servers, opened(servers, tmp_path, max_context=64) as policy:
        assert policy.max_context == 64
        with pytest.raises(InvalidRequestError, match="the context holds 64"):
            policy.sample(SampleRequest((1,) * 64, 0))


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"engine": "vllm"}, 'engine = "vllm" needs engine_urls'),
        ({"engine": "vllm", "engine_urls": ["http://a:1"], "method": "full"}, 'policy.method = "full" makes versions of all'),
        ({"engine": "vllm", "engine_urls": ["http://a:1"], "model": "fake"}, 'model = "fake" has no weights'),
        ({"engine": "vllm", "engine_urls": ["http://a:1/v1"]}, "'http://a:1/v1' is not the root of a server"),
        ({"engine": "vllm", "engine_urls": ["gpu-1:8000"]}, "is not the root of a server"),
        ({"engine": "vllm", "engine_urls": ["http://a:1", "http://a:1"]}, "named twice"),
        ({"engine": "vllm", "engine_urls": ["http://a:1"], "engine_poll": "often"}, "is not a duration"),
        ({"engine_urls": ["http://a:1"]}, 'engine_urls: are for engine = "vllm"'),
        ({"engine_model": "x", "engine_wait": "9s"}, 'engine_model, engine_wait: are for engine = "vllm"'),
    ],
)
def test_illegal_settings_are_refused_with_the_reason(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match="policy") as caught:
        parse_config({"policy": keys})
    assert reason in str(caught.value)
