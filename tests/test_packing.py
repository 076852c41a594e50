"""Packed rows: what a model says in one is what it says of each sequence alone, value and gradient."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tests.packing_rig import VOCAB, by_the_definition, compare, packed_logps, some_rows, tiny, value_and_gradient, worst
from tests.tiny_models import write_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig

from pairloop.lab.probes import in_float64
from pairloop.learner.data import TokenGroup
from pairloop.learner.scores import group_logps, precision, score
from pairloop.policy import head, packed, packing, scoring, strips
from pairloop.policy.head import target_logps
from pairloop.policy.packed import NAME, PACKABLE, refusal
from pairloop.policy.packing import MIN_SHARED, Block, Ids, Packing, pack
from pairloop.policy.protocols import TokenCompletion
from pairloop.policy.scoring import completion_logps, load_causal_lm
from pairloop.policy.strips import strip_attention

CPU = torch.device("cpu")


@pytest.fixture
def float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most families compute norms in float32 by name, whatever the weights are; for these tests the name means float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in strips also in float64, where it can be compared to the last digit."""
    monkeypatch.setattr(packed, "takes_strips", lambda *_: True)


# ---- equality


@pytest.mark.parametrize("kind", sorted(PACKABLE))
@pytest.mark.usefixtures("float64_throughout")
def test_every_packable_family_says_the_same_to_machine_precision(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = tiny(kind)
    assert compare(model, *some_rows()) < 1e-10
    in_strips(monkeypatch)
    assert compare(model, *some_rows()) < 1e-10


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma", "mistral", "phi"])
def test_the_same_in_float32(kind: str) -> None:
    assert compare(tiny(kind, torch.float32, gain=4.0), *some_rows()) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.usefixtures("float64_throughout")
def test_rows_that_are_filled_up_say_the_same(monkeypatch: pytest.MonkeyPatch, kind: str, strips: bool) -> None:
    if strips:
        in_strips(monkeypatch)
    monkeypatch.setattr(packing, "ROUNDED_FROM", 1)
    row = pack(*some_rows(), CPU)
    assert len(row.ids_T) % packing.ROUNDED_TO == 0
    assert row.n_tokens < len(row.ids_T)
    # What is behind the row may be anything: nothing of it may come out.
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda of, shape: of.new_full(shape, float("nan")))
    assert compare(tiny(kind), *some_rows()) < 1e-10


ids = st.lists(st.integers(0, 3), min_size=1, max_size=9).map(tuple)
groups_of_ids = st.lists(st.tuples(st.booleans(), ids, st.lists(ids, min_size=1, max_size=16)), min_size=1, max_size=4)


def rows_of(groups: Sequence[tuple[bool, Ids, Sequence[Ids]]]) -> tuple[list[Ids], list[Ids]]:
    system = (1, 2) * (MIN_SHARED // 2)
    rows = [((*system, *prompt) if long else prompt, completion) for long, prompt, answers in groups for completion in answers]
    return [prompt for prompt, _ in rows], [completion for _, completion in rows]


@settings(max_examples=20, deadline=None)
@given(groups_of_ids)
def test_random_groups_say_the_same(groups: Sequence[tuple[bool, Ids, Sequence[Ids]]]) -> None:
    model = in_float64(tiny())
    assert compare(model, *rows_of(groups)) < 1e-10
    with pytest.MonkeyPatch.context() as patch:
        in_strips(patch)
        assert compare(model, *rows_of(groups)) < 1e-10


def adapted(model: Any, targets: Sequence[str]) -> Any:
    torch.manual_seed(1)
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    return wrapped.eval()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("targets", [("q_proj", "v_proj", "down_proj"), ("o_proj", "lm_head")])
def test_adapters_learn_the_same_also_on_the_head(targets: Sequence[str]) -> None:
    model = adapted(in_float64(tiny(tie_word_embeddings=False)), targets).double()
    assert any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad) is ("lm_head" in targets)
    assert compare(model, *some_rows()) < 1e-10


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same(reentrant: bool) -> None:
    """The backward pass computes the layers again, when no global could say what row it was."""
    rows = some_rows()
    model: Any = in_float64(tiny())
    expected = value_and_gradient(model, lambda: by_the_definition(model, *rows))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    passes: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    if reentrant:
        model.enable_input_require_grads()

    def logps() -> Tensor:
        logp_M = packed_logps(model, *rows)
        packed_logps(model, [(1, 2)], [(3, 4)])  # another row in between
        return logp_M

    assert worst(value_and_gradient(model, logps), expected) < 1e-10
    assert len(passes) == 3


def test_bfloat16_says_nearly_the_same_in_float32() -> None:
    rows = some_rows()
    model = tiny(dtype=torch.float32, gain=3.0)
    exact, _ = value_and_gradient(model, lambda: by_the_definition(model, *rows))
    with torch.autocast("cpu", torch.bfloat16):
        rounded, grads = value_and_gradient(model, lambda: packed_logps(model, *rows))
    assert rounded.dtype is torch.float32
    assert all(grad.dtype is torch.float32 for grad in grads.values())
    assert 0 < (rounded - exact).abs().max() < 0.1
    half = completion_logps(model.bfloat16(), *rows)[0]
    assert half.dtype is torch.float32


def test_groups_come_back_as_without_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, completions = some_rows((1, 1, 1, 1))
    answers = [TokenCompletion(completion) for completion in completions]
    groups = [
        TokenGroup(str(n), prompt, tuple(answers[n : n + size]), (0.0,) * size)
        for n, (prompt, size) in enumerate(zip(prompts[:6], (1, 2, 4, 1, 3, 2), strict=True))
    ]
    model = in_float64(tiny())
    logp_BGT, mask_BGT = group_logps(model, groups)
    scores = score(model, groups)
    monkeypatch.setattr(packed, "PACKABLE", frozenset())
    plain_BGT, plain_mask_BGT = group_logps(model, groups)
    assert torch.equal(mask_BGT, plain_mask_BGT)
    torch.testing.assert_close(logp_BGT, plain_BGT, rtol=0, atol=1e-10)
    for group, one, other in zip(groups, scores, score(model, groups), strict=True):
        assert len(one) == len(group.completions)
        for logp_T, plain_T in zip(one, other, strict=True):
            torch.testing.assert_close(logp_T, plain_T, rtol=0, atol=1e-6)


def in_short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    in_strips(monkeypatch)
    monkeypatch.setattr(strips, "STRIP", 3)
    monkeypatch.setattr(strips, "MAX_SCORES", 100)


def test_strips_of_any_length_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    in_short_strips(monkeypatch)
    assert compare(in_float64(tiny()), *some_rows()) < 1e-10
    assert compare(in_float64(tiny()), [(1,) * 20] * 2 + [(2, 3)], [(4, 5) * 7, (6, 7) * 8, (8,) * 12]) < 1e-10


@pytest.mark.parametrize("fault", ["one key less", "the bias of the first"])
def test_faults_in_strips_are_caught(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    in_short_strips(monkeypatch)
    cut, bias_of = strips._strips, strips._bias

    def shortened(block: Block, rows: Any) -> Iterator[Any]:
        for strip in cut(block, rows):
            yield replace(strip, n_keys=strip.n_keys - 1, bias=strip.bias[..., :-1]) if strip.n_keys > 3 else strip

    if fault == "one key less":
        monkeypatch.setattr(strips, "_strips", shortened)
    else:
        monkeypatch.setattr(strips, "_bias", lambda *args: bias_of(*args)[:1])
    rows = [(1,) * 9, (2,) * 11, (3,) * 4], [(4, 5) * 3, (6, 7) * 3, (8,) * 6]
    assert compare(in_float64(tiny()), *rows) > 0.01


def test_bfloat16_rounds_no_more_than_a_model_without_fused_attention() -> None:
    """Attention alone, in float64 the same function; the measure is transformers' way in plain products."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 300, 16, generator=generator).mul(2).bfloat16() for heads in (4, 2, 2))
    packing = pack([(1,) * 200], [(2,) * 101], CPU)

    def attended(dtype: torch.dtype) -> Tensor:
        query_THD, key_TJD, value_TJD = (of[0].transpose(0, 1).to(dtype) for of in (query, key, value))
        return strip_attention(query_THD, key_TJD, value_TJD, packing, 0.25)

    exact, rounded = attended(torch.float64), attended(torch.bfloat16)
    scores = query @ key.repeat_interleave(2, 1).mT * 0.25
    weights = scores.masked_fill(~torch.ones(300, 300).tril().bool(), -math.inf).float().softmax(-1).bfloat16()
    eager = (weights @ value.repeat_interleave(2, 1))[0].transpose(0, 1)
    gaps = [float((of.double() - exact).norm() / exact.norm()) for of in (rounded, eager)]
    assert 0 < gaps[0] < 1.1 * gaps[1] < 0.05


# ---- the layout


def seen_by(packing: Packing) -> dict[int, list[int]]:
    """For every token of the row the tokens that it sees, in their order, read off the blocks."""
    seen: dict[int, list[int]] = {}
    for block in packing.blocks:
        own = torch.arange(block.start, block.stop)
        queries = (own if block.query_NQ is None else block.query_NQ).view(block.n, -1)
        keys = (own if block.key_NK is None else block.key_NK).view(block.n, -1)
        causal = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).tril()
        mask = (causal if block.mask_NQK is None else block.mask_NQK).expand(block.n, -1, -1)
        real = torch.arange(queries.numel()) if block.real is None else block.real
        assert len(real) == block.stop - block.start
        for t, flat in zip(own.tolist(), real.tolist(), strict=True):
            n, q = divmod(flat, queries.shape[1])
            assert queries[n, q] == t
            seen[t] = keys[n][mask[n, q]].tolist()
    return seen


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(groups_of_ids)
def test_every_token_sees_its_own_sequence_and_nothing_else(groups: Sequence[tuple[bool, Ids, Sequence[Ids]]]) -> None:
    prompts, completions = rows_of(groups)
    packing = pack(prompts, completions, CPU)
    row, positions = packing.ids_T.tolist(), packing.positions_T.tolist()
    seen = seen_by(packing)
    assert sorted(seen) == list(range(len(row)))
    assert all(before.stop == after.start for before, after in pairwise(packing.blocks))
    wanted = [(*prompt, *answer[:t]) for prompt, answer in zip(prompts, completions, strict=True) for t in range(len(answer))]
    for sequence, t in zip(wanted, packing.predicts_M.tolist(), strict=True):
        assert tuple(row[key] for key in seen[t]) == sequence
        assert [positions[key] for key in seen[t]] == list(range(len(sequence)))
    bodies = sum(len(answer) - 1 for answer in completions)
    assert len(row) <= sum(map(len, set(prompts))) + bodies


def test_what_prompts_share_is_read_once() -> None:
    system = tuple(range(20))
    histories = [system, (*system, 1), (*system, *range(30, 50), 2), (*system, *range(30, 50), 3, 4)]
    packing = pack(histories * 2, [(n, 6) for n in range(8)], CPU)
    assert len(packing.ids_T) == 20 + 1 + 20 + 1 + 2 + 8
    assert len(pack([(1, 2, 3), (1, 2, 4)], [(5,), (5,)], CPU).ids_T) == 6, "two tokens are not worth a segment"


def test_what_completions_of_a_prompt_share_is_read_once() -> None:
    answers = [(7, 7, 7, 7, n, 8) for n in range(5)]
    assert len(pack([(1, 2)] * 5, answers, CPU).ids_T) == 2 + 4 + 5, "sixteen tokens less"
    assert len(pack([(1, 2)] * 4, answers[:4], CPU).ids_T) == 2 + 4 * 5, "twelve are not worth a segment"
    assert len(pack([(1, 2)] * 4, answers[:1] * 4, CPU).ids_T) == 2 + 5, "the same answer"
    assert len(pack([(n,) for n in range(5)], answers, CPU).ids_T) == 5 + 5 * 5, "to other prompts"


def test_blocks_hold_like_sizes_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, completions = [(1,) * 4] * 8 + [(2,) * 200], [(n, 4, 5) for n in range(8)] + [(6,) * 150]
    assert [block.n for block in pack(prompts, completions, CPU).blocks] == [1, 1, 8, 1]
    assert all(block.real is None for block in pack(prompts, completions, CPU).blocks), "nothing is filled up"
    rows = some_rows()
    monkeypatch.setattr(packing, "MAX_PRODUCTS", 60)
    blocks = pack(*rows, CPU).blocks
    assert all(block.n == 1 or block.mask_NQK is None or block.n * block.mask_NQK[0].numel() <= 60 for block in blocks)
    assert compare(in_float64(tiny()), *rows) < 1e-10


# ---- planted faults


def siblings_meet(packing: Packing) -> Packing:
    """Of each block's segments one sees its neighbour's keys."""

    def mixed(block: Block) -> Block:
        return block if block.mask_NQK is None else replace(block, key_NK=block.key_NK.roll(1, 0))  # type: ignore[union-attr]

    return replace(packing, blocks=tuple(mixed(block) for block in packing.blocks))


def sees_what_comes(packing: Packing) -> Packing:
    def blind(block: Block) -> Block:
        return block if block.mask_NQK is None else replace(block, mask_NQK=torch.ones_like(block.mask_NQK))

    return replace(packing, blocks=tuple(blind(block) for block in packing.blocks))


def positions_run_on(packing: Packing) -> Packing:
    return replace(packing, positions_T=torch.arange(len(packing.positions_T)) % 64)


def first_token_from_elsewhere(packing: Packing) -> Packing:
    """The row's token before the completion, as in a row of one sequence: a sibling's last."""
    predicts_M = packing.predicts_M.clone()
    starts = (predicts_M[1:] - predicts_M[:-1] != 1).nonzero()[:, 0]
    predicts_M[starts] = predicts_M[starts + 1] - 1
    return replace(packing, predicts_M=predicts_M)


@pytest.mark.parametrize("fault", [siblings_meet, sees_what_comes, positions_run_on, first_token_from_elsewhere])
def test_planted_faults_are_caught(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Packing], Packing]) -> None:
    monkeypatch.setattr(scoring, "pack", lambda *args: fault(pack(*args)))
    assert compare(in_float64(tiny()), *some_rows()) > 0.01


# ---- the head


@pytest.mark.parametrize("kind", ["llama", "gemma", "cohere"])
def test_the_head_in_chunks_is_the_head_at_once(kind: str) -> None:
    model = tiny(kind)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(VOCAB, (23,), generator=generator)
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: sizes.append(logits.numel()))

    def both(max_logits: int) -> tuple[Tensor, Tensor, Tensor]:
        model.zero_grad()
        hidden.grad = None
        logp_M = target_logps(model, hidden, targets, max_logits=max_logits)
        torch.autograd.backward((logp_M * torch.linspace(-1, 1, 23, dtype=torch.float64)).sum())
        assert hidden.grad is not None
        return logp_M.detach(), hidden.grad, model.get_output_embeddings().weight.grad.clone()

    whole = both(10_000)
    assert sizes == [23 * VOCAB]
    sizes.clear()
    for one, other in zip(both(5 * VOCAB + 3), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert len(sizes) == 2 * 5, "five chunks, and again in the backward pass"
    assert max(sizes) <= 5 * VOCAB


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_log_probs_of_targets_are_torchs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, apart: float) -> None:
    monkeypatch.setattr(head, "STRIP", 2 * VOCAB + 1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, VOCAB, generator=generator, dtype=torch.float64).mul(4).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (7,), generator=generator)
    weight_M = torch.linspace(-1, 2, 7, dtype=torch.float64)
    found = head.exact_logps(logits, targets)
    assert found.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    (grad,) = torch.autograd.grad((found * weight_M).sum(), logits)
    exact = logits.detach().double().requires_grad_()
    wanted = -cross_entropy(exact, targets, reduction="none")
    (wanted_grad,) = torch.autograd.grad((wanted * weight_M).sum(), exact)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6 if dtype is torch.bfloat16 else apart, atol=1e-6)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=apart, atol=apart)
    assert len(head.exact_logps(logits[:0], targets[:0])) == 0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_adapters_products_are_in_bfloat16_and_their_gradients_are_not() -> None:
    rows = some_rows()
    model = adapted(tiny(dtype=torch.float32, gain=3.0), ["q_proj", "down_proj"])
    exact, wanted = value_and_gradient(model, lambda: packed_logps(model, *rows))
    model = model.bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    kinds: list[torch.dtype] = []
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    layer.lora_A["default"].register_forward_hook(lambda _, args, out: kinds.extend((args[0].dtype, out.dtype)))
    with precision(model, "bfloat16"):
        rounded, grads = value_and_gradient(model, lambda: packed_logps(model, *rows))
    assert set(kinds) == {torch.bfloat16}
    assert layer.cast_input_dtype_enabled, "as it was"
    assert grads.keys() == wanted.keys()
    assert all(grad.dtype is torch.float32 for grad in grads.values())
    assert 0 < (rounded - exact).abs().max() < 0.15
    assert max(float((grads[name] - wanted[name]).norm() / wanted[name].norm()) for name in grads) < 0.1
    with precision(model, "float32"):
        assert not torch.is_autocast_enabled("cpu")


# ---- what goes the plain way


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("bloom", {}, "models of type bloom are not known"),
        ("rwkv", {}, "models of type rwkv are not known"),
        ("mamba", {}, "models of type mamba are not known"),
        ("gemma2", {}, "models of type gemma2 are not known"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "its attention logits are capped"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "it is not causal"),
        ("llama", {"attn_implementation": "eager"}, "its attention is eager"),
        ("mistral", {"sliding_window": 8}, "its attention sees 8 tokens"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "its attention sees 8 tokens"),
        ("llama", {"layer_types": ["full_attention", "linear_attention"]}, "it has layers of type"),
    ],
)
def test_what_cannot_be_packed_says_why(kind: str, options: dict[str, Any], reason: str) -> None:
    if kind in ("bloom", "rwkv", "mamba", "gemma2"):
        known: Any = AutoConfig.for_model(kind)
        model: Any = nn.Module()
        model.config = known
    elif "layer_types" in options:
        model = tiny()
        model.config.layer_types = options["layer_types"]
    else:
        model = tiny(kind, **options)
    found = refusal(model, 9)
    assert found is not None
    assert found.startswith(reason)


def test_a_window_that_no_sequence_outgrows_is_none() -> None:
    model = in_float64(tiny("mistral", sliding_window=8))
    assert refusal(model, 8) is None
    assert compare(model, [(1, 2, 3), (4,)], [(5, 6, 7, 8, 9), (5, 6)]) < 1e-10
    assert refusal(model, 9) is not None
    longer = [(1, 2, 3), (4,)], [(5, 6, 7, 8, 9, 10), (5, 6)]
    logp_NT, mask_NT = completion_logps(model, *longer)
    torch.testing.assert_close(logp_NT[mask_NT], by_the_definition(model, *longer), rtol=0, atol=1e-10)


def test_the_reason_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed._say_once.cache_clear()
    model = load_causal_lm(write_model(tmp_path, family="bloom"))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            completion_logps(model, [(1,)], [(2,)])
    assert [record.message for record in caplog.records] == [
        "prompts are not shared by the completions that follow them: models of type bloom are not known to take packed rows"
    ]


def test_plain_passes_of_a_packed_model_and_its_files_stay_as_they_were(tmp_path: Path) -> None:
    model = tiny(dtype=torch.float32)
    read = {
        "input_ids": torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
    }
    with torch.no_grad():
        before = model(**read).logits[read["attention_mask"].bool()]
        completion_logps(model, [(1, 2)], [(3, 4)])
        after = model(**read).logits[read["attention_mask"].bool()]
    assert model.config._attn_implementation == NAME
    assert torch.equal(before, after)
    model.save_pretrained(tmp_path)
    assert NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
