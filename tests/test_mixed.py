"""Adapters in one batch: a row says what its version says alone, whichever versions' rows come and go beside it."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.tiny_models import version, write_adapter, write_model
from torch import Tensor

from pairloop.config import PolicySection
from pairloop.policy import slots
from pairloop.policy.lane import Lane, Row, Ticket
from pairloop.policy.local import LocalPolicy
from pairloop.policy.mixed import Adapters, Choice
from pairloop.policy.packed import takes_packed
from pairloop.policy.protocols import SampleRequest, TokenEvent, TokenSequence
from pairloop.policy.scoring import Traits, load_causal_lm, load_full
from pairloop.policy.shelf import Shelf
from pairloop.policy.slots import SlotBatch, compact
from pairloop.types import Completion, SamplingParams, VersionKind

VERSIONS = (0, 1, 2, 3)
PROMPTS = ((1,), (2, 3), (7, 8, 9, 1), (7, 8, 9, 1, 2), tuple(range(1, 20)), (5,) * 6)
SECTION = {"lora_rank": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), gain=4.0)


@pytest.fixture(scope="module")
def paths(base_dir: Path) -> dict[int, Path]:
    return {n: write_adapter(base_dir / f"v{n}", base_dir, seed=n) for n in VERSIONS[1:]}


@pytest.fixture(scope="module")
def alone(base_dir: Path, paths: dict[int, Path]) -> dict[int, Any]:
    """Each version on a base of its own."""
    return {0: load_causal_lm(base_dir)} | {n: load_causal_lm(base_dir, path, VersionKind.ADAPTER) for n, path in paths.items()}


@pytest.fixture(scope="module")
def shelf(base_dir: Path, paths: dict[int, Path]) -> Shelf:
    section = PolicySection.model_validate({"model": str(base_dir), **SECTION})
    shelf = Shelf(base_dir, section, torch.device("cpu"))
    assert all(shelf.put_adapter(version(n, VersionKind.ADAPTER, path)) for n, path in paths.items())
    assert takes_packed(shelf.base, 64)
    return shelf


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of four tokens are shared, by two rows at most."""
    for name, value in {"MIN_SHARED": 4, "MAX_WIDTH": 2}.items():
        monkeypatch.setattr(slots, name, value)


@pytest.fixture
def policy(base_dir: Path, paths: dict[int, Path]) -> Iterator[LocalPolicy]:
    local = open_local(base_dir)
    for n, path in paths.items():
        local.load(version(n, VersionKind.ADAPTER, path))
    yield local
    local.close()


def open_local(folder: Path, max_batch: int = 8) -> LocalPolicy:
    return LocalPolicy(folder, PolicySection.model_validate({"model": str(folder), "max_batch": max_batch, **SECTION}))


Script = Sequence[tuple[Sequence[tuple[int, tuple[int, ...]]], Sequence[int], int]]


def replay(shelf: Shelf, alone: dict[int, Any], script: Script) -> float:
    """Rows (version, prompt) join, leave and go on as told; the largest difference from the log-probs of each alone."""

    def said_alone(number: int, ids: Sequence[int]) -> Tensor:
        found: Tensor = alone[number](input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        return found

    shelf.activate(0)
    batch, rows, rng, worst = SlotBatch(shelf.base, shelf.mixed), [], random.Random(0), 0.0
    logits_BV = torch.empty(0, 257)
    with torch.inference_mode():
        for joining, leaving, steps in script:
            if joining:
                found = batch.admit([ids for _, ids in joining], [number for number, _ in joining])
                logits_BV = torch.cat([logits_BV, found])
                rows += [(number, list(ids)) for number, ids in joining]
            for step in range(steps + 1):
                logp_BV = logits_BV.log_softmax(-1)
                worst = max(worst, *(float((a - said_alone(*row)).abs().max()) for a, row in zip(logp_BV, rows, strict=True)))
                if step < steps:
                    tokens = [rng.randrange(257) for _ in rows]
                    rows = [(number, [*ids, token]) for (number, ids), token in zip(rows, tokens, strict=True)]
                    logits_BV = batch.step(torch.tensor(tokens))
            stay = compact([row for row in range(len(rows)) if row not in leaving])
            if not stay:
                batch, rows, logits_BV = SlotBatch(shelf.base, shelf.mixed), [], torch.empty(0, 257)
            elif len(stay) < len(rows):
                batch.keep(stay)
                rows, logits_BV = [rows[row] for row in stay], logits_BV[stay]
    return worst


turns = st.tuples(
    st.lists(st.tuples(st.sampled_from(VERSIONS), st.sampled_from(PROMPTS)), min_size=1, max_size=5),
    st.sets(st.integers(0, 7), max_size=5).map(tuple),
    st.integers(0, 3),
)
LONG = PROMPTS[4]
FIXED: Script = (
    (((1, LONG), (2, LONG), (0, LONG), (1, LONG), (2, PROMPTS[1])), (0,), 2),
    (((3, LONG), (2, LONG)), (1, 2, 3), 2),
    (((0, PROMPTS[0]),), (), 1),
)


@pytest.mark.usefixtures("small")
@settings(max_examples=15, deadline=None)
@given(st.lists(turns, min_size=1, max_size=4))
def test_rows_of_any_versions_say_what_they_say_alone(shelf: Shelf, alone: dict[int, Any], script: Script) -> None:
    assert replay(shelf, alone, script) < 1e-4


choose, keep = Adapters.choose, SlotBatch.keep


def rows_swapped(self: Adapters, version_N: Sequence[int], among: Sequence[int]) -> Choice:
    return choose(self, version_N[::-1], among)


def prompts_read_by_the_base(self: Adapters, version_N: Sequence[int], among: Sequence[int]) -> Choice:
    return choose(self, [0] if len(version_N) == 1 else version_N, among)


def versions_not_moved(self: SlotBatch, rows: Sequence[int]) -> None:
    before = self._version_B[: len(rows)]
    keep(self, rows)
    self._version_B = before


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("place", "fault"),
    [
        ("mixed.Adapters.choose", rows_swapped),
        ("mixed.Adapters.choose", prompts_read_by_the_base),
        ("slots.SlotBatch.keep", versions_not_moved),
    ],
)
def test_a_row_under_the_wrong_version_shows(
    shelf: Shelf, alone: dict[int, Any], monkeypatch: pytest.MonkeyPatch, place: str, fault: object
) -> None:
    assert replay(shelf, alone, FIXED) < 1e-4
    monkeypatch.setattr(f"pairloop.policy.{place}", fault)
    assert replay(shelf, alone, FIXED) > 1e-2


def seeded(policy: LocalPolicy, numbers: Sequence[int], **params: Any) -> dict[tuple[int, tuple[int, ...]], Any]:
    """What these versions answer to every prompt, asked for all at once."""
    wanted = SamplingParams(**{"max_tokens": 9, "seed": 4, **params})
    futures = {(n, ids): policy.sample(SampleRequest(ids, n, 2, wanted)) for ids in PROMPTS for n in numbers}
    return {key: future.result(timeout=60) for key, future in futures.items()}


def assert_same(some: Sequence[Completion], others: Sequence[Completion]) -> None:
    for one, other in zip(some, others, strict=True):
        assert (one.token_ids, one.version) == (other.token_ids, other.version)
        assert one.logps == pytest.approx(other.logps, abs=1e-4)


def test_seeded_requests_of_all_versions_together_answer_as_each_alone(policy: LocalPolicy) -> None:
    together = seeded(policy, VERSIONS)
    for n in VERSIONS:
        for key, completions in seeded(policy, [n]).items():
            assert_same(together[key], completions)
    drawn = {n: [c.token_ids for (m, _), found in together.items() for c in found if m == n] for n in VERSIONS}
    assert len({tuple(tokens) for tokens in drawn.values()}) == len(VERSIONS)


def test_greedy_is_what_generate_says_under_the_adapter(policy: LocalPolicy, alone: dict[int, Any]) -> None:
    for (n, ids), (completion, _) in seeded(policy, VERSIONS, temperature=0.0).items():
        prompt = torch.tensor([ids])
        said = alone[n].generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, do_sample=False, pad_token_id=0
        )
        assert tuple(said[0, len(ids) :].tolist()) == completion.token_ids


def test_versions_come_and_go_under_traffic(paths: dict[int, Path], policy: LocalPolicy) -> None:
    expected = seeded(policy, [0, 1])
    sequences = [TokenSequence(ids, (5, 6)) for ids in PROMPTS]
    scored = policy.logps(1, sequences)
    other = seeded(policy, [3])
    for path, number in ((paths[2], 4), (paths[3], 5), (paths[2], 4), (paths[3], 5)):
        params = SamplingParams(max_tokens=9, seed=4)
        traffic = {(n, ids): policy.sample(SampleRequest(ids, n, 2, params)) for ids in PROMPTS for n in (0, 1)}
        policy.load(version(number, VersionKind.ADAPTER, path))
        late = {ids: policy.sample(SampleRequest(ids, number, 2, params)) for ids in PROMPTS}
        policy.unload(number)
        for row, wanted in zip(policy.logps(1, sequences), scored, strict=True):
            assert row == pytest.approx(wanted, abs=1e-4)
        for key, future in traffic.items():
            assert_same(expected[key], future.result(timeout=60))
        for ids, future in late.items():
            found = future.result(timeout=60)
            assert {c.version for c in found} == {number}
            assert ([c.token_ids for c in found] == [c.token_ids for c in other[3, ids]]) == (path == paths[3])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_that_cannot_be_mixed_has_a_lane_of_its_own(base_dir: Path, policy: LocalPolicy, tmp_path: Path) -> None:
    expected = seeded(policy, VERSIONS)
    broken = write_adapter(tmp_path / "broken", base_dir, seed=8)
    weights = load_file(broken / "adapter_model.safetensors")
    next(tensor for name, tensor in weights.items() if "lora_B" in name)[0, 0] = torch.nan
    save_file(weights, broken / "adapter_model.safetensors")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    maker: Any = get_peft_model
    maker(load_full(base_dir, dtype="float32", device=torch.device("cpu")), config).save_pretrained(tmp_path / "dora")
    for n, path in ((6, broken), (7, tmp_path / "dora")):
        policy.load(version(n, VersionKind.ADAPTER, path))
    assert policy._lanes[1] is policy._lanes[0]
    assert len({id(policy._lanes[n]) for n in (0, 6, 7)}) == 3
    futures = [policy.sample(SampleRequest(ids, n, 2, SamplingParams(max_tokens=20))) for ids in PROMPTS for n in (6, 7)]
    for key, completions in seeded(policy, VERSIONS).items():
        assert_same(expected[key], completions)
    for future in futures:
        future.exception(timeout=60)
    dora = load_causal_lm(base_dir, tmp_path / "dora", VersionKind.ADAPTER)
    (completion, _) = seeded(policy, [0, 7], temperature=0.0)[7, PROMPTS[1]]
    said: Any = dora
    ids = torch.tensor([[*PROMPTS[1], *completion.token_ids]])
    assert tuple(said(input_ids=ids).logits[0, 1:-1].argmax(-1).tolist()) == completion.token_ids


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize(("family", "is_mixed"), [("gpt2", True), ("sliding", False), ("bloom", False)])
def test_other_families_are_mixed_where_they_decode_in_slots(tmp_path: Path, family: str, is_mixed: bool) -> None:
    folder = write_model(tmp_path / "base", family=family, gain=3.0)
    policy = open_local(folder)
    try:
        for n in (1, 2):
            policy.load(version(n, VersionKind.ADAPTER, write_adapter(tmp_path / f"v{n}", folder, seed=n)))
        assert (policy._lanes[1] is policy._lanes[2]) == is_mixed
        for (n, ids), completions in seeded(policy, [0, 1, 2]).items():
            scored = policy.logps(n, [TokenSequence(ids, c.token_ids) for c in completions])
            for row, completion in zip(scored, completions, strict=True):
                assert row == pytest.approx(completion.logps, abs=1e-4)
    finally:
        policy.close()


def test_bfloat16_rows_are_those_of_peft_up_to_rounding(base_dir: Path, paths: dict[int, Path]) -> None:
    section = PolicySection.model_validate({"model": str(base_dir), "dtype": "bfloat16", **SECTION})
    shelf = Shelf(base_dir, section, torch.device("cpu"))
    shelf.put_adapter(version(1, VersionKind.ADAPTER, paths[1]))
    takes_packed(shelf.base, 64)
    batch, ids = SlotBatch(shelf.base, shelf.mixed), PROMPTS[4]
    with torch.inference_mode():
        shelf.activate(0)
        base, ours = batch.admit([ids, ids], [0, 1])
        plain: Any = shelf.activate(1)
        theirs = plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
    assert (ours - theirs).norm() < 0.05 * (base - theirs).norm()


def test_a_version_that_floods_the_queue_does_not_crowd_out_another(shelf: Shelf) -> None:
    lane = Lane(Traits.of(shelf.base), frozenset(), str, max_batch=8, max_context=64, supervisor=lambda work, _: work())
    for n, amount in ((1, 40), (2, 3)):
        lane.serve(n)
        ticket = Ticket(SampleRequest((1, 2), n, amount, SamplingParams(max_tokens=5)))
        lane.add(n, [Row.of(ticket, i, 5, random.Random(0), str) for i in range(amount)])
    assert Counter(row.version for row in lane._take()) == {1: 5, 2: 3}


def test_a_cancelled_version_leaves_the_others_rows_as_they_are(policy: LocalPolicy) -> None:
    expected = seeded(policy, [0, 1])
    seen, go_on = threading.Event(), threading.Event()

    def hold(_: TokenEvent) -> None:
        seen.set()
        assert go_on.wait(60)

    doomed = policy.sample(SampleRequest((1, 2), 2, 3, SamplingParams(max_tokens=60, seed=1), on_token=hold))
    wanted = SamplingParams(max_tokens=9, seed=4)
    beside = {key: policy.sample(SampleRequest(key[1], key[0], 2, wanted)) for key in expected}
    assert seen.wait(60)
    assert doomed.cancel()
    go_on.set()
    for key, future in beside.items():
        assert_same(expected[key], future.result(timeout=60))
