"""The learner's parts: jobs, batches, log-probs of groups, rates, the fake learner."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.learner_rig import MakeJob, job_maker, rows_of, text_pairs
from tests.tiny_models import byte_tokenizer, write_model

from pairloop.config import TrainSection
from pairloop.learner import TrainJob, train
from pairloop.learner.data import TokenGroup, epoch_batches
from pairloop.learner.job import TrainStatus, rewind_metrics
from pairloop.learner.loop import load_parent
from pairloop.learner.scores import group_logps
from pairloop.learner.step import learning_rate
from pairloop.policy import packed
from pairloop.policy.protocols import TokenCompletion
from pairloop.types import PairSide, VersionKind


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), tokenizer=byte_tokenizer(), gain=3.0)


@pytest.fixture
def make_job(tmp_path: Path, base: Path) -> MakeJob:
    return job_maker(tmp_path, base)


# ---- the pieces


def test_a_job_survives_its_file(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job([], lora_targets=("q_proj", "v_proj"), method="lora", dtype="bfloat16", parent_kind=VersionKind.ADAPTER)
    job.save(tmp_path / "job.json")
    assert TrainJob.load(tmp_path / "job.json") == job


def test_the_fake_learner_needs_no_torch(make_job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "fake.json").write_text('{"skill": 4}')
    pairs = [
        replace(pair, chosen=PairSide(f"answer 8{i % 10}"), rejected=PairSide(f"answer 2{i % 10}"))
        for i, pair in enumerate(text_pairs(20))
    ]
    job = make_job(pairs, pairs[:3], base_dir="fake", parent_path=str(tmp_path / "parent"), parent_kind=VersionKind.FULL)
    job.save(tmp_path / "job.json")
    code = (
        "import sys; from pathlib import Path; from pairloop.learner import TrainJob, train; import pairloop.loop.train\n"
        f"assert train(TrainJob.load(Path({str(tmp_path / 'job.json')!r}))).error is None\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert json.loads(Path(job.out_dir, "fake.json").read_text()) == {"skill": 5}
    rows = rows_of(job)
    assert rows[0]["loss"] == pytest.approx(math.log(2))
    assert rows[-1]["margin"] > 0
    assert train(make_job(pairs[:3], name="few", base_dir="fake")).status is TrainStatus.NOTHING_TO_TRAIN


def test_epochs_are_seeded_orders_in_even_batches() -> None:
    batches = epoch_batches(33, 16, seed=1, epoch=0)
    assert [len(batch) for batch in batches] == [11, 11, 11]
    assert sorted(i for batch in batches for i in batch) == list(range(33))
    assert batches == epoch_batches(33, 16, seed=1, epoch=0)
    assert batches != epoch_batches(33, 16, seed=1, epoch=1)
    assert batches != epoch_batches(33, 16, seed=2, epoch=0)


def test_the_learning_rate_warms_up_and_decays_linearly() -> None:
    settings = TrainSection(learning_rate=1.0, warmup_steps=4, final_lr_share=0.1)
    rates = [learning_rate(step, 64, settings) for step in range(1, 65)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[33] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert [learning_rate(step, 2, settings) for step in (1, 2)] == pytest.approx([1.0, 0.1])
    assert learning_rate(1, 1, settings) == pytest.approx(0.1)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    rewind_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    rewind_metrics(tmp_path / "absent.jsonl", 0)


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_padding_and_the_last_token_get_no_gradient_through_the_model(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, rows: str
) -> None:
    """Nothing is predicted from padding or from a last token, so the loss must not depend on what they are embedded as.

    A packed row holds neither, and its prompts once.
    """
    if rows == "padded":
        monkeypatch.setattr(packed, "PACKABLE", frozenset())
    model, _ = load_parent(make_job(text_pairs(8)))
    short = TokenGroup("p", (5, 6), (TokenCompletion((7, 8)), TokenCompletion((9, 10, 11))), (1.0, 0.0))
    long_ = TokenGroup("q", (5, 6, 7, 8), (TokenCompletion((9,) * 6), TokenCompletion((9, 10, 11))), (1.0, 0.0))
    alone, mask_BGT = group_logps(model, [short])
    assert mask_BGT.tolist() == [[[True, True, False], [True, True, True]]]
    embedded: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    inner: Any = model
    inner.get_input_embeddings().register_forward_hook(keep)
    beside, mask_BGT = group_logps(model, [short, long_])
    torch.testing.assert_close(beside[0, :, :3], alone[0], rtol=1e-5, atol=1e-5)
    torch.where(mask_BGT, beside, torch.zeros(())).sum().backward()  # type: ignore[no-untyped-call]
    grad = embedded[0].grad
    assert grad is not None
    moved = (grad != 0).any(-1).sum(-1)
    if rows == "packed":
        assert moved.tolist() == [2 + 1 + 2 + 4 + 5 + 2] == [grad.shape[1]]
        return
    lengths = [2 + 2, 2 + 3, 4 + 6, 4 + 3]
    assert moved.tolist() == [length - 1 for length in lengths]
