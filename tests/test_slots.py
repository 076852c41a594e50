"""Decoding in slots: a row says what it says alone, whoever comes and goes beside it, and no room is kept for nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.packing_rig import VOCAB, tiny
from torch import Tensor

from pairloop.policy import packed, rollout, slots
from pairloop.policy.decoding import open_batch
from pairloop.policy.linear import lay_out
from pairloop.policy.packed import PACKABLE, takes_packed
from pairloop.policy.packing import Ids, Packing, pack_prompts
from pairloop.policy.scoring import Traits, completion_logps
from pairloop.policy.slots import SlotBatch, compact

NO_EOS = -1


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a few short rows reach: prompts of four tokens are shared, by two rows at most, and no room is left over."""
    for name, value in {"MIN_SHARED": 4, "MAX_WIDTH": 2, "FREE_ROWS": 0, "FREE_COLUMNS": 0}.items():
        monkeypatch.setattr(slots, name, value)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny()


def logits_alone(model: Any, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
    return found


def replay(model: Any, script: Sequence[tuple[Sequence[Ids], Sequence[int], int]]) -> float:
    """Rows join, leave and go on as the script says; the largest difference from the logits of each sequence alone."""
    takes_packed(model, 64)
    batch, rows, rng, worst = SlotBatch(model), [], random.Random(0), 0.0
    logits_BV = torch.empty(0, VOCAB)
    with torch.inference_mode():
        for joining, leaving, steps in script:
            if joining:
                logits_BV = torch.cat([logits_BV, batch.admit(joining)])
                rows += [list(ids) for ids in joining]
            for step in range(steps + 1):
                expected = [logits_alone(model, ids) for ids in rows]
                worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(logits_BV, expected, strict=True)))
                if step < steps:
                    tokens = [rng.randrange(VOCAB) for _ in rows]
                    rows = [[*ids, token] for ids, token in zip(rows, tokens, strict=True)]
                    logits_BV = batch.step(torch.tensor(tokens))
            stay = compact([row for row in range(len(rows)) if row not in leaving])
            if not stay:
                batch, rows, logits_BV = SlotBatch(model), [], torch.empty(0, VOCAB)
            elif len(stay) < len(rows):
                batch.keep(stay)
                rows, logits_BV = [rows[row] for row in stay], logits_BV[stay]
    return worst


PROMPTS: tuple[Ids, ...] = ((1,), (2, 3), (4, 5, 6), (7, 8, 9, 1), (7, 8, 9, 1, 2), tuple(range(20)), tuple(range(9)), (5,) * 6)
turns = st.tuples(
    st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=5),
    st.sets(st.integers(0, 7), max_size=5).map(tuple),
    st.integers(0, 4),
)
FIXED = (
    ((PROMPTS[5], PROMPTS[3], PROMPTS[5], PROMPTS[5], PROMPTS[1]), (1,), 3),
    ((PROMPTS[3], PROMPTS[0], PROMPTS[5]), (0, 3), 2),
    ((PROMPTS[7], PROMPTS[7]), (0, 1, 2), 4),
    ((PROMPTS[6],), (), 2),
)


@pytest.mark.usefixtures("small")
@settings(max_examples=15, deadline=None)
@given(st.lists(turns, min_size=1, max_size=4))
def test_rows_that_come_and_go_say_what_they_say_alone(llama: Any, script: Sequence[Any]) -> None:
    assert replay(llama, script) < 1e-4


def test_long_prompts_are_shared_by_as_many_rows_as_there_are() -> None:
    rng = random.Random(1)
    long: Ids = tuple(rng.randrange(VOCAB) for _ in range(slots.MIN_SHARED))
    longer = (*long, 1, 2, 3)
    script = [([long] * 11 + [longer, (1, 2)], (0, 4, 11), 1), ([longer], tuple(range(9)), 1)]
    assert replay(tiny(max_position_embeddings=256), script) < 1e-4


def no_move(_: slots.Slots, source: int, target: int) -> None:
    """A slot that is handed on with what it held before."""


def no_mask(length_B: Tensor, columns: int) -> Tensor:
    """Every row sees the widest row's columns."""
    return torch.zeros(len(length_B), 1, 1, columns)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("place", "fault"), [("Slots.move", no_move), ("_closed_from", no_mask)])
def test_a_stale_slot_and_a_missing_mask_show(llama: Any, monkeypatch: pytest.MonkeyPatch, place: str, fault: object) -> None:
    assert replay(llama, FIXED) < 1e-4
    monkeypatch.setattr(f"pairloop.policy.slots.{place}", fault)
    assert replay(llama, FIXED) > 1e-2


@pytest.mark.usefixtures("small")
def test_a_position_that_is_one_off_shows(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(model: Any, ids: Tensor, positions: Tensor, **options: Any) -> Tensor:
        return packed.run(model, ids, positions + (ids.shape[1] == 1), **options)

    monkeypatch.setattr(slots, "run", late)
    assert replay(llama, FIXED) > 1e-2


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", sorted(PACKABLE))
def test_every_packable_family_decodes_in_slots(kind: str) -> None:
    assert replay(tiny(kind, gain=4.0), FIXED[:2]) < 1e-3


@pytest.mark.usefixtures("small")
def test_what_broke_in_a_slot_does_not_reach_the_next_row_in_it(llama: Any) -> None:
    takes_packed(llama, 64)
    batch = SlotBatch(llama)
    with torch.inference_mode():
        batch.admit([PROMPTS[5], PROMPTS[5], PROMPTS[3], PROMPTS[0]])
        batch.step(torch.tensor([1, 1, 1, 1]))
        for buffers in (batch._own, batch._shared):
            for buffer in (*buffers.keys, *buffers.values):
                buffer[1:] = torch.nan
        batch.keep([0])
        fresh = batch.admit([PROMPTS[3], PROMPTS[0]])
        assert fresh.isfinite().all()
        assert batch.step(torch.tensor([1, 1, 1])).isfinite().all()


def test_a_prompt_that_rows_follow_is_not_read_again(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "MIN_SHARED", 4)
    takes_packed(llama, 64)
    read: list[int] = []

    def pack(prompts: Sequence[Ids], device: torch.device) -> tuple[Packing, list[Tensor]]:
        read.append(len(prompts))
        return pack_prompts(prompts, device)

    monkeypatch.setattr(slots, "pack_prompts", pack)
    batch = SlotBatch(llama)
    with torch.inference_mode():
        first = batch.admit([PROMPTS[5], PROMPTS[5], PROMPTS[3]])
        batch.step(torch.tensor([1, 2, 3]))
        again = batch.admit([PROMPTS[5]])
    assert read == [2]
    assert torch.equal(again[0], first[0])


def test_room_grows_in_steps_and_is_given_back(llama: Any) -> None:
    takes_packed(llama, 512)
    batch, wide = SlotBatch(llama), [(n % VOCAB,) * slots.MIN_SHARED for n in range(40)]

    def bytes_held() -> int:
        both = (batch._own, batch._shared)
        return sum(buffer.nbytes for buffers in both for buffer in (*buffers.keys, *buffers.values))

    rooms = set()
    with torch.inference_mode():
        batch.admit(wide)
        for _ in range(100):
            batch.step(torch.ones(40, dtype=torch.int64))
            rooms.add(batch._own.room)
        full = bytes_held()
        batch.keep(list(range(2)))
        few = bytes_held()
        batch.admit([(1, 2)])
        batch.keep([2])
    assert len(rooms) <= 5
    assert few < full / 3
    assert bytes_held() < full / 20


def test_the_longest_beginning_stays_and_the_last_fill_the_gaps() -> None:
    assert compact([0, 2, 5, 6]) == [0, 6, 2, 5]
    assert compact([3, 4]) == [4, 3]
    assert compact([0, 1]) == [0, 1]


# ---- rollouts


@pytest.mark.parametrize("shared_from", [2, 128])
def test_greedy_rollouts_are_those_of_generate(monkeypatch: pytest.MonkeyPatch, shared_from: int) -> None:
    monkeypatch.setattr(slots, "MIN_SHARED", shared_from)
    model, prompts = tiny(dtype=torch.float32), PROMPTS[1:7]
    found = rollout.sample(model, prompts, group_size=2, max_tokens=12, eos=NO_EOS, rng=random.Random(0), greedy=True)
    plain = tiny(dtype=torch.float32)
    for prompt, group in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        limits: Any = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = tuple(plain.generate(ids, attention_mask=torch.ones_like(ids), **limits)[0, len(prompt) :].tolist())
        assert [completion.token_ids for completion in group] == [expected, expected]


@pytest.mark.parametrize("shared_from", [2, 128])
def test_recorded_log_probs_of_rollouts_are_those_of_scoring(monkeypatch: pytest.MonkeyPatch, shared_from: int) -> None:
    monkeypatch.setattr(slots, "MIN_SHARED", shared_from)
    model, eos = tiny(dtype=torch.float32, gain=4.0), 3
    found = rollout.sample(model, PROMPTS, group_size=5, max_tokens=25, eos=eos, rng=random.Random(0))
    rows = [(prompt, c) for prompt, group in zip(PROMPTS, found, strict=True) for c in group]
    with torch.no_grad():
        logp_NT, mask_NT = completion_logps(model, [prompt for prompt, _ in rows], [c.token_ids for _, c in rows])
    recorded = torch.tensor([logp for _, c in rows for logp in c.logps])
    assert (logp_NT[mask_NT] - recorded).abs().max() < 1e-4
    assert len({len(c.token_ids) for _, c in rows}) > 3
    assert all((c.token_ids[-1] == eos) == (len(c.token_ids) < 25 or eos in c.token_ids) for _, c in rows)


def test_a_laid_out_model_draws_the_same_rows() -> None:
    shape: Any = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}
    drawn = []
    for prepare in (lambda _: None, lay_out):
        model = tiny(dtype=torch.float32, gain=1.0, **shape)
        prepare(model)
        batch = open_batch(model, Traits.of(model), 64)
        with torch.inference_mode():
            drawn.append(torch.cat([batch.admit([PROMPTS[2], PROMPTS[4]]), batch.step(torch.tensor([1, 2]))]))
    assert (drawn[0] - drawn[1]).abs().max() < 1e-4
