"""Several processes train as one does: the same metrics at every step and the same weights, however the work is divided."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.learner_rig import MakeJob, cut_after, job_maker, recorded, rows_of, text_pairs, weights_of
from tests.tiny_models import byte_tokenizer, write_model
from tests.worker_rig import (
    killed_in_the_second,
    mean_for_sum,
    no_memory_in_the_second,
    short_of_memory_once_in_the_second,
    two_workers,
)

from pairloop.config import parse_config
from pairloop.errors import ConfigError
from pairloop.learner import TrainJob, TrainResult, train
from pairloop.learner.data import TokenGroup
from pairloop.learner.job import TrainStatus
from pairloop.learner.ray_job import connect
from pairloop.learner.workers import Workers
from pairloop.policy.protocols import TokenCompletion

TOLERANCE = 1e-5
"""Float32 sums in another order."""


@dataclass(frozen=True)
class Case:
    """One way to divide a run, and what is trained."""

    method: str
    sharding: str
    recipe: dict[str, Any]

    @property
    def name(self) -> str:
        return "-".join([self.method, self.sharding, *(str(value) for value in self.recipe.values())])


CASES = [
    Case("full", "none", {"objective": "dpo"}),
    # Passes that one of them makes for the other's sake.
    Case("full", "fsdp2", {"objective": "kto", "max_tokens_per_batch": 1}),
    Case("lora", "none", {"objective": "grpo", "max_tokens_per_batch": 1}),
    # One of the two workers has nothing to do.
    Case("lora", "fsdp2", {"objective": "dpo", "batch_size": 1, "gradient_checkpointing": True}),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), tokenizer=byte_tokenizer(), gain=3.0)


@pytest.fixture
def make_job(tmp_path: Path, base: Path) -> MakeJob:
    return job_maker(tmp_path, base)


def jobs_of(make_job: MakeJob, base: Path, case: Case) -> tuple[TrainJob, TrainJob]:
    """The same run for one process, and for two."""
    pairs, heldout = [*recorded(text_pairs(5), base), *text_pairs(4, start=5)], text_pairs(3, start=40)
    recipe = {**case.recipe, "epochs": 1, "heldout_every": 3}
    divided = {"launcher": "torchrun", "processes": 2, "sharding": case.sharding}
    alone = make_job(pairs, heldout, name=f"alone-{case.name}", method=case.method, recipe=recipe)
    return alone, make_job(pairs, heldout, name=case.name, method=case.method, recipe=recipe | divided)


def distance(one: TrainJob, other: TrainJob) -> float:
    """The largest difference of any metric at any step."""
    found = 0.0
    for a, b in zip(rows_of(one), rows_of(other), strict=True):
        assert a.keys() == b.keys() - {"warning"}
        # Timing; and at the first step policy and reference are equal, so rounding decides which answer is ahead.
        unlike = {"tokens_per_s", "max_tokens_per_batch", "warning", "heldout"} | ({"accuracy"} if a["step"] == 1 else set())
        pairs = [(a[key], b[key]) for key in a.keys() - unlike]
        pairs += [(value, b["heldout"][key]) for key, value in a.get("heldout", {}).items()]
        found = max(found, *(abs(x - y) / max(1.0, abs(x)) for x, y in pairs))
    return found


@pytest.mark.slow
def test_two_processes_train_as_one_does(make_job: MakeJob, base: Path, tmp_path: Path) -> None:
    runs = [jobs_of(make_job, base, case) for case in CASES]
    assert two_workers([divided for _, divided in runs], tmp_path / "store") == [0, 0]
    for case, (alone, divided) in zip(CASES, runs, strict=True):
        one, two = train(alone), TrainResult.load(Path(divided.result_path))
        assert two is not None
        assert (two.status, two.error, two.processes) == (TrainStatus.SUCCEEDED, None, 2), case
        assert (one.steps, one.stopped_because, one.dropped) == (two.steps, two.stopped_because, two.dropped)
        assert distance(alone, divided) < TOLERANCE, case
        ours, theirs = weights_of(alone), weights_of(divided)
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            torch.testing.assert_close(theirs[name], weight, rtol=TOLERANCE, atol=TOLERANCE)
        files = [sorted(path.name for path in Path(job.out_dir).iterdir()) for job in (alone, divided)]
        assert files[0] == files[1]


@pytest.mark.slow
def test_models_of_other_families_are_divided_too(tmp_path: Path) -> None:
    """Tied weights and matrices as convolutions (GPT-2), rows that cannot be packed (Bloom), layers in layers (Mamba)."""
    runs = []
    for family in ("gpt2", "bloom", "mamba"):
        base = write_model(tmp_path / family, tokenizer=byte_tokenizer(), family=family, gain=2.0)
        runs.append(jobs_of(job_maker(tmp_path / f"{family}-runs", base), base, Case("full", "fsdp2", {"objective": "dpo"})))
    assert two_workers([divided for _, divided in runs], tmp_path / "store") == [0, 0]
    for alone, divided in runs:
        train(alone)
        assert distance(alone, divided) < TOLERANCE
        for name, weight in weights_of(alone).items():
            torch.testing.assert_close(weights_of(divided)[name], weight, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow
def test_a_mean_in_place_of_the_sum_is_seen(make_job: MakeJob, base: Path, tmp_path: Path) -> None:
    runs = [jobs_of(make_job, base, case) for case in CASES[:2]]
    assert two_workers([divided for _, divided in runs], tmp_path / "store", mean_for_sum) == [0, 0]
    for alone, divided in runs:
        train(alone)
        # Not by the weights: Adam does not mind a factor.
        assert distance(alone, divided) > 1000 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("begun_by", [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(make_job: MakeJob, base: Path, tmp_path: Path, begun_by: int) -> None:
    """Up to step 7 by one process or by two, whose weights are divided, and then by the other: to the same best weights."""
    pairs = recorded(text_pairs(24), base)
    heldout = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in text_pairs(32, start=24)]
    recipe = {"heldout_every": 4, "epochs": 4, "checkpoint_every": 3, "stop_ess": 0.05}
    alone, broken = (make_job(pairs, heldout, name=name, recipe=recipe) for name in ("alone", "broken"))
    both = {**recipe, "launcher": "torchrun", "processes": 2, "sharding": "fsdp2"}
    divided = replace(broken, train=make_job(pairs, name="both", recipe=both).train)
    whole = train(alone)
    assert (whole.stopped_because, whole.steps, whole.weights_step) == ("heldout_loss", 8, 4)
    if begun_by == 1:
        with pytest.raises(KeyboardInterrupt):
            train(broken, cut_after(7))
        assert two_workers([divided], tmp_path / "store") == [0, 0]
    else:
        assert two_workers([divided], tmp_path / "store", partial(killed_in_the_second, at=7))[1] == -signal.SIGKILL
        train(broken)
    result = TrainResult.load(Path(broken.result_path))
    assert result is not None
    assert (result.stopped_because, result.steps, result.weights_step) == ("heldout_loss", 8, 4)
    assert (result.resumed_from, result.processes) == (6, 3 - begun_by)
    assert distance(alone, broken) < TOLERANCE
    for name, weight in weights_of(alone).items():
        torch.testing.assert_close(weights_of(broken)[name], weight, rtol=TOLERANCE, atol=TOLERANCE)


# ---- failures


@pytest.mark.slow
def test_a_workers_failure_is_the_runs(make_job: MakeJob, base: Path, tmp_path: Path) -> None:
    _, job = jobs_of(make_job, base, CASES[0])
    codes = two_workers([job], tmp_path / "store", no_memory_in_the_second)
    assert codes == [1, 1]
    result = TrainResult.load(Path(job.result_path))
    assert result is not None
    assert result.error is not None
    assert (result.error.code, result.error.kind) == ("out_of_memory", "system_error")


def test_memory_that_is_short_in_one_worker_is_everybodys(make_job: MakeJob, base: Path, tmp_path: Path) -> None:
    """Its pass is made again in halves, and the run goes on with those: as one process that has enough."""
    alone, divided = jobs_of(make_job, base, CASES[0])
    assert two_workers([divided], tmp_path / "store", short_of_memory_once_in_the_second) == [0, 0]
    train(alone)
    result = TrainResult.load(Path(divided.result_path))
    assert result is not None
    assert any("ran out of memory" in warning for warning in result.warnings)
    assert distance(alone, divided) < TOLERANCE


def test_a_killed_worker_leaves_no_result_and_nobody_waiting(make_job: MakeJob, base: Path, tmp_path: Path) -> None:
    _, job = jobs_of(make_job, base, CASES[1])
    codes = two_workers([job], tmp_path / "store", killed_in_the_second)
    assert codes == [1, -signal.SIGKILL]
    assert not Path(job.result_path).exists()


# ---- shares


groups = st.lists(st.integers(1, 50), max_size=40)


@given(lengths=groups, size=st.integers(1, 7))
def test_shares_are_even_and_leave_nothing_out(lengths: list[int], size: int) -> None:
    batch = [TokenGroup(str(i), (1,) * n, (TokenCompletion((1,)),), (0.0,)) for i, n in enumerate(lengths)]
    shares = [Workers(rank, size).share(batch) for rank in range(size)]
    assert sorted(group.group_id for share in shares for group in share) == sorted(group.group_id for group in batch)
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
    totals = [sum(group.length for group in share) for share in shares]
    assert max(totals) - min(totals) <= max((group.length for group in batch), default=0)


# ---- configuration


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"train": {"processes": 2}}, "processes"),
        ({"train": {"sharding": "fsdp2"}}, "sharding"),
        ({"train": {"launcher": "ray"}}, "ray_address"),
        ({"train": {"launcher": "torchrun", "ray_address": "http://x:1"}}, "ray_address"),
        ({"train": {"launcher": "torchrun", "processes": 2}, "policy": {"device": "cuda:1"}}, "policy.device"),
        ({"policy": {"method": "full", "quantization": "nf4"}}, "quantization"),
        ({"train": {"launcher": "torchrun", "sharding": "fsdp2"}, "policy": {"quantization": "nf4"}}, "sharding"),
    ],
)
def test_what_cannot_be_is_refused_with_the_key(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_config(sections)


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_extra_is_named(make_job: MakeJob) -> None:
    with pytest.raises(ConfigError, match=r"pairloop\[ray\]"):
        connect(make_job(text_pairs(8), recipe={"launcher": "ray", "ray_address": "http://127.0.0.1:1"}))
