"""The trainer on groups of any size: what is padded does not count, and micro batches add up to the batch."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.learner_rig import MakeJob, job_maker, recorded, rows_of, text_pairs
from tests.objective_by_hand import loss_by_hand
from tests.tiny_models import byte_tokenizer, write_model
from torch import Tensor, nn

from pairloop.config import TrainSection
from pairloop.learner import train
from pairloop.learner.batches import MicroBatch
from pairloop.learner.checkpoint import trained
from pairloop.learner.data import TokenGroup
from pairloop.learner.loop import load_parent
from pairloop.learner.memory import TokenBudget
from pairloop.learner.reference import check
from pairloop.learner.scores import GroupLogps, References, batch_of, group_logps, score, totals_of
from pairloop.learner.step import Drift, Trainer, kl_reference, objective_settings, optimizer_of
from pairloop.objective import OBJECTIVES, Batch, ObjectiveSettings
from pairloop.policy import packed
from pairloop.policy.packing import pack
from pairloop.policy.protocols import TokenCompletion

SIZES = (2, 5, 1, 3, 2, 4, 2, 3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), tokenizer=byte_tokenizer(), gain=3.0)


@pytest.fixture
def make_job(tmp_path: Path, base: Path) -> MakeJob:
    return job_maker(tmp_path, base)


@pytest.fixture
def model(make_job: MakeJob) -> nn.Module:
    return load_parent(make_job(text_pairs(8)))[0]


def some_groups(sizes: Sequence[int], seed: int = 0) -> list[TokenGroup]:
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, 250) for _ in range(rng.randint(low, high)))

    return [
        TokenGroup(
            f"group_{i}",
            tokens(1, 6),
            tuple(TokenCompletion(tokens(1, 9)) for _ in range(size)),
            tuple(float(g % 2 == 0) for g in range(size)),
            weight=1.0 + i % 3,
        )
        for i, size in enumerate(sizes)
    ]


def moved_references(model: nn.Module, groups: Sequence[TokenGroup]) -> References:
    """A reference and a sampler that are near the model and near each other, and neither of them the model."""
    generator = torch.Generator().manual_seed(0)

    def near(scores: Sequence[GroupLogps], spread: float) -> dict[str, GroupLogps]:
        return {
            group.group_id: tuple(logp_T + spread * torch.randn(logp_T.shape, generator=generator) for logp_T in logps)
            for group, logps in zip(groups, scores, strict=True)
        }

    scores = score(model, groups)
    return References(near(scores, 0.2), near(scores, 0.2))


# ---- padding


def test_log_probs_of_a_group_do_not_depend_on_the_groups_beside_it(model: nn.Module) -> None:
    groups = some_groups(SIZES)
    beside, mask_BGT = group_logps(model, groups)
    assert beside.shape[:2] == (8, 5)
    for b, group in enumerate(groups):
        alone, alone_mask_BGT = group_logps(model, [group])
        _, size, width = alone.shape
        torch.testing.assert_close(beside[b, :size, :width], alone[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(mask_BGT[b, :size, :width], alone_mask_BGT[0])
        assert not mask_BGT[b, size:].any()
        assert mask_BGT[b].sum() == alone_mask_BGT.sum() == sum(len(c.token_ids) for c in group.completions)


def test_scores_come_back_in_the_order_of_groups_and_completions(model: nn.Module) -> None:
    groups = some_groups(SIZES)
    for group, logps in zip(groups, score(model, groups), strict=True):
        (alone,) = score(model, [group])
        assert [len(logp_T) for logp_T in logps] == [len(c.token_ids) for c in group.completions]
        for logp_T, alone_T in zip(logps, alone, strict=True):
            torch.testing.assert_close(logp_T, alone_T, rtol=1e-5, atol=1e-5)


def test_the_batch_counts_what_is_there(model: nn.Module) -> None:
    groups = some_groups(SIZES)
    batch = batch_of(groups, *group_logps(model, groups), moved_references(model, groups))
    assert batch.present_BG.sum(1).tolist() == list(SIZES)
    totals = totals_of(groups)
    weights = [group.weight for group in groups]
    assert totals.weight == sum(weights)
    assert totals.completions == sum(weight * size for weight, size in zip(weights, SIZES, strict=True))
    assert totals.tokens == pytest.approx(float((batch.weight_B * batch.mask_BGT.sum((1, 2))).sum()))


def alone_in_float64(model: nn.Module, batch: Batch, groups: Sequence[TokenGroup]) -> Batch:
    """By the definition: each sequence in a forward pass of its own, log-softmax over the vocabulary at every position."""
    logp_BGT = torch.zeros(batch.logp_BGT.shape, dtype=torch.float64)
    for b, group in enumerate(groups):
        for g, completion in enumerate(group.completions):
            ids = [*group.prompt, *completion.token_ids]
            with torch.no_grad():
                logp_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            for t, token in enumerate(completion.token_ids):
                logp_BGT[b, g, t] = logp_TV[len(group.prompt) - 1 + t, token]
    return replace(batch, logp_BGT=logp_BGT)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_loss_is_that_of_each_sequence_alone_in_float64(model: nn.Module, name: str) -> None:
    groups = some_groups((2,) * 8 if OBJECTIVES[name].needs_pairs else SIZES)
    references = moved_references(model, groups)
    exact = model.double()
    batch = batch_of(groups, *group_logps(exact, groups), references)
    batch = replace(
        batch,
        ref_logp_BGT=batch.ref_logp_BGT.double(),
        sampler_logp_BGT=None if batch.sampler_logp_BGT is None else batch.sampler_logp_BGT.double(),
        reward_BG=batch.reward_BG.double(),
        weight_B=batch.weight_B.double(),
        kl_reference=torch.tensor(0.3, dtype=torch.float64),
    )
    alone = alone_in_float64(exact, batch, groups)
    for settings in (
        ObjectiveSettings(),
        ObjectiveSettings(beta=0.7, label_smoothing=0.2, nll_weight=0.3, kl_weight=0.1, importance="sequence"),
    ):
        loss = OBJECTIVES[name].loss(batch, settings)
        assert loss.dtype is torch.float64
        assert loss.item() == pytest.approx(loss_by_hand(name, alone, settings), rel=0, abs=1e-9)


def gradient_of_predictions(model: nn.Module, groups: Sequence[TokenGroup], name: str) -> Tensor:
    """Gradient of the loss at the last hidden states, [N, positions, hidden]: position t predicts token t + 1."""
    references = moved_references(model, groups)
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    inner: Any = model
    hook = inner.model.norm.register_forward_hook(keep)
    batch = batch_of(groups, *group_logps(model, groups), references)
    hook.remove()
    OBJECTIVES[name].loss(batch, ObjectiveSettings(kl_weight=0.1)).backward()  # type: ignore[no-untyped-call]
    (hidden,) = seen
    assert hidden.grad is not None
    return hidden.grad


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_predicts_prompt_or_padding_gets_exactly_no_gradient(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(packed, "PACKABLE", frozenset())
    groups = some_groups((2,) * 8 if OBJECTIVES[name].needs_pairs else SIZES)
    rows = [(len(group.prompt), len(completion.token_ids)) for group in groups for completion in group.completions]
    grad = gradient_of_predictions(model, groups, name)
    predicts = torch.zeros(grad.shape[:2], dtype=torch.bool)
    for row, (prompt, completion) in enumerate(rows):
        predicts[row, prompt - 1 : prompt - 1 + completion] = True
    assert grad[~predicts].eq(0).all()
    assert grad[predicts].ne(0).any()
    # The planted fault: the prompt's last token taken for one of the completion.
    longer = [replace(group, prompt=(1, *group.prompt)) for group in groups]
    predicts = torch.nn.functional.pad(predicts, (1, 0))
    assert gradient_of_predictions(model, longer, name)[~predicts].eq(0).all()
    assert gradient_of_predictions(model, begun_early(longer), name)[~predicts].ne(0).any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_in_a_packed_row_only_what_predicts_a_completion_gets_gradient(model: nn.Module, name: str) -> None:
    groups = some_groups((2,) * 8 if OBJECTIVES[name].needs_pairs else SIZES)
    longer = [replace(group, prompt=(1, *group.prompt)) for group in groups]
    silent = sum(len(group.prompt) - 1 for group in longer)
    prompts = [group.prompt for group in longer for _ in group.completions]
    packing = pack(prompts, [c.token_ids for group in longer for c in group.completions], torch.device("cpu"))
    grad = gradient_of_predictions(model, longer, name)[0]
    predicts = torch.zeros(len(grad), dtype=torch.bool)
    predicts[packing.predicts_M] = True
    assert (~predicts).sum() == silent
    assert grad[~predicts].eq(0).all()
    assert grad[predicts].ne(0).any()


def begun_early(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """The prompt's last token taken for the completions' first."""
    return [
        replace(
            group,
            prompt=group.prompt[:-1],
            completions=tuple(TokenCompletion((group.prompt[-1], *answer.token_ids)) for answer in group.completions),
        )
        for group in groups
    ]


def test_lora_moves_the_adapter_and_not_a_bit_of_the_base(make_job: MakeJob) -> None:
    model, _ = load_parent(make_job(text_pairs(8), method="lora", lora_rank=4, lora_alpha=8))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    groups = some_groups((2,) * 8)
    settings = TrainSection(learning_rate=1e-2)
    parameters = trained(model)
    references = moved_references(model, groups)
    trainer = Trainer(
        model, optimizer_of(list(parameters.values()), settings), list(parameters.values()), references, settings, TokenBudget()
    )
    for _ in range(3):
        trainer.step(groups, 1e-2)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if "lora_" in key}
    assert moved == parameters.keys()
    assert {key for key, parameter in model.named_parameters() if parameter.grad is not None} == moved


# ---- micro batches


def one_step(
    model: nn.Module, groups: Sequence[TokenGroup], references: References, settings: TrainSection
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradient of a step that changes nothing: its learning rate is 0."""
    parameters = trained(model)
    trainer = Trainer(
        model,
        optimizer_of(list(parameters.values()), settings),
        list(parameters.values()),
        references,
        settings,
        TokenBudget(settings.max_tokens_per_batch),
    )
    row = trainer.step(groups, 0.0)
    return row, {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}


def relative_error(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    difference = math.sqrt(sum(float((one[name] - other[name]).double().pow(2).sum()) for name in one))
    return difference / math.sqrt(sum(float(value.double().pow(2).sum()) for value in one.values()))


@pytest.mark.parametrize("max_tokens", [1, 60])
@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("dpo", {"nll_weight": 0.5, "label_smoothing": 0.1}),
        ("grpo", {"kl_weight": 0.1}),
        ("grpo", {"loss_mean": "tokens", "importance": "sequence"}),
        ("dapo", {}),
        ("rloo", {}),
        ("kto", {"undesirable_weight": 1.5}),
        ("sft", {}),
    ],
)
def test_micro_batches_give_the_step_of_the_whole_batch(
    model: nn.Module, objective: str, options: dict[str, Any], max_tokens: int
) -> None:
    groups = some_groups((2,) * 8 if OBJECTIVES[objective].needs_pairs else SIZES)
    references = moved_references(model, groups)
    data = {"objective": objective, "beta": 0.5, "clip_norm": 1e9, "batch_size": 8, **options}
    whole, parts = (TrainSection.model_validate({**data, "max_tokens_per_batch": bound}) for bound in (0, max_tokens))
    row, grad = one_step(model, groups, references, whole)
    again, again_grad = one_step(model, groups, references, parts)
    assert relative_error(grad, again_grad) < 1e-4
    for name in ("tokens_per_s", "max_tokens_per_batch"):
        del row[name], again[name]
    assert row == pytest.approx(again, rel=1e-4, abs=1e-5)
    assert row["ess"] < 0.99


def test_parts_that_divide_by_their_own_totals_are_found_out(model: nn.Module) -> None:
    """The planted fault: the mean over tokens of each micro batch, averaged over them."""
    groups = some_groups(SIZES)
    references = moved_references(model, groups)
    settings = TrainSection(objective="dapo", clip_norm=1e9)
    _, grad = one_step(model, groups, references, settings)
    model.zero_grad()
    for group in groups:
        batch = batch_of([group], *group_logps(model, [group]), references)
        loss, _ = OBJECTIVES["dapo"](batch, objective_settings(settings))
        (loss / len(groups)).backward()  # type: ignore[no-untyped-call]
    wrong = {name: parameter.grad for name, parameter in trained(model).items() if parameter.grad is not None}
    assert relative_error(grad, wrong) > 0.05


# ---- the reference check


def sampled(model: nn.Module, sizes: Sequence[int]) -> list[TokenGroup]:
    groups = some_groups(sizes)
    return [
        replace(
            group,
            completions=tuple(
                replace(completion, logps=tuple(logp_T.tolist()))
                for completion, logp_T in zip(group.completions, logps, strict=True)
            ),
            is_fresh=True,
        )
        for group, logps in zip(groups, score(model, groups), strict=True)
    ]


def test_recorded_log_probs_of_groups_are_checked_token_by_token(model: nn.Module) -> None:
    groups = sampled(model, (3,) * 10)
    found = check(model, groups, TrainSection(), "float32")
    assert (found["passed"], found["checked"]) == (True, 30)
    # One token of one completion of thirty, the last one of a group.
    group = groups[7]
    *others, last = group.completions
    wrong = replace(last, logps=(*last.logps[:-1], last.logps[-1] + 2e-4))
    groups[7] = replace(group, completions=(*others, wrong))
    found = check(model, groups, TrainSection(), "float32")
    assert found["passed"] is False
    assert found["max_token_delta"] == pytest.approx(2e-4, abs=2e-5)
    assert found["h_p99"] == pytest.approx(2e-4, abs=2e-5)


# ---- what is estimated


def test_length_and_entropy_of_the_policy_are_estimated_from_the_samplers_completions() -> None:
    """Eight completions that the sampler says equally often, each once: then the estimate is the policy's own figure."""
    lengths = [1, 2, 2, 3, 4, 4, 5, 7]
    policy_N = torch.softmax(torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 0)
    mask_BGT = (torch.arange(7) < torch.tensor(lengths)[:, None]).view(4, 2, 7)
    per_token = torch.tensor(lengths, dtype=torch.float64).view(4, 2, 1)
    logp_BGT = (policy_N.log().view(4, 2, 1) / per_token).expand(4, 2, 7).clone()
    logp_BGT[~mask_BGT] = 99.0
    ref_logp_BGT = (math.log(1 / 8) / per_token).expand(4, 2, 7)
    batch = Batch(logp_BGT, ref_logp_BGT, mask_BGT, torch.tensor([[1.0, 0.0]] * 4), torch.ones(4))
    drift = Drift()
    for b in range(4):
        one = slice(b, b + 1)
        drift.add(
            replace(
                batch,
                logp_BGT=logp_BGT[one],
                ref_logp_BGT=ref_logp_BGT[one],
                mask_BGT=mask_BGT[one],
                reward_BG=batch.reward_BG[one],
            )
        )
    found = {name: float(value) for name, value in drift.metrics().items()}
    length = float((policy_N * torch.tensor(lengths)).sum())
    entropy = float(-(policy_N * policy_N.log()).sum())
    assert found["length_ratio"] == pytest.approx(length / (sum(lengths) / 8), rel=1e-9)
    assert found["entropy_ratio"] == pytest.approx(entropy / math.log(8), rel=1e-9)
    assert found["ess"] == pytest.approx(1 / (8 * float(policy_N.pow(2).sum())), rel=1e-9)


def test_a_step_reports_length_and_entropy(make_job: MakeJob, base: Path) -> None:
    """The chosen answers are the short ones: the estimate starts at 1 and falls."""
    job = make_job(recorded(text_pairs(24), base))
    assert train(job).error is None
    rows = rows_of(job)
    assert rows[0]["length_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert rows[0]["entropy_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert rows[-1]["length_ratio"] < 0.95


def test_the_kl_that_kto_compares_with(model: nn.Module) -> None:
    groups = some_groups(SIZES)
    references = moved_references(model, groups)
    wanted = total = 0.0
    for group, logps in zip(groups, score(model, groups), strict=True):
        for logp_T, ref_T in zip(logps, references.reference[group.group_id], strict=True):
            w = min(math.exp(float((logp_T - ref_T).sum())), 2.0)
            wanted += group.weight * w * math.log(w)
            total += group.weight
    found = kl_reference(model, [MicroBatch(groups[:3], 0), MicroBatch(groups[3:], 0)], references, totals_of(groups))
    assert float(found) == pytest.approx(max(0.0, wanted / total), rel=1e-4)
    assert float(found) > 0.001
    far = References({name: tuple(logp_T + 1.0 for logp_T in logps) for name, logps in references.reference.items()})
    assert float(kl_reference(model, [MicroBatch(groups, 0)], far, totals_of(groups))) == 0.0
    assert not found.requires_grad
