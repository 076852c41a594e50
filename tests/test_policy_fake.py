"""The fake policy: answers that rise with skill, and log-probs that are those of its own rule."""

from __future__ import annotations

import math
import threading
from collections import Counter
from concurrent.futures import CancelledError
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pairloop.errors import EngineError, InvalidRequestError, ModelError
from pairloop.policy.fake import EOS, OFF_RULE_LOGP, FakePolicy, quality, token_logps, write_skill
from pairloop.policy.protocols import Policy, SampleRequest, TokenEvent, TokenSequence
from pairloop.types import Completion, FinishReason, Message, SamplingParams, Version, VersionKind

PROMPT = tuple(b"user: hi\nassistant: ")


def skilled(folder: Path, number: int, skill: int) -> Version:
    folder.mkdir(exist_ok=True)
    write_skill(folder, skill)
    return Version("bot", number, VersionKind.ADAPTER, str(folder), "0" * 64, 0, None, None, datetime(2026, 1, 1, tzinfo=UTC))


def sample(policy: Policy, *, n: int = 1, version: int = 0, params: SamplingParams | None = None) -> tuple[Completion, ...]:
    return policy.sample(SampleRequest(PROMPT, version, n, params or SamplingParams())).result(timeout=10)


def test_skill_raises_quality_and_a_better_version_wins_more_often(tmp_path: Path) -> None:
    policy = FakePolicy(seed=1)
    policy.load(skilled(tmp_path / "v1", 1, 1))
    policy.load(skilled(tmp_path / "v3", 2, 3))
    means = [sum(quality(c.text) for c in sample(policy, n=2_000, version=v)) / 2_000 for v in (0, 1, 2)]
    policy.close()
    assert means[0] == pytest.approx(49.5, abs=2.5)
    assert means[1] > means[0] + 10
    assert means[2] > means[1] + 10


def test_recorded_log_probs_are_exact_and_are_those_of_scoring(tmp_path: Path) -> None:
    policy = FakePolicy(seed=2)
    policy.load(skilled(tmp_path / "v1", 1, 2))
    drawn = sample(policy, n=4_000, version=1)
    sequences = [TokenSequence(PROMPT, c.token_ids) for c in drawn]
    assert policy.logps(1, sequences) == [c.logps for c in drawn]
    assert policy.logps(0, sequences) != policy.logps(1, sequences)
    tens = Counter(c.text[7] for c in drawn)
    for digit in "0579":
        exact = math.exp(token_logps(f"answer {digit}".encode(), 2)[-1])
        assert tens[digit] / 4_000 == pytest.approx(exact, abs=0.03)
    every = [token_logps((*f"answer {i:02}".encode(), EOS), 2) for i in range(100)]
    assert sum(math.exp(sum(logps)) for logps in every) == pytest.approx(1.0)
    assert policy.logps(1, [TokenSequence(PROMPT, tuple(b"zz"))]) == [(OFF_RULE_LOGP, OFF_RULE_LOGP)]
    policy.close()


def test_seeds_repeat_and_greedy_is_certain() -> None:
    first, second = FakePolicy(seed=3), FakePolicy(seed=3)
    assert sample(first, n=5) == sample(second, n=5)
    seeded = SamplingParams(seed=7)
    assert sample(first, n=3, params=seeded) == sample(second, n=3, params=seeded) == sample(first, n=3, params=seeded)
    for temperature in (0.0, 1e-46):
        assert len({c.text for c in sample(first, n=4, params=SamplingParams(temperature=temperature))}) == 1
    first.close()
    second.close()


def test_limits_stops_and_token_events() -> None:
    policy = FakePolicy(seed=4)
    (cut,) = sample(policy, params=SamplingParams(max_tokens=4))
    assert (cut.text, len(cut.token_ids), len(cut.logps), cut.finish_reason) == ("answ", 4, 4, FinishReason.LENGTH)
    (stopped,) = sample(policy, params=SamplingParams(stop=("wer", "zz")))
    assert (stopped.text, bytes(stopped.token_ids), stopped.finish_reason) == ("ans", b"answer", FinishReason.STOP)
    events: list[TokenEvent] = []
    (whole,) = policy.sample(SampleRequest(PROMPT, 0, on_token=events.append)).result(timeout=10)
    assert "".join(e.text for e in events) == whole.text
    assert tuple(e.token_id for e in events) == whole.token_ids
    assert whole.token_ids[-1] == EOS
    assert whole.finish_reason is FinishReason.STOP
    events.clear()
    request = SampleRequest(PROMPT, 0, params=SamplingParams(stop=("wer",)), on_token=events.append)
    assert policy.sample(request).result(timeout=10)[0].text == "".join(e.text for e in events) == "ans"
    policy.close()


def test_tokens_round_trip() -> None:
    tokens = FakePolicy().tokens
    prompt = (Message("user", "grüß"),)
    assert tokens.decode(tokens.encode_prompt(prompt)) == "user: grüß\nassistant: "
    assert tokens.decode(tokens.encode_completion(prompt, "ok ☂")) == "ok ☂"
    assert tokens.encode_completion(prompt, "x")[-1] in tokens.eos_token_ids
    with pytest.raises(InvalidRequestError):
        tokens.encode_prompt(())


def test_versions_come_and_go_and_errors_are_those_of_a_real_engine(tmp_path: Path) -> None:
    policy: Policy = FakePolicy(max_context=30)
    policy.load(skilled(tmp_path / "v1", 1, 1))
    assert policy.loaded() == {0, 1}
    policy.unload(1)
    policy.unload(0)
    assert policy.loaded() == {0}
    with pytest.raises(EngineError, match="not loaded"):
        sample(policy, version=1)
    with pytest.raises(EngineError, match="not loaded"):
        policy.logps(1, [])
    (tmp_path / "v1" / "fake.json").write_text("{}")
    with pytest.raises(ModelError, match="not a fake version"):
        policy.load(Version("bot", 2, VersionKind.FULL, str(tmp_path / "v1"), "", 0, None, None, datetime.now(UTC)))
    with pytest.raises(InvalidRequestError) as caught:
        policy.sample(SampleRequest(tuple(range(30)), 0))
    assert caught.value.param == "messages"
    policy.close()
    with pytest.raises(EngineError, match="closed"):
        sample(policy)


def test_requests_wait_for_release_and_can_be_cancelled_meanwhile() -> None:
    release = threading.Event()
    policy = FakePolicy(release=release)
    futures = [policy.sample(SampleRequest(PROMPT, 0)) for _ in range(3)]
    assert policy.queued() == 3
    assert futures[1].cancel()
    release.set()
    assert futures[0].result(timeout=10)
    assert futures[2].result(timeout=10)
    with pytest.raises(CancelledError):
        futures[1].result()
    assert policy.queued() == 0
    policy.close()
