"""Memory of a round: micro batches by tokens, layers computed again, what LoRA does without, and running out of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.learner_rig import MakeJob, cut_after, job_maker, recorded, rows_of, same, text_pairs, weights_of
from tests.tiny_models import FAMILIES, byte_tokenizer, write_model
from torch import Tensor, nn

from pairloop.config import TrainSection
from pairloop.errors import ConfigError
from pairloop.learner import TrainResult, train
from pairloop.learner.batches import MicroBatch, micro_batches
from pairloop.learner.checkpoint import trained
from pairloop.learner.data import TokenGroup
from pairloop.learner.loop import load_parent
from pairloop.learner.memory import TokenBudget, checkpoint_layers
from pairloop.learner.scores import References, group_logps, precision, score
from pairloop.learner.step import Trainer, optimizer_of
from pairloop.policy import packed
from pairloop.policy.packing import pack
from pairloop.policy.protocols import TokenCompletion
from pairloop.policy.scoring import LoraSettings, load_causal_lm
from pairloop.types import Message

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), tokenizer=byte_tokenizer(), gain=3.0)


@pytest.fixture
def make_job(tmp_path: Path, base: Path) -> MakeJob:
    return job_maker(tmp_path, base)


# ---- micro batches

HEADS = ((), (7,) * 20, (7,) * 20 + (8,) * 30, (7,) * 9)
some_group = st.builds(
    lambda head, tail, answers: TokenGroup(
        "", (*head, *tail), tuple(TokenCompletion(tuple(ids)) for ids in answers), (0.0,) * len(answers)
    ),
    st.sampled_from(HEADS),
    st.lists(st.integers(1, 3), min_size=1, max_size=30),
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), min_size=1, max_size=4),
)
some_batch = st.lists(some_group, max_size=12).map(
    lambda groups: [replace(group, group_id=str(i)) for i, group in enumerate(groups)]
)


def read(groups: Sequence[TokenGroup], *, is_packed: bool) -> int:
    """Tokens that a forward pass over the groups really reads."""
    rows = [(group.prompt, completion.token_ids) for group in groups for completion in group.completions]
    if is_packed:
        return pack([prompt for prompt, _ in rows], [ids for _, ids in rows], CPU).ids_T.numel()
    return len(rows) * max(len(prompt) + len(ids) for prompt, ids in rows)


@pytest.mark.parametrize("is_packed", [True, False])
@settings(deadline=None, max_examples=60)
@given(some_batch, st.integers(0, 300))
def test_micro_batches_hold_every_group_once_and_stay_within_the_bound(
    is_packed: bool, batch: list[TokenGroup], bound: int
) -> None:
    parts = micro_batches(batch, bound, packed=is_packed)
    assert sorted(group.group_id for part in parts for group in part.groups) == sorted(group.group_id for group in batch)
    assert all(part.groups for part in parts)
    assert parts == micro_batches(batch, bound, packed=is_packed)
    for part in parts:
        assert read(part.groups, is_packed=is_packed) <= part.tokens
        if not is_packed:
            assert read(part.groups, is_packed=False) == part.tokens
        assert not bound or part.tokens <= bound or len(part.groups) == 1
    assert bound or len(parts) <= 1
    # As few as can be in this order: no two neighbours fit together.
    for one, other in pairwise(parts):
        (both,) = micro_batches([*one.groups, *other.groups], 0, packed=is_packed)
        first = micro_batches([*one.groups, *other.groups], bound, packed=is_packed)
        assert both.tokens > bound or len(first) > 1


def test_prompts_that_begin_alike_are_read_together_and_parts_are_even() -> None:
    system = tuple(range(1, 101))
    other = tuple(range(101, 201))
    answer = (TokenCompletion((1, 2, 3)),)
    batch = [TokenGroup(str(i), ((system, other)[i % 2]) + (i,) * 5, answer, (0.0,)) for i in range(12)]
    assert [{group.prompt[0] for group in part.groups} for part in micro_batches(batch, 250, packed=True)] == [{1}, {101}]
    # Without sharing 12 x 107 tokens take six passes, and so they do where nothing is shared.
    alone = [replace(group, prompt=(i, *group.prompt)) for i, group in enumerate(batch)]
    assert len(micro_batches(alone, 250, packed=True)) == 6
    even = micro_batches([replace(group, prompt=(i, 1)) for i, group in enumerate(batch)], 40, packed=True)
    assert [part.tokens for part in even] == [24, 24]


def test_unknown_keys_of_earlier_versions_are_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch_size"):
        TrainSection.model_validate({"micro_batch_size": 4})


# ---- bfloat16


@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_bfloat16_step_sees_the_weights_that_the_last_one_left(make_job: MakeJob, method: str) -> None:
    """All rounds run under one autocast, whose cache of rounded weights would outlive the optimizer's steps."""
    model, _ = load_parent(make_job(text_pairs(8), method=method, dtype="bfloat16"))
    groups = some_pairs(4)
    linear = [p for name, p in model.named_parameters() if p.requires_grad and ("proj" in name)]
    with precision(model, "bfloat16"):
        before, _ = group_logps(model, groups)
        before.sum().backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in linear:
                parameter.add_(0.5)
        after, _ = group_logps(model, groups)
    with precision(model, "bfloat16"):
        fresh, _ = group_logps(model, groups)
    assert torch.equal(after, fresh)
    assert (after - before).abs().max() > 0.1


# ---- gradient checkpointing


def some_pairs(count: int) -> list[TokenGroup]:
    return [
        TokenGroup(str(i), (1, 2, 3 + i), (TokenCompletion((4, 5, 6 + i)), TokenCompletion((7, 8))), (1.0, 0.0))
        for i in range(count)
    ]


def value_and_gradients(model: nn.Module, groups: Sequence[TokenGroup]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    logp_BGT, _ = group_logps(model, groups)
    (logp_BGT.sum(-1)[:, 0] - logp_BGT.sum(-1)[:, 1]).sigmoid().log().sum().backward()  # type: ignore[no-untyped-call]
    return logp_BGT.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "method"), [*((family, "full") for family in FAMILIES), ("llama", "lora")])
def test_layers_computed_again_give_the_same_bits(tmp_path: Path, family: str, method: str) -> None:
    lora = LoraSettings(4, 8) if method == "lora" else None
    folder = write_model(tmp_path / family, family=family, gain=3.0)
    model = load_causal_lm(folder, dtype="float32", trainable=True, lora=lora)
    groups = some_pairs(4)
    logp, grads = value_and_gradients(model, groups)
    kept = saved_bytes(model, groups)
    checkpoint_layers(model)
    again, again_grads = value_and_gradients(model, groups)
    assert torch.equal(logp, again)
    assert same(grads, again_grads)
    assert grads
    assert saved_bytes(model, groups) < 0.8 * kept
    with torch.no_grad():
        assert torch.equal(group_logps(model, groups)[0], logp)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing"):
        checkpoint_layers(nn.Linear(2, 2))


def test_a_run_with_gradient_checkpointing_gives_the_same_version(make_job: MakeJob) -> None:
    plain = make_job(text_pairs(12), method="lora")
    again = make_job(text_pairs(12), name="again", method="lora", recipe={"gradient_checkpointing": True})
    assert train(plain).error is None
    assert train(again).error is None
    assert same(weights_of(plain), weights_of(again))


# ---- LoRA


@contextmanager
def counting_saved(sizes: dict[int, int]) -> Iterator[None]:
    """Notes the bytes of every storage that the graph keeps, weights included."""

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def saved_bytes(model: nn.Module, groups: Sequence[TokenGroup]) -> int:
    """Bytes of activations that a pass keeps for its backward pass."""
    sizes: dict[int, int] = {}
    with counting_saved(sizes):
        logp_BGT, _ = group_logps(model, groups)  # held until they are counted, so that no address is used twice
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert logp_BGT.requires_grad
    return sum(size for pointer, size in sizes.items() if pointer not in weights)


def backward_modules(model: nn.Module, groups: Sequence[TokenGroup]) -> set[str]:
    """The decoder layers and the embedding whose output a gradient reached."""
    reached: set[str] = set()

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found = output if isinstance(output, Tensor) else output[0]
            if found.requires_grad:
                found.register_hook(lambda _: reached.add(name))

        return hook

    def watched(name: str) -> bool:
        return name.endswith("embed_tokens") or name.rsplit(".", 1)[-1].isdigit()

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if watched(name)]
    value_and_gradients(model, groups)
    for hook in hooks:
        hook.remove()
    return {name.split("model.")[-1] for name in reached}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_lora_stops_the_backward_pass_at_the_first_adapted_layer(base: Path, checkpointed: bool) -> None:
    upper = tuple(f"model.layers.1.self_attn.{name}_proj" for name in "qv")
    groups = some_pairs(4)
    model = load_causal_lm(base, trainable=True, lora=LoraSettings(4, 8, upper))
    if checkpointed:
        checkpoint_layers(model)
    assert backward_modules(model, groups) == {"layers.1"}
    assert all((p.grad is not None) is p.requires_grad for p in model.parameters())
    everywhere = load_causal_lm(base, trainable=True, lora=LoraSettings(4, 8))
    assert backward_modules(everywhere, groups) == {"layers.0", "layers.1"}
    full = load_causal_lm(base, trainable=True)
    assert backward_modules(full, groups) == {"embed_tokens", "layers.0", "layers.1"}
    # What is below keeps nothing for a backward pass that never comes.
    if not checkpointed:
        kept = [saved_bytes(each, groups) for each in (model, everywhere)]
        assert kept[0] < 0.6 * kept[1]


def test_optimizer_state_is_of_what_trains_alone(make_job: MakeJob) -> None:
    for method in ("full", "lora"):
        model, _ = load_parent(make_job(text_pairs(8), method=method, lora_rank=4))
        groups = some_pairs(4)
        references = References({group.group_id: logps for group, logps in zip(groups, score(model, groups), strict=True)})
        section, parameters = TrainSection(), list(trained(model).values())
        trainer = Trainer(model, optimizer_of(parameters, section), parameters, references, section, TokenBudget())
        trainer.step(groups, 1e-3)
        numbers = sum(
            value.numel() for state in trainer.optimizer.state.values() for name, value in state.items() if name != "step"
        )
        assert numbers == 2 * sum(parameter.numel() for parameter in parameters)
        assert set(trainer.optimizer.state) == set(parameters)
        assert len(parameters) < len(list(model.parameters())) or method == "full"


# ---- out of memory


@contextmanager
def little_memory(monkeypatch: pytest.MonkeyPatch, largest: int, *, after: int = 0) -> Iterator[list[int]]:
    """Models on a device on which a pass over more than so many tokens finds no memory, from its so many-th pass on.

    The allocation really fails: it asks for more than there is.
    """
    seen: list[int] = []
    plain = packed.hidden_states

    def hidden_states(model: nn.Module, packing: Any) -> Tensor:
        seen.append(packing.ids_T.numel())
        if len(seen) > after and seen[-1] > largest:
            torch.empty(2**60)
        return plain(model, packing)

    with monkeypatch.context() as patch:
        patch.setattr("pairloop.policy.scoring.hidden_states", hidden_states)
        yield seen


@pytest.mark.parametrize("bound", [0, 4_096])
def test_where_memory_runs_out_the_budget_is_halved_once_and_the_run_is_that_of_the_smaller_one(
    make_job: MakeJob, base: Path, monkeypatch: pytest.MonkeyPatch, bound: int
) -> None:
    pairs = recorded(text_pairs(16), base)
    common = {"batch_size": 8, "epochs": 2, "reference_check": 0}
    job = make_job(pairs, recipe={**common, "max_tokens_per_batch": bound})
    with little_memory(monkeypatch, 200) as seen:
        result = train(job)
    assert result.error is None
    rows = rows_of(job)
    halved = rows[0]["max_tokens_per_batch"]
    assert {row["max_tokens_per_batch"] for row in rows} == {halved}
    assert 100 < halved <= 200
    assert sum(tokens > 200 for tokens in seen) == 1
    said = [row["warning"] for row in rows if "warning" in row]
    assert said == list(result.warnings)[-1:]
    assert f"train.max_tokens_per_batch = {halved}" in said[0]
    smaller = make_job(pairs, name="smaller", recipe={**common, "max_tokens_per_batch": halved})
    assert not any("memory" in warning for warning in train(smaller).warnings)
    assert same(weights_of(job), weights_of(smaller))
    assert [row["loss"] for row in rows_of(smaller)] == [row["loss"] for row in rows]


def test_a_second_time_ends_the_run_and_says_what_to_do(make_job: MakeJob, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(recorded(text_pairs(16), base), recipe={"batch_size": 8, "reference_check": 0, "checkpoint_every": 1})
    with little_memory(monkeypatch, 60) as seen:
        error = train(job).error
    assert error is not None
    assert (error.code, error.kind) == ("out_of_memory", "system_error")
    assert "train.max_tokens_per_batch" in error.message
    assert "train.gradient_checkpointing" in error.message
    assert sum(tokens > 60 for tokens in seen) == 2


def test_a_group_that_does_not_fit_alone_ends_the_run_at_once(
    make_job: MakeJob, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(recorded(text_pairs(8), base), recipe={"batch_size": 1, "reference_check": 0})
    with little_memory(monkeypatch, 10) as seen:
        error = train(job).error
    assert error is not None
    assert error.code == "out_of_memory"
    assert len(seen) == 1


def test_other_errors_are_not_taken_for_it(base: Path) -> None:
    model = load_causal_lm(base)

    def broken(_: list[MicroBatch]) -> None:
        raise RuntimeError("shapes do not match")

    budget = TokenBudget()
    with pytest.raises(RuntimeError, match="shapes"):
        budget.run(model, some_pairs(4), broken)
    assert budget == TokenBudget()


def test_scoring_passes_halve_too_and_a_killed_run_goes_on_with_the_halved_budget(
    make_job: MakeJob, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once with the references, which are kept beside the checkpoints, and once in a step, after a checkpoint."""
    for name, pairs, after, largest in (
        ("scored", text_pairs(16), 0, 400),
        ("stepped", recorded(text_pairs(16), base), 3, 200),
    ):
        recipe = {"batch_size": 8, "epochs": 3, "reference_check": 0, "checkpoint_every": 2}
        straight, cut = (make_job(pairs, name=f"{name}-{part}", recipe=recipe) for part in ("straight", "cut"))
        with little_memory(monkeypatch, largest, after=after):
            whole = train(straight)
        with little_memory(monkeypatch, largest, after=after), pytest.raises(KeyboardInterrupt):
            train(cut, cut_after(5))
        with little_memory(monkeypatch, largest) as seen:
            result = train(cut)
        assert result.resumed_from == 4
        assert max(seen) <= largest, "it was halved before"
        assert same(weights_of(cut), weights_of(straight))
        assert list(result.warnings) == list(whole.warnings)
        assert sum("memory" in warning for warning in result.warnings) == 1
        for key in ("warning", "max_tokens_per_batch"):
            assert [row.get(key) for row in rows_of(cut)] == [row.get(key) for row in rows_of(straight)]
        assert rows_of(cut)[-1]["max_tokens_per_batch"] < largest


def test_a_run_that_died_for_want_of_memory_goes_on_with_less(
    make_job: MakeJob, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"batch_size": 8, "epochs": 3, "reference_check": 0, "checkpoint_every": 1}
    job = make_job(recorded(text_pairs(16), base), recipe=recipe)
    with little_memory(monkeypatch, 60, after=2):
        assert train(job).error is not None
    less = replace(job, train=job.train.model_copy(update={"max_tokens_per_batch": 60, "gradient_checkpointing": True}))
    with little_memory(monkeypatch, 60):
        result = train(less)
    assert (result.error, result.resumed_from) == (None, 2)


LIMITED = """
import json, resource, sys
from pathlib import Path
from pairloop.learner import TrainJob
from pairloop.learner import loop, train
run = loop._run
def limited(*args):
    # What the process has now, and little more: the first step's activations do not fit.
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[2]), resource.RLIM_INFINITY))
    return run(*args)
loop._run = limited
result = train(TrainJob.load(Path(sys.argv[1])))
print(json.dumps([result.error and result.error.code, list(result.warnings)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs limits on memory as Linux has them")
def test_memory_that_is_really_too_little(make_job: MakeJob, tmp_path: Path) -> None:
    """A process whose memory the system bounds trains on with smaller passes."""
    long_ = [replace(pair, prompt=(Message("user", f"{i % 10}" * 300),)) for i, pair in enumerate(text_pairs(32))]
    wide = write_model(tmp_path / "wide", tokenizer=byte_tokenizer(), gain=1.0, context=1_024, hidden=256)
    recipe = {"batch_size": 32, "epochs": 1, "max_tokens_per_batch": 0}
    job = make_job(long_, base_dir=str(wide), recipe=recipe)
    job.save(tmp_path / "job.json")
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "job.json"), str(75 * 2**20)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, warnings = json.loads(done.stdout.splitlines()[-1])
    assert code is None, done.stderr[-2_000:]
    assert any("out of memory" in warning for warning in warnings), done.stderr[-2_000:]
    assert TrainResult.load(Path(job.result_path)) is not None
    assert all(math.isfinite(row["loss"]) for row in rows_of(job) if "loss" in row)


# ---- the parent's scoring pass


def test_the_parent_scores_what_is_not_recorded_in_packed_passes_and_once(
    make_job: MakeJob, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run finds the scores beside its checkpoints; recorded pairs are never scored but for the check."""
    pairs = [*text_pairs(16), *recorded(text_pairs(8, start=16), base)]
    recipe = {"reference_check": 0, "batch_size": 24, "epochs": 2, "checkpoint_every": 1}
    job = make_job(pairs, recipe=recipe)
    with little_memory(monkeypatch, 2**30) as seen, pytest.raises(KeyboardInterrupt):
        train(job, cut_after(1))
    scoring, step = seen
    assert scoring < step
    with little_memory(monkeypatch, 2**30) as seen:
        result = train(job)
    assert (result.reference["recorded"], result.reference["scored"]) == (8, 16)
    assert seen == [step] * 2, "the step that no checkpoint had, and the next; nothing is scored again"
