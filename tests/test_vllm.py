"""A real vLLM, which the tests start on the starter model, behind the remote policy: ``make test-vllm``.

``PAIRLOOP_VLLM_PYTHON`` names the Python of an environment that has vLLM. The server listens on loopback, serves one test at a
time, and is ended by its own process id.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.learner_rig import job_maker, recorded
from tests.server import user_of
from tests.test_ray import free_port
from tests.vllm_server import adapter_version
from tests.waiting import until

from pairloop.config import child_env, parse_config
from pairloop.demo.server import start_server
from pairloop.errors import EngineError, ModelError
from pairloop.learner import train
from pairloop.policy.engine import open_policy
from pairloop.policy.protocols import RESPONSE_FORMAT, ReplicaState, SampleRequest, TokenEvent, TokenSequence
from pairloop.policy.remote import RemotePolicy
from pairloop.scaffold import write_config
from pairloop.starter import MODEL_DIR
from pairloop.starter.verifier import score
from pairloop.types import FinishReason, Message, PairSide, Pool, PreferencePair, SamplingParams

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

PATIENCE_S = 300
GATE_SHARE = 0.3
QUESTIONS = ("Where is my order 4417?", "I want my money back", "My account is locked", "Can you call me?")
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "PYTHONPATH": "",
}
OPTIONS = "--enable-lora --max-lora-rank 16 --max-loras 4 --enforce-eager --dtype float32 --max-model-len 512 --max-num-seqs 8"


class Engine:
    """A vLLM server in a process group of its own, always on the same port."""

    def __init__(self, python: str, log: Path) -> None:
        self._python = python
        self._log = log
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            self._python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(MODEL_DIR),
            "--served-model-name",
            "base",
        ]
        command += ["--host", "127.0.0.1", "--port", str(self._port), *OPTIONS.split()]
        with self._log.open("ab") as sink:
            self._process = subprocess.Popen(
                command, stdout=sink, stderr=sink, env=child_env(**SETTINGS), start_new_session=True, cwd=self._log.parent
            )

        def answers() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, self._log.read_text(errors="replace")[-3_000:]
            with suppress(httpx.HTTPError):
                return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200
            return False

        until(answers, patience_s=PATIENCE_S)

    def kill(self) -> None:
        """With all its workers, and gone when this returns."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(60)
            self._process = None

    def names(self) -> set[str]:
        entries = httpx.get(f"{self.url}/v1/models", timeout=20, trust_env=False).json()["data"]
        return {entry["id"] for entry in entries}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    python = os.environ.get("PAIRLOOP_VLLM_PYTHON")
    if not python:
        pytest.skip("PAIRLOOP_VLLM_PYTHON does not name the Python of an environment that has vLLM")
    engine = Engine(python, tmp_path_factory.mktemp("vllm") / "vllm.log")
    try:
        engine.start()
        yield engine
    finally:
        engine.kill()


@contextmanager
def opened(engine: Engine, folder: Path, **keys: Any) -> Iterator[RemotePolicy]:
    section = {"engine": "vllm", "engine_urls": [engine.url], "engine_poll": "0.5s", **keys}
    policy = open_policy(parse_config({"state_dir": folder, "policy": section}))
    assert isinstance(policy, RemotePolicy)
    try:
        yield policy
    finally:
        policy.close()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of pairloop's own training, of one and of two passes."""
    folder = tmp_path_factory.mktemp("trained")
    pairs = recorded(
        [
            PreferencePair(
                f"pair_{i}",
                (Message("user", question),),
                PairSide(f"We are sorry about {i}."),
                PairSide(f"Not my problem {i}."),
            )
            for i, question in enumerate(QUESTIONS * 4)
        ],
        MODEL_DIR,
    )
    make = job_maker(folder, MODEL_DIR)
    made = []
    for epochs in (1, 2):
        job = make(pairs, name=f"run-{epochs}", recipe={"learning_rate": 5e-3, "epochs": epochs}, method="lora")
        assert train(job).status.value == "succeeded"
        made.append(Path(job.out_dir))
    return made


def requests_of(policy: RemotePolicy, version: int, **params: Any) -> list[SampleRequest]:
    prompts = [policy.tokens.encode_prompt((Message("user", question),)) for question in QUESTIONS]
    return [SampleRequest(prompt, version, 2, SamplingParams(**{"max_tokens": 48, **params})) for prompt in prompts]


def largest_difference(policy: RemotePolicy, version: int, **params: Any) -> float:
    """Nats between what the engine recorded and what this process computes, over pairs of answers to all questions."""
    worst, tokens = 0.0, 0
    for request in requests_of(policy, version, **params):
        for completion in policy.sample(request).result(PATIENCE_S):
            (own,) = policy.logps(version, [TokenSequence(request.prompt_token_ids, completion.token_ids)])
            assert len(completion.logps) == len(own) > 0
            assert completion.text == policy.tokens.decode(completion.token_ids)
            worst = max(worst, *(abs(a - b) for a, b in zip(completion.logps, own, strict=True)))
            tokens += len(own)
    print(f"version {version} {params}: {worst:.2e} nats at most over {tokens} tokens")
    return worst


def test_pairs_of_answers_have_the_local_policy_s_log_probs(engine: Engine, tmp_path: Path) -> None:
    with opened(engine, tmp_path) as policy:
        (status,) = policy.replicas()
        assert status.recorded
        print(f"agreement at start-up: {status.max_token_delta:.2e} nats")
        for params in ({}, {"temperature": 0.5}, {"top_p": 0.7}, {"temperature": 0.0}, {"seed": 3}):
            assert largest_difference(policy, 0, **params) < 1e-3


def test_answers_stream_token_by_token_and_end_as_the_local_ones(engine: Engine, tmp_path: Path) -> None:
    events: list[TokenEvent] = []
    with opened(engine, tmp_path) as policy:
        prompt = policy.tokens.encode_prompt((Message("user", QUESTIONS[0]),))
        request = SampleRequest(prompt, 0, 2, SamplingParams(max_tokens=80), events.append, top_logprobs=3)
        completions = policy.sample(request).result(PATIENCE_S)
        for index, completion in enumerate(completions):
            mine = [event for event in events if event.index == index]
            assert "".join(event.text for event in mine) == completion.text
            assert tuple(event.token_id for event in mine) == completion.token_ids
            assert all(len(event.top) == 3 and event.top[0].logp >= event.logp - 1e-6 for event in mine)
            ended = completion.token_ids[-1] in policy.tokens.eos_token_ids
            assert ended == (completion.finish_reason is FinishReason.STOP)
        params = SamplingParams(max_tokens=80, temperature=0.0, stop=(" ",))
        (stopped,) = policy.sample(SampleRequest(prompt, 0, 1, params)).result(PATIENCE_S)
        assert " " not in stopped.text
        assert stopped.finish_reason is FinishReason.STOP


def test_a_response_format_is_obeyed_and_its_log_probs_are_not_recorded(engine: Engine, tmp_path: Path) -> None:
    schema = {"name": "answer", "schema": {"type": "string", "enum": ["yes", "no"]}}
    with opened(engine, tmp_path) as policy:
        assert RESPONSE_FORMAT in policy.abilities
        prompt = policy.tokens.encode_prompt((Message("user", QUESTIONS[0]),))
        request = SampleRequest(prompt, 0, 1, response_format={"type": "json_schema", "json_schema": schema})
        (completion,) = policy.sample(request).result(PATIENCE_S)
        assert json.loads(completion.text) in ("yes", "no")
        assert completion.logps == ()


def test_trained_adapters_are_probed_and_swapped_under_load(engine: Engine, tmp_path: Path, adapters: list[Path]) -> None:
    with opened(engine, tmp_path) as policy:
        policy.load(adapter_version(1, adapters[0]))
        assert largest_difference(policy, 1) < 1e-3
        running = [policy.sample(request) for request in requests_of(policy, 1) * 8]
        policy.load(adapter_version(2, adapters[1]))
        running += [policy.sample(request) for request in requests_of(policy, 2) * 8]
        policy.unload(1)
        answers = [future.result(PATIENCE_S) for future in running]
        assert [answer[0].version for answer in answers] == [1] * 32 + [2] * 32
        assert largest_difference(policy, 2) < 1e-3
        until(lambda: engine.names() == {"base", "support-bot--v2-00000002"}, patience_s=PATIENCE_S)
        policy.unload(2)


def test_an_adapter_that_does_not_fit_never_reaches_the_engine(engine: Engine, tmp_path: Path, adapters: list[Path]) -> None:
    with opened(engine, tmp_path, lora_rank=8) as policy:
        with pytest.raises(ModelError, match="the adapter has r = 16, the policy's configuration says 8"):
            policy.load(adapter_version(1, adapters[0]))
        assert engine.names() == {"base"}


def test_an_engine_that_is_killed_is_healed_when_it_is_back(engine: Engine, tmp_path: Path, adapters: list[Path]) -> None:
    with opened(engine, tmp_path) as policy:
        policy.load(adapter_version(1, adapters[0]))
        engine.kill()
        with pytest.raises(EngineError, match="cannot be reached"):
            policy.sample(requests_of(policy, 1)[0]).result(PATIENCE_S)
        assert policy.replicas()[0].state is ReplicaState.DOWN
        engine.start()
        until(lambda: policy.replicas()[0].state is ReplicaState.READY, patience_s=PATIENCE_S)
        assert engine.names() == {"base", "support-bot--v1-00000001"}
        assert largest_difference(policy, 1) < 1e-3
        policy.unload(1)


def two_answers(http: httpx.Client, i: int, user: str) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """A question of ``user`` and the reply with its two choices."""
    messages = [{"role": "user", "content": f"{QUESTIONS[i % len(QUESTIONS)]} It is order {1000 + i}."}]
    reply = http.post("/v1/chat/completions", json={"model": "support-bot", "n": 2, "user": user, "messages": messages})
    assert reply.status_code == 200, reply.text
    return messages, reply.json()


def pick_one(http: httpx.Client, i: int, user: str) -> None:
    """Ask, and pick the answer that the starter's verifier likes better, or the first."""
    messages, reply = two_answers(http, i, user)
    scores = [score(messages, choice["message"]["content"]) for choice in reply["choices"]]
    chosen = scores.index(max(scores))
    pick = {"inference_id": reply["id"], "outcome": "chosen", "chosen_index": chosen, "rejected_index": 1 - chosen}
    made = http.post("/v1/preferences", json={**pick, "latency_ms": 4_000, "rater_id": user})
    assert made.status_code == 201, made.text


def test_a_cycle_through_a_server_ends_with_a_version_on_the_engine(engine: Engine, tmp_path: Path) -> None:
    """Two answers each from vLLM, labelled by a verifier, trained here, loaded there, and judged in a live duel of adapters."""
    config = write_config(
        tmp_path / "state",
        {
            "policy": {"engine": "vllm", "engine_urls": [engine.url], "method": "lora"},
            "serve": {"max_tokens": 48, "gate_share": GATE_SHARE},
            "label": {"verifier": "pairloop.starter.verifier:score"},
            "train": {"nll_weight": 1.0, "learning_rate": 5e-3, "max_length": 512},
            "gate": {"min_picks": 8, "min_raters": 8, "max_picks": 24},
            "evaluate": {"prompts": 16, "max_tokens": 48},
            "schedule": {"min_pairs": 0},
        },
    )
    server = start_server(config, log=tmp_path / "server.log")
    try:
        with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as http:
            for i in range(160):
                two_answers(http, i, f"user-{i}")
            assert http.post("/v1/cycles", json={}).status_code == 202
            cycle: dict[str, Any] = {}

            def ended() -> bool:
                cycle.update(next(iter(http.get("/v1/cycles").json()["data"]), {}))
                return cycle.get("state") in ("promoted", "held", "rejected", "failed", "nothing_to_train")

            until(lambda: ended() or cycle.get("state") == "duelling", patience_s=PATIENCE_S)
            print(f"{cycle['state']} with {sorted(engine.names())} on the engine")
            for i in range(60):
                if ended():
                    break
                pick_one(http, 1_000 + i, user_of(Pool.GATE, i, GATE_SHARE))
            until(ended, patience_s=PATIENCE_S)
            print(f"duels: {http.get('/v1/duels').json()['data']}")
            print(f"cycle: {cycle['state']}")
            assert cycle["state"] in ("promoted", "held", "rejected"), server.log.read_text()[-3_000:]
            result = next(step["record"]["result"] for step in cycle["steps"] if "result" in step["record"])
            print(f"reference: {result['reference']}")
            assert result["reference"]["passed"], "what vLLM recorded is the reference"
            assert result["reference"]["recorded"] > 0
            version = http.post(
                "/v1/chat/completions", json={"model": "support-bot@1", "messages": [{"role": "user", "content": QUESTIONS[0]}]}
            )
            assert version.status_code == 200, version.text
            assert any(name.startswith("support-bot--v1-") for name in engine.names())
    finally:
        server.stop()
