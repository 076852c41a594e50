"""The local engine: what it samples, what it records, and what it does when asked for several things at once."""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from tests.tiny_models import FAMILIES, byte_tokenizer, letter_tokenizer, version, write_adapter, write_model

from pairloop.config import PolicySection
from pairloop.errors import EngineError, InvalidRequestError, ModelError
from pairloop.policy import slots
from pairloop.policy.local import LocalPolicy
from pairloop.policy.protocols import SampleRequest, TokenEvent, TokenSequence
from pairloop.policy.scoring import completion_logps, load_causal_lm
from pairloop.policy.text import TextStream
from pairloop.types import Completion, FinishReason, SamplingParams, VersionKind

RAGGED = ((1,), (2, 3), (4, 5, 6, 7, 1, 2), (3, 3, 3), (7, 6, 5, 4, 3, 2, 1, 1, 2, 3), (5,))


def open_local(folder: Path, *, max_batch: int = 8, **section: object) -> LocalPolicy:
    return LocalPolicy(folder, PolicySection.model_validate({"model": str(folder), "max_batch": max_batch, **section}))


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("letters"), tokenizer=letter_tokenizer())


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("bytes"), gain=4.0)


@pytest.fixture(scope="module")
def policy(letters: Path) -> Iterator[LocalPolicy]:
    local = open_local(letters)
    yield local
    local.close()


def sample(
    policy: LocalPolicy, prompt: tuple[int, ...], *, n: int = 1, version: int = 0, **params: object
) -> tuple[Completion, ...]:
    request = SampleRequest(prompt, version, n, SamplingParams(**params))  # type: ignore[arg-type]
    return policy.sample(request).result(timeout=60)


def chi_square(counts: Counter[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> tuple[float, int]:
    """Statistic and degrees of freedom, with outcomes expected fewer than five times in one bin."""
    total = sum(counts.values())
    assert set(counts) <= set(exact)
    bins: list[tuple[float, float]] = []
    rest_seen = rest_expected = 0.0
    for outcome, probability in exact.items():
        if probability * total < 5:
            rest_seen, rest_expected = rest_seen + counts[outcome], rest_expected + probability * total
        else:
            bins.append((counts[outcome], probability * total))
    if rest_expected > 0:
        bins.append((rest_seen, max(rest_expected, 1e-9)))
    return sum((seen - expected) ** 2 / expected for seen, expected in bins), len(bins) - 1


def enumerate_two_tokens(
    model: torch.nn.Module, prompt: tuple[int, ...], temperature: float = 1.0
) -> dict[tuple[int, ...], float]:
    """The exact probability of every completion of at most two tokens, each from a forward pass of its own, without padding."""

    def next_probs(ids: tuple[int, ...]) -> list[float]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        probs: list[float] = (logits / temperature).softmax(-1).tolist()
        return probs

    exact: dict[tuple[int, ...], float] = {}
    for first, p in enumerate(next_probs(prompt)):
        if first == 0:
            exact[(0,)] = p
        else:
            exact |= {(first, second): p * q for second, q in enumerate(next_probs((*prompt, first)))}
    assert math.isclose(sum(exact.values()), 1.0, rel_tol=1e-9)
    return exact


@pytest.mark.parametrize(
    ("max_batch", "draws", "shared_from"), [(64, 2_000, slots.MIN_SHARED), (64, 2_000, 2), (1, 600, slots.MIN_SHARED)]
)
def test_batched_and_single_sampling_draw_from_the_enumerated_distribution(
    letters: Path, monkeypatch: pytest.MonkeyPatch, max_batch: int, draws: int, shared_from: int
) -> None:
    monkeypatch.setattr(slots, "MIN_SHARED", shared_from)
    model = load_causal_lm(letters)
    prompts = RAGGED[:3] if max_batch > 1 else RAGGED[2:3]
    policy = open_local(letters, max_batch=max_batch)
    try:
        futures = [policy.sample(SampleRequest(p, 0, draws, SamplingParams(max_tokens=2, seed=5))) for p in prompts]
        for prompt, future in zip(prompts, futures, strict=True):
            counts = Counter(completion.token_ids for completion in future.result(timeout=60))
            statistic, freedom = chi_square(counts, enumerate_two_tokens(model, prompt))
            assert freedom >= 5
            assert statistic < freedom + 4 * math.sqrt(2 * freedom)
            # The same draws do not fit another prompt's distribution, so the bound means something.
            other, _ = chi_square(counts, enumerate_two_tokens(model, RAGGED[4]))
            assert other > 10 * statistic
    finally:
        policy.close()


def test_temperature_changes_the_draws_and_not_the_recorded_log_probs(policy: LocalPolicy, letters: Path) -> None:
    model, prompt = load_causal_lm(letters), RAGGED[2]
    drawn = sample(policy, prompt, n=1_500, max_tokens=2, temperature=0.5, seed=1)
    statistic, freedom = chi_square(Counter(c.token_ids for c in drawn), enumerate_two_tokens(model, prompt, temperature=0.5))
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)
    exact = enumerate_two_tokens(model, prompt)
    for completion in drawn[:50]:
        assert sum(completion.logps) == pytest.approx(math.log(exact[completion.token_ids]), abs=1e-4)


@pytest.mark.parametrize(("family", "shared_from"), [*((family, slots.MIN_SHARED) for family in FAMILIES), ("llama", 2)])
def test_recorded_log_probs_are_those_of_scoring_while_rows_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, shared_from: int
) -> None:
    monkeypatch.setattr(slots, "MIN_SHARED", shared_from)
    folder = write_model(tmp_path / family, tokenizer=letter_tokenizer(), family=family, seed=3, gain=6.0)
    model = load_causal_lm(folder)
    policy = open_local(folder, max_batch=5)
    try:
        lengths = (3, 9, 1, 14, 6, 11)
        futures = [
            policy.sample(SampleRequest(p, 0, 2, SamplingParams(max_tokens=m, seed=i)))
            for i, (p, m) in enumerate(zip(RAGGED * 3, itertools.cycle(lengths)))
        ]
        groups = [future.result(timeout=60) for future in futures]
        rows = [(p, c) for p, group in zip(RAGGED * 3, groups, strict=True) for c in group]
        logp_NT, mask_NT = completion_logps(model, [p for p, _ in rows], [c.token_ids for _, c in rows])
        recorded = torch.tensor([logp for _, c in rows for logp in c.logps])
        assert (logp_NT[mask_NT] - recorded).abs().max() < 1e-4
        scored = policy.logps(0, [TokenSequence(p, c.token_ids) for p, c in rows])
        assert torch.tensor([x for row in scored for x in row]).sub(recorded).abs().max() < 1e-4
        assert max(len(c.token_ids) for _, c in rows) > 3
    finally:
        policy.close()


def test_scoring_under_another_version_shows_as_a_mismatch(letters: Path, tmp_path: Path) -> None:
    policy = open_local(letters, method="full")
    try:
        policy.load(version(1, VersionKind.FULL, write_model(tmp_path / "v1", tokenizer=letter_tokenizer(), seed=9)))
        (completion,) = sample(policy, RAGGED[2], max_tokens=8, seed=0)
        sequence = TokenSequence(RAGGED[2], completion.token_ids)
        (same,), (other,) = policy.logps(0, [sequence]), policy.logps(1, [sequence])
        assert max(abs(a - b) for a, b in zip(same, completion.logps, strict=True)) < 1e-4
        assert max(abs(a - b) for a, b in zip(other, completion.logps, strict=True)) > 0.1
    finally:
        policy.close()


def test_a_stopped_completion_holds_its_eos_and_a_truncated_one_does_not(policy: LocalPolicy) -> None:
    drawn = sample(policy, RAGGED[0], n=200, max_tokens=6, seed=2)
    stopped = [c for c in drawn if c.finish_reason is FinishReason.STOP]
    truncated = [c for c in drawn if c.finish_reason is FinishReason.LENGTH]
    assert stopped
    assert truncated
    assert all(c.token_ids[-1] == 0 and 0 not in c.token_ids[:-1] for c in stopped)
    assert all(0 not in c.token_ids and len(c.token_ids) == 6 for c in truncated)
    assert all(len(c.logps) == len(c.token_ids) and len(c.text) == sum(t != 0 for t in c.token_ids) for c in drawn)
    assert all(c.version == 0 for c in drawn)


def test_greedy_is_the_argmax_and_a_seed_repeats_whatever_runs_beside_it(policy: LocalPolicy, letters: Path) -> None:
    model = load_causal_lm(letters)
    greedy = sample(policy, RAGGED[1], max_tokens=5, temperature=0.0)[0]
    ids = list(RAGGED[1])
    for token in greedy.token_ids:
        with torch.no_grad():
            assert token == int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    alone = sample(policy, RAGGED[1], n=3, max_tokens=6, seed=11)
    beside = [policy.sample(SampleRequest(p, 0, 4, SamplingParams(max_tokens=9))) for p in RAGGED]
    again = sample(policy, RAGGED[1], n=3, max_tokens=6, seed=11)
    assert [c.token_ids for c in again] == [c.token_ids for c in alone]
    assert len({c.token_ids for c in alone}) > 1
    assert [c.token_ids for c in sample(policy, RAGGED[1], n=3, max_tokens=6, seed=12)] != [c.token_ids for c in alone]
    assert all(len(future.result(timeout=60)) == 4 for future in beside)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_several_versions_answer_side_by_side(byte_model: Path, tmp_path: Path, method: str) -> None:
    paths = {
        n: write_adapter(tmp_path / f"v{n}", byte_model, seed=n)
        if method == "lora"
        else write_model(tmp_path / f"v{n}", seed=n, gain=4.0)
        for n in (1, 2)
    }
    kind = VersionKind.ADAPTER if method == "lora" else VersionKind.FULL
    alone = {0: load_causal_lm(byte_model)} | {n: load_causal_lm(byte_model, path, kind) for n, path in paths.items()}
    policy = open_local(byte_model, method=method, lora_rank=4, lora_alpha=8)
    try:
        for n, path in paths.items():
            policy.load(version(n, kind, path))
            policy.load(version(n, kind, path))
        assert policy.loaded() == {0, 1, 2}
        futures = {
            (n, p): policy.sample(SampleRequest(p, n, 3, SamplingParams(max_tokens=12, seed=4))) for n in alone for p in RAGGED
        }
        drawn: dict[int, set[tuple[int, ...]]] = {n: set() for n in alone}
        for (n, prompt), future in futures.items():
            for completion in future.result(timeout=60):
                assert completion.version == n
                drawn[n].add(completion.token_ids)
                logp, _ = completion_logps(alone[n], [prompt], [completion.token_ids])
                assert logp[0].tolist() == pytest.approx(completion.logps, abs=1e-4)
        assert not drawn[0] & drawn[1]
        assert not drawn[1] & drawn[2]
    finally:
        policy.close()


def test_an_unloaded_version_answers_what_was_queued_and_then_refuses(byte_model: Path, tmp_path: Path) -> None:
    policy = open_local(byte_model, lora_rank=4, lora_alpha=8)
    try:
        for n in (1, 2):
            policy.load(version(n, VersionKind.ADAPTER, write_adapter(tmp_path / f"v{n}", byte_model, seed=n)))
        queued = [policy.sample(SampleRequest((5, 6), 1, 4, SamplingParams(max_tokens=20))) for _ in range(8)]
        policy.unload(1)
        assert policy.loaded() == {0, 2}
        assert all(len(future.result(timeout=60)) == 4 for future in queued)
        with pytest.raises(EngineError, match="version 1 is not loaded"):
            sample(policy, (5, 6), version=1)
        policy.unload(2)
        policy.unload(2)
        policy.unload(0)
        assert policy.loaded() == {0}
        base = load_causal_lm(byte_model)
        (completion,) = sample(policy, (5, 6), max_tokens=8, seed=0)
        logp, _ = completion_logps(base, [(5, 6)], [completion.token_ids])
        assert logp[0].tolist() == pytest.approx(completion.logps, abs=1e-4)
        policy.load(version(1, VersionKind.ADAPTER, tmp_path / "v1"))
        assert sample(policy, (5, 6), version=1, max_tokens=3)[0].version == 1
    finally:
        policy.close()


def test_a_broken_version_is_refused_and_changes_nothing(byte_model: Path, tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good", byte_model, seed=1)
    broken = write_adapter(tmp_path / "broken", byte_model, seed=2)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    wide = write_adapter(tmp_path / "wide", byte_model, seed=3, rank=8)
    other_base = write_model(tmp_path / "other", tokenizer=letter_tokenizer())
    (tmp_path / "empty").mkdir()
    policy = open_local(byte_model, lora_rank=4, lora_alpha=8)
    try:
        policy.load(version(1, VersionKind.ADAPTER, good))
        before = [sample(policy, (9, 8, 7), version=n, max_tokens=10, seed=3) for n in (0, 1)]
        for path, kind, reason in (
            (tmp_path / "empty", VersionKind.ADAPTER, "adapter_config.json is missing"),
            (broken, VersionKind.ADAPTER, "adapter_model.safetensors: cannot be read"),
            (wide, VersionKind.ADAPTER, "r = 8, the policy's configuration says 4"),
            (tmp_path / "empty", VersionKind.FULL, "config.json is missing"),
            (other_base, VersionKind.FULL, "8 token rows, the base model has 257"),
        ):
            with pytest.raises(ModelError, match=reason):
                policy.load(version(2, kind, path))
        assert policy.loaded() == {0, 1}
        assert [sample(policy, (9, 8, 7), version=n, max_tokens=10, seed=3) for n in (0, 1)] == before
    finally:
        policy.close()


def test_an_adapter_of_another_base_leaves_no_trace(byte_model: Path, tmp_path: Path) -> None:
    foreign = write_adapter(tmp_path / "foreign", write_model(tmp_path / "wide", hidden=32), seed=1)
    good = write_adapter(tmp_path / "good", byte_model, seed=2)
    policy = open_local(byte_model, lora_rank=4, lora_alpha=8)
    try:
        # The very first adapter is the one that does not fit: PEFT would have put its layers into the base by then.
        with pytest.raises(ModelError, match="does not fit the base model"):
            policy.load(version(1, VersionKind.ADAPTER, foreign))
        policy.load(version(2, VersionKind.ADAPTER, good))
        (completion,) = sample(policy, (9, 8), version=2, max_tokens=10, seed=1)
        alone = load_causal_lm(byte_model, good, VersionKind.ADAPTER)
        logp, _ = completion_logps(alone, [(9, 8)], [completion.token_ids])
        assert logp[0].tolist() == pytest.approx(completion.logps, abs=1e-4)
    finally:
        policy.close()


def test_streamed_texts_add_up_to_the_text_in_whole_characters(byte_model: Path) -> None:
    policy = open_local(byte_model)
    events: list[TokenEvent] = []
    try:
        request = SampleRequest((1, 2, 3), 0, 6, SamplingParams(max_tokens=40, seed=1), on_token=events.append)
        completions = policy.sample(request).result(timeout=60)
        for index, completion in enumerate(completions):
            mine = [event for event in events if event.index == index]
            assert tuple(event.token_id for event in mine) == completion.token_ids
            assert tuple(event.logp for event in mine) == completion.logps
            assert "".join(event.text for event in mine) == completion.text == policy.tokens.decode(completion.token_ids)
        assert any(not event.text for event in events)
    finally:
        policy.close()


def test_text_stream_holds_back_half_characters_and_half_stop_strings() -> None:
    tokenizer = byte_tokenizer()

    def pieces(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
        stream = TextStream(lambda ids: str(tokenizer.decode(list(ids))), stop)
        ids = tokenizer.encode(text).ids
        found = []
        for i, token in enumerate(ids):
            found.append(stream.add(token, last=i == len(ids) - 1))
            if stream.stopped:
                break
        return found, stream

    assert pieces("é🎉x")[0] == ["", "é", "", "", "", "🎉", "x"]
    found, stream = pieces("ab<STOP>cd", ("<STOP>", "zz"))
    assert (found, stream.text, stream.stopped) == (["a", "b", "", "", "", "", "", ""], "ab", True)
    found, stream = pieces("a<STx", ("<STOP>",))
    assert (found, stream.text, stream.stopped) == (["a", "", "", "", "<STx"], "a<STx", False)
    assert "".join(pieces("日本語 text ü")[0]) == "日本語 text ü"
    cut = byte_tokenizer().encode("🎉").ids[:2]
    stream = TextStream(lambda ids: str(tokenizer.decode(list(ids))))
    assert [stream.add(cut[0]), stream.add(cut[1], last=True)] == ["", str(tokenizer.decode(cut))]


def test_a_stop_string_trims_the_text_and_keeps_every_sampled_token(policy: LocalPolicy) -> None:
    free = sample(policy, RAGGED[3], n=60, max_tokens=8, seed=6)
    events: list[TokenEvent] = []
    params = SamplingParams(max_tokens=8, seed=6, stop=("bc", "e"))
    stopped = policy.sample(SampleRequest(RAGGED[3], 0, 60, params, on_token=events.append)).result(timeout=60)
    trimmed = 0
    for index, (whole, cut) in enumerate(zip(free, stopped, strict=True)):
        ends = [whole.text.find(stop) for stop in params.stop if stop in whole.text]
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        assert len(cut.logps) == len(cut.token_ids)
        assert cut.text == (whole.text[: min(ends)] if ends else whole.text)
        assert "".join(event.text for event in events if event.index == index) == cut.text
        if ends:
            trimmed += 1
            assert cut.finish_reason is FinishReason.STOP
            assert policy.tokens.decode(cut.token_ids).endswith(params.stop)
    assert trimmed > 5


def test_requests_that_can_never_be_sampled_are_refused_at_once(policy: LocalPolicy) -> None:
    room = policy.max_context
    for request, param in (
        (SampleRequest((1,) * room, 0), "messages"),
        (SampleRequest((), 0), "messages"),
        (SampleRequest((8,), 0), "messages"),
        (SampleRequest((1,), 0, n=0), "n"),
        (SampleRequest((1,), 0, params=SamplingParams(max_tokens=0)), "max_tokens"),
        (SampleRequest((1,), 0, params=SamplingParams(temperature=-1.0)), "temperature"),
        (SampleRequest((1,), 0, params=SamplingParams(top_p=0.0)), "top_p"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            policy.sample(request)
        assert caught.value.param == param
    (last,) = sample(policy, (1,) * (room - 1), max_tokens=50, seed=0)
    assert len(last.token_ids) == 1
    assert policy.queued() == 0


def test_a_cancelled_request_leaves_the_batch_and_the_others_go_on(byte_model: Path) -> None:
    policy = open_local(byte_model, max_batch=4)
    seen, go_on = threading.Event(), threading.Event()
    told: list[TokenEvent] = []

    def hold(event: TokenEvent) -> None:
        told.append(event)
        seen.set()
        assert go_on.wait(60)

    try:
        # The listener holds the engine at the first token, so the request is certainly cancelled while it runs.
        long = SampleRequest((1, 2), 0, 2, SamplingParams(max_tokens=100, seed=1), on_token=hold)
        waiting = [policy.sample(SampleRequest((1, 2), 0, 2, SamplingParams(max_tokens=4))) for _ in range(4)]
        doomed = policy.sample(long)
        queued = policy.sample(SampleRequest((3, 4), 0, 8, SamplingParams(max_tokens=4)))
        assert seen.wait(60)
        assert doomed.cancel()
        go_on.set()
        assert len(queued.result(timeout=60)) == 8
        assert all(len(future.result(timeout=60)) == 2 for future in waiting)
        with pytest.raises(CancelledError):
            doomed.result()
        assert len(told) == 1
        assert policy.queued() == 0
    finally:
        go_on.set()
        policy.close()


def test_a_listener_that_raises_ends_its_own_request_only(policy: LocalPolicy, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_: TokenEvent) -> None:
        raise ValueError("the client went away")

    bad = policy.sample(SampleRequest((1, 2), 0, 2, SamplingParams(max_tokens=5), on_token=refuse))
    good = policy.sample(SampleRequest((1, 2), 0, 2, SamplingParams(max_tokens=5)))
    with pytest.raises(EngineError, match="the client went away"):
        bad.result(timeout=60)
    assert len(good.result(timeout=60)) == 2
    assert "the client went away" in caplog.text


def test_the_engine_survives_a_batch_that_fails(letters: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # A version whose config lies about its heads loads, as its weights have the right shapes, and fails when it runs.
    folder = write_model(tmp_path / "liar", tokenizer=letter_tokenizer(), seed=1)
    policy = open_local(letters, method="full")
    try:
        policy.load(version(1, VersionKind.FULL, folder))
        broken = policy._shelf.activate(1)
        with torch.no_grad():
            broken.get_output_embeddings().weight.set_(torch.zeros(8, 3))  # type: ignore[operator]
        with pytest.raises(EngineError, match="sampling failed"):
            sample(policy, (1, 2), version=1)
        with pytest.raises(EngineError, match="sampling failed"):
            policy.logps(1, [TokenSequence((1,), (2,))])
        assert len(sample(policy, (1, 2), n=2, max_tokens=3)) == 2
        assert "met an error" in caplog.text
        assert policy.queued() == 0
    finally:
        policy.close()


def test_closing_ends_what_waits_and_later_requests(byte_model: Path) -> None:
    policy = open_local(byte_model, max_batch=2)
    futures = [policy.sample(SampleRequest((1, 2), 0, 2, SamplingParams(max_tokens=100))) for _ in range(50)]
    policy.close()
    policy.close()
    outcomes = [future.exception(timeout=60) for future in futures]
    assert any(isinstance(outcome, EngineError) for outcome in outcomes)
    with pytest.raises(EngineError, match="closed"):
        sample(policy, (1, 2))
    with pytest.raises(EngineError, match="closed"):
        policy.logps(0, [TokenSequence((1,), (2,))])
    with pytest.raises(EngineError, match="closed"):
        policy.load(version(1, VersionKind.ADAPTER, write_adapter(byte_model.parent / "late", byte_model, seed=1)))


def test_scoring_runs_beside_sampling_of_other_adapters(byte_model: Path, tmp_path: Path) -> None:
    policy = open_local(byte_model, lora_rank=4, lora_alpha=8)
    try:
        policy.load(version(1, VersionKind.ADAPTER, write_adapter(tmp_path / "v1", byte_model, seed=1)))
        sequences = [TokenSequence(p, (5, 6, 7)[: 1 + i % 3]) for i, p in enumerate(RAGGED * 4)]
        sequences[3] = TokenSequence((1, 2), ())
        expected = [policy.logps(n, sequences) for n in (0, 1)]
        assert expected[0][3] == ()
        assert expected[0] != expected[1]
        busy = [policy.sample(SampleRequest((1, 2), i % 2, 2, SamplingParams(max_tokens=60, seed=i))) for i in range(12)]
        for n in (0, 1, 0, 1):
            for row, wanted in zip(policy.logps(n, sequences), expected[n], strict=True):
                assert row == pytest.approx(wanted, abs=1e-5)
        assert all(len(future.result(timeout=60)) == 2 for future in busy)
    finally:
        policy.close()
