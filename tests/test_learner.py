"""The learner: real training of tiny models in this process."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.learner_rig import MakeJob, job_maker, recorded, rows_of, same, text_pairs, weights_of
from tests.tiny_models import byte_tokenizer, write_adapter, write_model

from pairloop.learner import TrainResult, train
from pairloop.learner.job import TrainStatus
from pairloop.template import ChatTemplate
from pairloop.types import VersionKind


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), tokenizer=byte_tokenizer(), gain=3.0)


@pytest.fixture
def make_job(tmp_path: Path, base: Path) -> MakeJob:
    return job_maker(tmp_path, base)


# ---- what training does


def test_training_moves_the_policy_the_right_way(make_job: MakeJob, base: Path) -> None:
    heard: list[Mapping[str, Any]] = []
    job = make_job(recorded(text_pairs(24), base), recorded(text_pairs(8, start=24), base))
    result = train(job, heard.append)
    assert (result.status, result.error, result.stopped_because) == (TrainStatus.SUCCEEDED, None, "completed")
    rows = rows_of(job)
    assert heard == rows
    assert [(row["step"], row["of"]) for row in rows] == [(i, 12) for i in range(1, 13)]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["ess"] == pytest.approx(1.0, abs=1e-5)
    assert rows[-1]["margin"] > 0.05
    assert rows[-1]["ess"] < 0.99
    wanted = {"loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "d_chosen", "d_rejected", "ess", "kl"}
    assert wanted | {"grad_norm", "lr", "tokens_per_s"} <= rows[0].keys()
    assert result.heldout_before["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert result.heldout_after["loss"] < result.heldout_before["loss"]
    assert result.heldout_after["accuracy"] == 1.0
    assert result.heldout_after["n"] == 8
    assert result.reference["recorded"] == 32
    assert TrainResult.load(Path(job.result_path)) == result
    assert list(Path(job.checkpoint_dir).glob("step-*")) == []


def test_the_full_version_is_a_plain_model_directory(make_job: MakeJob, base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = make_job(text_pairs(8))
    assert train(job).error is None
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(job.out_dir)
    assert not same(dict(model.state_dict()), dict(loader.from_pretrained(base).state_dict()))
    tokenizer: Any = AutoTokenizer.from_pretrained(job.out_dir)
    assert tokenizer.decode(tokenizer("abc").input_ids) == "abc"
    assert ChatTemplate.load(Path(job.out_dir)).hash == ChatTemplate.load(base).hash


def test_lora_goes_on_from_the_parents_adapter_and_stacks_nothing(make_job: MakeJob, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "parent", base, seed=3, rank=4, alpha=8)
    lora = {"method": "lora", "lora_rank": 4, "lora_alpha": 8, "parent_path": str(adapter), "parent_kind": VersionKind.ADAPTER}
    job = make_job(text_pairs(8), recipe={"learning_rate": 1e-12}, parent_version=1, **lora)
    assert train(job).error is None
    parent, child = load_file(adapter / "adapter_model.safetensors"), weights_of(job)
    assert parent.keys() == child.keys()
    for name in parent:
        torch.testing.assert_close(child[name], parent[name], rtol=0, atol=1e-7)
    moving = make_job(text_pairs(8), name="moving", parent_version=1, **lora)
    assert train(moving).metrics["margin"] > 0
    assert not same(parent, weights_of(moving))
    assert not (Path(moving.out_dir) / "model.safetensors").exists()
    config = json.loads((Path(moving.out_dir) / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (4, sorted(config["target_modules"]))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_bfloat16_trains_float32_weights(make_job: MakeJob, base: Path, method: str) -> None:
    """Full: float32 while training, bfloat16 on disk. LoRA: a bfloat16 base under a float32 adapter."""
    job = make_job(recorded(text_pairs(16), base), method=method, dtype="bfloat16")
    result = train(job)
    assert result.error is None
    assert result.reference["token_tolerance"] == 0.03
    assert rows_of(job)[-1]["margin"] > 0
    assert {tensor.dtype for tensor in weights_of(job).values()} == {torch.bfloat16 if method == "full" else torch.float32}


def test_another_rank_than_the_chains_is_refused(make_job: MakeJob, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "parent", base, seed=3, rank=4, alpha=8)
    job = make_job(text_pairs(8), method="lora", lora_rank=8, parent_path=str(adapter), parent_kind=VersionKind.ADAPTER)
    error = train(job).error
    assert error is not None
    assert (error.code, error.kind) == ("bad_model", "user_error")
    assert "r = 4" in error.message


def test_the_sft_control_raises_the_chosen_answers(make_job: MakeJob) -> None:
    job = make_job(text_pairs(16), recipe={"objective": "sft"})
    assert train(job).error is None
    rows = rows_of(job)
    assert rows[-1]["nll_chosen"] < rows[0]["nll_chosen"]
    assert rows[-1]["d_chosen"] > 0


def test_micro_batches_give_the_same_step(make_job: MakeJob, base: Path) -> None:
    # Off by less than the check tolerates: with margins of exactly 0 the accuracy would be that of rounding.
    pairs = recorded([replace(pair, weight=1.0 + i % 3) for i, pair in enumerate(text_pairs(8))], base, wrong_by=5e-5)
    whole = make_job(pairs, recipe={"batch_size": 8, "epochs": 1})
    parts = make_job(pairs, name="parts", recipe={"batch_size": 8, "epochs": 1, "max_tokens_per_batch": 120})
    assert train(whole).error is None
    assert train(parts).error is None
    names = ("loss", "nll_chosen", "grad_norm", "ess", "accuracy")
    found = {name: rows_of(parts)[0][name] for name in names}
    assert found == pytest.approx({name: rows_of(whole)[0][name] for name in names}, rel=1e-4, abs=1e-5)


RWKV = Path(os.environ.get("PAIRLOOP_TEST_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data") / (
    "models/tiny-rwkv-4v0-660K"
)


@pytest.mark.skipif(not RWKV.exists(), reason=f"no model in {RWKV}")
def test_a_recurrent_model_without_a_template_is_trained_on_string_prompts(make_job: MakeJob) -> None:
    pairs = [replace(pair, prompt=f"what is {i}?\n") for i, pair in enumerate(text_pairs(8))]
    job = make_job(pairs, pairs[:2], base_dir=str(RWKV.resolve()), recipe={"learning_rate": 1e-4, "epochs": 3})
    result = train(job)
    assert result.error is None
    assert result.heldout_after["loss"] < result.heldout_before["loss"]
    rows = rows_of(job)
    assert len(rows) == 6
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["margin"] > rows[0]["margin"]


# ---- the reference


def test_recorded_log_probs_that_are_the_models_own_are_taken(make_job: MakeJob, base: Path) -> None:
    result = train(make_job(recorded(text_pairs(40), base)))
    assert result.reference["passed"] is True
    assert result.reference["checked"] == 64
    assert (result.reference["recorded"], result.reference["scored"]) == (40, 0)
    assert result.reference["max_token_delta"] < 1e-5


def test_wrong_recorded_log_probs_are_found_and_replaced(make_job: MakeJob, base: Path) -> None:
    """A planted fault of .01 nat per token: the loss would move by less than a thousandth, the check sees it."""
    job = make_job(recorded(text_pairs(12), base, wrong_by=0.01))
    result = train(job)
    assert result.reference["passed"] is False
    assert result.reference["max_token_delta"] == pytest.approx(0.01, abs=1e-4)
    assert (result.reference["recorded"], result.reference["scored"]) == (0, 12)
    assert rows_of(job)[0]["d_chosen"] == pytest.approx(0.0, abs=1e-4)
    trusting = make_job(recorded(text_pairs(12), base, wrong_by=0.01), name="trusting", recipe={"reference_check": 0})
    assert train(trusting).reference["passed"] is None
    assert abs(rows_of(trusting)[0]["d_chosen"]) > 0.01


def test_stale_and_imported_pairs_are_scored_by_the_parent(make_job: MakeJob, base: Path) -> None:
    fresh = recorded(text_pairs(4), base)
    stale = [replace(pair, sampled_by=7) for pair in recorded(text_pairs(4, start=4), base, wrong_by=-0.2)]
    half = [replace(pair, chosen=replace(pair.chosen, logps=())) for pair in recorded(text_pairs(4, start=8), base)]
    job = make_job([*fresh, *stale, *half, *text_pairs(4, start=12)], recipe={"batch_size": 16})
    result = train(job)
    assert (result.reference["recorded"], result.reference["scored"]) == (4, 12)
    first = rows_of(job)[0]
    assert first["d_chosen"] == pytest.approx(0.0, abs=1e-4)
    assert first["ess"] < 0.99  # the stale ones were sampled by another distribution, and say so
