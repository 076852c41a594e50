"""The learner on demonstrations and scored groups, the models of its epochs, and a stop by SIGTERM: real tiny runs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.learner_rig import MakeJob, job_maker, rows_of, same, text_pairs, weights_of
from tests.test_learner_groups import one_step
from tests.tiny_models import byte_tokenizer, version, write_model
from torch import Tensor

from pairloop.config import PolicySection, TrainSection
from pairloop.learner import TrainJob, train
from pairloop.learner.data import Limits, tokenize
from pairloop.learner.job import last_checkpoint
from pairloop.learner.loop import load_parent
from pairloop.learner.scores import References, score
from pairloop.policy.local import LocalPolicy
from pairloop.policy.protocols import TokenSequence
from pairloop.template import ChatTemplate
from pairloop.types import Message, PairSide, PreferencePair, TrainingGroup, TrainingRow, VersionKind

Row = Mapping[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), tokenizer=byte_tokenizer(), gain=3.0)


@pytest.fixture
def make_job(tmp_path: Path, base: Path) -> MakeJob:
    return job_maker(tmp_path, base)


def demonstrations(count: int, start: int = 0) -> list[TrainingGroup]:
    return [
        TrainingGroup(f"demo_{i}", (Message("user", f"what is {i}?"),), (PairSide(f"{i} it is"),)) for i in range(start, count)
    ]


def scored(count: int) -> list[TrainingGroup]:
    """Four answers each; the shortest has the highest reward."""
    return [
        TrainingGroup(
            f"scored_{i}",
            (Message("user", f"what is {i}?"),),
            tuple(PairSide("so " * n + f"{i}") for n in range(4)),
            (0.9, 0.6, 0.3, 0.1),
        )
        for i in range(count)
    ]


def as_groups(pairs: list[PreferencePair]) -> list[TrainingGroup]:
    return [TrainingGroup(pair.pair_id, pair.prompt, (pair.chosen, pair.rejected), (1.0, 0.0)) for pair in pairs]


# --- demonstrations


def test_supervised_training_lowers_the_loss_of_demonstrations(make_job: MakeJob) -> None:
    """Of those trained on and of others alike. What compares answers is not reported, and no rule on samples stops it."""
    recipe = {
        "objective": "sft",
        "epochs": 6,
        "learning_rate": 1e-2,
        "min_length_ratio": 0.99,
        "max_length_ratio": 1.01,
        "stop_ess": 0.9,
    }
    job = make_job(demonstrations(16), demonstrations(24, start=16), recipe=recipe)
    result = train(job)
    rows = [row for row in rows_of(job) if "loss" in row]
    assert (result.error, result.stopped_because, result.pairs) == (None, "completed", 16)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert result.heldout_after["loss"] < 0.8 * result.heldout_before["loss"]
    assert result.heldout_after["loss"] == pytest.approx(result.heldout_after["nll_chosen"])
    absent = {"accuracy", "margin", "reward_rejected", "ess", "length_ratio", "pair_loss"}
    assert not absent & (rows[0].keys() | result.heldout_after.keys() | result.metrics.keys())
    assert result.trained_tokens == sum(row["tokens"] for row in rows)


def test_demonstrations_beside_pairs(make_job: MakeJob) -> None:
    """Supervised on both: the pairs' figures are the pairs', and importance weights are of them alone."""
    mixed: list[TrainingRow] = [*text_pairs(8), *demonstrations(16, start=8)]
    job = make_job(mixed, [*text_pairs(4, start=30), *demonstrations(42, start=38)], recipe={"objective": "sft"})
    result = train(job)
    assert result.error is None
    assert (result.heldout_after["compared"], result.heldout_after["n"]) == (4, 8)
    assert result.heldout_after["usable"] == 0.5
    assert 0 < result.metrics["ess_min"] <= 1


def test_a_rising_held_out_loss_of_demonstrations_ends_the_run(make_job: MakeJob) -> None:
    """Held out are answers that nobody would give after these lessons."""
    other = [
        TrainingGroup(f"other_{i}", (Message("user", f"what is {i}?"),), (PairSide("ZZZ ~~ %%"),)) for i in range(100, 132)
    ]
    job = make_job(demonstrations(24), other, recipe={"objective": "sft", "heldout_every": 2, "epochs": 4})
    result = train(job)
    assert result.stopped_because == "heldout_loss"
    assert result.weights_step < result.steps < result.steps_planned


@pytest.mark.parametrize("rows", [demonstrations(16), scored(16)])
def test_rows_that_do_not_fit_are_the_users_error(make_job: MakeJob, rows: list[TrainingRow]) -> None:
    error = train(make_job(rows)).error
    assert error is not None
    assert (error.code, error.kind) == ("unfit_rows", "user_error")
    assert 'train.objective = "dpo"' in error.message
    held_out = train(make_job(text_pairs(8), rows, name="held-out")).error
    assert held_out is not None
    assert held_out.code == "unfit_rows"


# --- scored groups


def test_grpo_on_scored_groups_raises_the_better_answers(make_job: MakeJob) -> None:
    recipe = {"objective": "grpo", "epochs": 4, "heldout_every": 4}
    job = make_job(scored(16), scored(20)[16:], recipe=recipe)
    result = train(job)
    assert (result.error, result.pairs) == (None, 16)
    assert result.heldout_after["compared"] == 4
    assert result.heldout_after["pair_loss"] < result.heldout_before["pair_loss"]
    assert result.heldout_after["accuracy"] > 0.9
    flat = [TrainingGroup(one.row_id, one.prompt, one.answers, (0.5,) * 4) for one in scored(8)]
    assert train(make_job([*scored(8), *flat], name="flat", recipe=recipe)).dropped == {"equal_rewards": 8}


def gradient(job: TrainJob, rows: list[TrainingRow]) -> Tensor:
    """Of the first step on all rows, as the learner reads them, flat."""
    model, _ = load_parent(job)
    groups, _ = tokenize(
        rows, ChatTemplate.load(Path(job.base_dir)), Limits(100, 257), parent_version=0, objective=job.train.objective
    )
    reference = {group.group_id: logps for group, logps in zip(groups, score(model, groups), strict=True)}
    settings = TrainSection.model_validate({**job.train.model_dump(), "clip_norm": 1e9})
    _, gradients = one_step(model, groups, References(reference), settings)
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)]).double()


def test_the_first_step_on_groups_of_two_goes_where_dpo_goes(make_job: MakeJob) -> None:
    """At the reference DPO's gradient is beta / 2 (grad s+ - grad s-), and GRPO's, summed over tokens, 1 / 2 of the same."""
    pairs = text_pairs(12)
    dpo = gradient(make_job(pairs, recipe={"beta": 0.4}), [*pairs])
    groups = as_groups(pairs)
    sums = {"objective": "grpo", "loss_mean": "sum"}
    grpo = gradient(make_job(groups, name="grpo", recipe=sums), [*groups])
    on_pairs = gradient(make_job(pairs, name="pairs", recipe=sums), [*pairs])
    assert torch.equal(grpo, on_pairs)
    assert float(torch.cosine_similarity(dpo, grpo, dim=0)) > 1 - 1e-6
    assert float(grpo.norm() / dpo.norm()) == pytest.approx(1 / 0.4, rel=1e-3)
    # The planted fault: rewards the wrong way round.
    swapped = [TrainingGroup(one.row_id, one.prompt, one.answers, (0.0, 1.0)) for one in groups]
    assert (
        float(torch.cosine_similarity(dpo, gradient(make_job(swapped, name="swapped", recipe=sums), [*swapped]), dim=0)) < -0.9
    )


# --- the models of the epochs


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_models_of_the_epochs_can_be_served_and_differ(make_job: MakeJob, base: Path, method: str) -> None:
    job = make_job(text_pairs(8), text_pairs(4, start=8), recipe={"epochs": 3}, method=method, keep_epochs=True)
    result = train(job)
    kept = [row for row in rows_of(job) if "epoch" in row]
    assert [(row["step"], row["epoch"]["number"]) for row in kept] == [(2, 1), (4, 2), (6, 3)]
    assert kept[-1]["epoch"]["heldout"] == pytest.approx(dict(result.heldout_after))
    assert sorted(path.name for path in Path(job.epochs_dir).iterdir()) == [f"step-{step:08d}" for step in (2, 4, 6)]
    policy = LocalPolicy(base, PolicySection.model_validate({"model": str(base), "device": "cpu", "method": method}))
    kind = VersionKind.FULL if method == "full" else VersionKind.ADAPTER
    sequence = TokenSequence((5, 6, 7), (8, 9, 10))
    logps = []
    try:
        for number, folder in enumerate([*(Path(row["epoch"]["folder"]) for row in kept), Path(job.out_dir)], start=1):
            policy.load(version(number, kind, folder))
            logps.append(tuple(policy.logps(number, [sequence])[0]))
            policy.unload(number)
    finally:
        policy.close()
    assert len(set(logps)) == 3
    assert logps[-1] == logps[-2]  # the last epoch's model is what came out
    plain = make_job(text_pairs(8), text_pairs(4, start=8), name="plain", recipe={"epochs": 3}, method=method)
    train(plain)
    assert same(weights_of(plain), weights_of(job))


def test_models_kept_in_bfloat16_leave_the_exact_weights_alone(make_job: MakeJob) -> None:
    kept, plain = (
        make_job(text_pairs(8), name=name, recipe={"epochs": 3}, dtype="bfloat16", keep_epochs=name == "kept")
        for name in ("kept", "plain")
    )
    assert train(kept).error is None
    assert train(plain).error is None
    assert same(weights_of(kept), weights_of(plain))
    first, last = (load_file(Path(kept.epochs_dir, f"step-{step:08d}", "model.safetensors")) for step in (2, 6))
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
    assert same(last, weights_of(kept))
    assert not same(first, last)


# --- SIGTERM


class Terminated(BaseException):
    """What the test's own handler of SIGTERM raises, where the child's would end it."""


@pytest.fixture
def on_sigterm() -> Iterator[None]:
    def end(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


def terminated_after(steps: int) -> Callable[[Row], None]:
    def report(row: Row) -> None:
        if row["step"] == steps and "loss" in row:
            signal.raise_signal(signal.SIGTERM)

    return report


@pytest.mark.usefixtures("on_sigterm")
@pytest.mark.parametrize(("method", "objective"), [("full", "sft"), ("lora", "grpo")])
def test_sigterm_writes_a_checkpoint_from_which_the_bits_are_the_same(make_job: MakeJob, method: str, objective: str) -> None:
    rows = demonstrations(12) if objective == "sft" else scored(12)
    settings: dict[str, Any] = {"recipe": {"objective": objective, "epochs": 3}, "method": method, "keep_epochs": True}
    straight, halted = (make_job(rows, rows[:4], name=name, **settings) for name in ("straight", "halted"))
    whole = train(straight)
    with pytest.raises(Terminated):
        train(halted, terminated_after(5))
    found = last_checkpoint(Path(halted.checkpoint_dir))
    assert found is not None
    assert found[0] == 5  # no step was lost, though checkpoint_every is 1000
    assert not Path(halted.result_path).exists()
    result = train(halted)
    assert (result.resumed_from, result.steps, result.trained_tokens) == (5, 9, whole.trained_tokens)
    assert same(weights_of(halted), weights_of(straight))
    for step in (3, 6, 9):
        files = [next(Path(job.epochs_dir, f"step-{step:08d}").glob("*model.safetensors")) for job in (straight, halted)]
        assert files[0].read_bytes() == files[1].read_bytes()
    timeless = [
        [{k: v for k, v in row.items() if k not in ("tokens_per_s", "epoch")} for row in rows_of(job)]
        for job in (halted, straight)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.usefixtures("on_sigterm")
def test_sigterm_in_the_last_step_leaves_nothing_half(make_job: MakeJob) -> None:
    job, straight = (make_job(text_pairs(8), name=name) for name in ("halted", "straight"))
    with pytest.raises(Terminated):
        train(job, terminated_after(4))
    assert not Path(job.out_dir).exists()
    assert train(job).steps == train(straight).steps == 4
    assert same(weights_of(job), weights_of(straight))
