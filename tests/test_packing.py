"""Packed rows: what a model says in one is what it says of each sequence alone, value and gradient."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tests.tiny_models import write_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from pairloop.lab.probes import in_float64
from pairloop.learner.data import TokenCompletion, TokenGroup
from pairloop.learner.scores import group_logps, score
from pairloop.policy import packed, scoring
from pairloop.policy.head import exact_logps, target_logps
from pairloop.policy.packed import NAME, PACKABLE, refusal
from pairloop.policy.packing import MIN_SHARED, Block, Ids, Packing, pack
from pairloop.policy.scoring import bare, completion_logps, load_causal_lm

VOCAB = 61
CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "sliding_window": 64,
    "query_pre_attn_scalar": 9,
    "attention_bias": True,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.25},
    "gemma3_text": {"final_logit_softcapping": 1.5},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.7},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        }
    },
}
"""What makes a family harder to pack than its default does."""


def tiny(kind: str = "llama", dtype: torch.dtype = torch.float64, gain: float = 8.0, **options: Any) -> Any:
    """A random model of a family, in evaluation mode, its distribution far from uniform."""
    torch.manual_seed(0)
    known = AutoConfig.for_model(kind)
    wanted = {name: value for name, value in SHAPE.items() if hasattr(known, name)} | OPTIONS.get(kind, {}) | options
    # Grouped matrix products are not made for float64.
    config = AutoConfig.for_model(kind, **wanted, experts_implementation="eager")
    maker: Any = AutoModelForCausalLM
    model = maker.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain)
    return model.to(dtype).eval()


def some_rows(sizes: Sequence[int] = (1, 3, 16, 2), seed: int = 0) -> tuple[list[Ids], list[Ids]]:
    """Groups of ``sizes``: a prompt of one token, completions of one, EOS inside, and prompts that begin alike."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> Ids:
        return tuple(rng.randrange(VOCAB) for _ in range(rng.randint(low, high)))

    system = tokens(MIN_SHARED, MIN_SHARED)
    prompts = [tokens(1, 1), *(tokens(1, 7) for _ in sizes[1:]), system, (*system, 5, 6), (*system, 5, 7), (*system, 9)]
    groups = [prompt for prompt, size in zip(prompts, [*sizes, 2, 2, 2, 2], strict=True) for _ in range(size)]
    completions = [tokens(1, 1) if i % 5 == 0 else (*tokens(0, 3), 0, *tokens(0, 4)) for i in range(len(groups))]
    return groups, completions


def by_the_definition(model: Any, prompts: Sequence[Ids], completions: Sequence[Ids]) -> Tensor:
    """Each sequence in a pass of its own, [M]: completion after completion."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        found.append(exact_logps(logits, torch.tensor(completion)))
    return torch.cat(found)


def value_and_gradient(model: nn.Module, logps: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the gradient of a sum in which every token counts differently."""
    model.zero_grad()
    logp_M = logps()
    weight_M = torch.linspace(-0.5, 1.5, len(logp_M), dtype=logp_M.dtype)
    torch.autograd.backward((logp_M * weight_M).sum())
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return logp_M.detach(), grads


def packed_logps(model: nn.Module, prompts: Sequence[Ids], completions: Sequence[Ids]) -> Tensor:
    logp_NT, mask_NT = completion_logps(model, prompts, completions)
    inner: Any = bare(model)
    assert inner.config._attn_implementation == NAME
    return logp_NT[mask_NT]


def worst(one: tuple[Tensor, Mapping[str, Tensor]], other: tuple[Tensor, Mapping[str, Tensor]]) -> float:
    """The largest difference: of log-probs in nats, of a gradient relative to its norm or to 1e-3 of the largest one."""
    assert one[1].keys() == other[1].keys()
    scale = 1e-3 * max(float(value.norm()) for value in other[1].values())
    gaps = [float((one[1][name] - value).norm() / max(float(value.norm()), scale)) for name, value in other[1].items()]
    return max(float((one[0] - other[0]).abs().max()), *gaps)


def compare(model: Any, prompts: Sequence[Ids], completions: Sequence[Ids]) -> float:
    expected = value_and_gradient(model, lambda: by_the_definition(model, prompts, completions))
    return worst(value_and_gradient(model, lambda: packed_logps(model, prompts, completions)), expected)


@pytest.fixture
def float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most families compute norms in float32 by name, whatever the weights are; for these tests the name means float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


# ---- equality


@pytest.mark.parametrize("kind", sorted(PACKABLE))
@pytest.mark.usefixtures("float64_throughout")
def test_every_packable_family_says_the_same_to_machine_precision(kind: str) -> None:
    assert compare(tiny(kind), *some_rows()) < 1e-10


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma", "mistral", "phi"])
def test_the_same_in_float32(kind: str) -> None:
    assert compare(tiny(kind, torch.float32, gain=4.0), *some_rows()) < 1e-5


ids = st.lists(st.integers(0, 3), min_size=1, max_size=9).map(tuple)
groups_of_ids = st.lists(st.tuples(st.booleans(), ids, st.lists(ids, min_size=1, max_size=16)), min_size=1, max_size=4)


def rows_of(groups: Sequence[tuple[bool, Ids, Sequence[Ids]]]) -> tuple[list[Ids], list[Ids]]:
    system = (1, 2) * (MIN_SHARED // 2)
    rows = [((*system, *prompt) if long else prompt, completion) for long, prompt, answers in groups for completion in answers]
    return [prompt for prompt, _ in rows], [completion for _, completion in rows]


@settings(max_examples=30, deadline=None)
@given(groups_of_ids)
def test_random_groups_say_the_same(groups: Sequence[tuple[bool, Ids, Sequence[Ids]]]) -> None:
    assert compare(in_float64(tiny()), *rows_of(groups)) < 1e-10


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
    scores = score(model, groups, micro_batch_size=2)
    monkeypatch.setattr(packed, "PACKABLE", frozenset())
    plain_BGT, plain_mask_BGT = group_logps(model, groups)
    assert torch.equal(mask_BGT, plain_mask_BGT)
    torch.testing.assert_close(logp_BGT, plain_BGT, rtol=0, atol=1e-10)
    for group, one, other in zip(groups, scores, score(model, groups, micro_batch_size=2), strict=True):
        assert len(one) == len(group.completions)
        for logp_T, plain_T in zip(one, other, strict=True):
            torch.testing.assert_close(logp_T, plain_T, rtol=0, atol=1e-6)


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
    packing = pack(histories * 2, [(5, 6)] * 8, CPU)
    assert len(packing.ids_T) == 20 + 1 + 20 + 1 + 2 + 8
    assert len(pack([(1, 2, 3), (1, 2, 4)], [(5,), (5,)], CPU).ids_T) == 6, "two tokens are not worth a segment"


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
