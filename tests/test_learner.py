"""The learner: real training of tiny models in this process, and its child process killed in the middle."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_models import byte_tokenizer, write_adapter, write_model

from pairloop.config import TrainSection
from pairloop.formats import snapshot
from pairloop.learner import TrainJob, TrainResult, train
from pairloop.learner.data import Limits, Side, TokenPair, epoch_batches, micro_batches, tokenize
from pairloop.learner.job import TrainStatus, last_checkpoint, rewind_metrics
from pairloop.learner.loop import load_parent
from pairloop.learner.scores import pair_logps, score
from pairloop.learner.step import learning_rate
from pairloop.learner.supervise import classify
from pairloop.policy.fake import FakeTokens
from pairloop.policy.scoring import load_causal_lm
from pairloop.template import ChatTemplate
from pairloop.types import Message, PairSide, PreferencePair, VersionKind

MakeJob = Callable[..., TrainJob]

RECIPE: dict[str, Any] = {"learning_rate": 2e-3, "batch_size": 4, "epochs": 2, "warmup_steps": 2, "checkpoint_every": 1000}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), tokenizer=byte_tokenizer(), gain=3.0)


def text_pairs(count: int, start: int = 0) -> list[PreferencePair]:
    """Pairs without token ids, as read from a file: the chosen answer is the shorter one."""
    return [
        PreferencePair(
            pair_id=f"pair_{i}",
            prompt=(Message("user", f"what is {i}?"),),
            chosen=PairSide(f"{i}!"),
            rejected=PairSide(f"no idea {i}"),
        )
        for i in range(start, start + count)
    ]


def recorded(pairs: list[PreferencePair], base: Path, *, wrong_by: float = 0.0) -> list[PreferencePair]:
    """The same pairs as the base's own samples: token ids and log-probs recorded, each log-prob wrong by so much."""
    tokens = ChatTemplate.load(base)
    encoded, _ = tokenize(pairs, tokens, Limits(10_000, 10_000), parent_version=0)
    scores = score(load_causal_lm(base), encoded, micro_batch_size=0)

    def side(side: PairSide, ids: Side, logps: torch.Tensor) -> PairSide:
        return replace(side, token_ids=ids.token_ids, logps=tuple((logps + wrong_by).tolist()))

    return [
        replace(
            pair,
            sampled_by=0,
            prompt_token_ids=found.prompt,
            chosen=side(pair.chosen, found.chosen, logps.chosen),
            rejected=side(pair.rejected, found.rejected, logps.rejected),
        )
        for pair, found, logps in zip(pairs, encoded, scores, strict=True)
    ]


@pytest.fixture
def make_job(tmp_path: Path, base: Path) -> MakeJob:
    """Writes the snapshot and gives a job on it; the job's own files lie in ``tmp_path / name``."""

    def make(
        pairs: list[PreferencePair],
        heldout: list[PreferencePair] | None = None,
        *,
        name: str = "run",
        recipe: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> TrainJob:
        data = tmp_path / f"{name}-data"
        data.mkdir(exist_ok=True)
        snapshot.write(data / "train.jsonl", pairs)
        snapshot.write(data / "heldout.jsonl", heldout or [])
        defaults: dict[str, Any] = {
            "base_dir": str(base),
            "parent_path": None,
            "parent_kind": VersionKind.BASE,
            "parent_version": 0,
            "method": "full",
            "device": "cpu",
        }
        section = TrainSection.model_validate({**RECIPE, **(recipe or {})})
        return TrainJob.in_folder(tmp_path / name, snapshot_dir=str(data), train=section, **{**defaults, **settings})

    return make


def rows_of(job: TrainJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(job.metrics_path).read_text().splitlines()]


def weights_of(job: TrainJob) -> dict[str, torch.Tensor]:
    name = "model.safetensors" if job.method == "full" else "adapter_model.safetensors"
    return load_file(Path(job.out_dir) / name)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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
    pairs = recorded([replace(pair, weight=1.0 + i % 3) for i, pair in enumerate(text_pairs(8))], base)
    whole = make_job(pairs, recipe={"batch_size": 8, "epochs": 1})
    parts = make_job(pairs, name="parts", recipe={"batch_size": 8, "epochs": 1, "micro_batch_size": 3})
    assert train(whole).error is None
    assert train(parts).error is None
    names = ("loss", "nll_chosen", "grad_norm", "ess", "accuracy")
    found = {name: rows_of(parts)[0][name] for name in names}
    assert found == pytest.approx({name: rows_of(whole)[0][name] for name in names}, rel=1e-4, abs=1e-5)


def test_padding_and_the_last_token_get_no_gradient_through_the_model(make_job: MakeJob) -> None:
    """Nothing is predicted from padding or from a last token, so the loss must not depend on what they are embedded as."""
    model, _ = load_parent(make_job(text_pairs(8)))
    short = TokenPair("p", (5, 6), Side((7, 8), ()), Side((9, 10, 11), ()), 1.0, tempered=False, is_fresh=False)
    long_ = replace(short, pair_id="q", prompt=(5, 6, 7, 8), chosen=Side((9,) * 6, ()))
    alone, mask_BGT = pair_logps(model, [short])
    assert mask_BGT.tolist() == [[[True, True, False], [True, True, True]]]
    embedded: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    inner: Any = model
    inner.get_input_embeddings().register_forward_hook(keep)
    beside, mask_BGT = pair_logps(model, [short, long_])
    torch.testing.assert_close(beside[0, :, :3], alone[0], rtol=1e-5, atol=1e-5)
    torch.where(mask_BGT, beside, torch.zeros(())).sum().backward()  # type: ignore[no-untyped-call]
    grad = embedded[0].grad
    assert grad is not None
    moved = (grad != 0).any(-1).sum(-1)
    lengths = [2 + 2, 4 + 6, 2 + 3, 4 + 3]
    assert moved.tolist() == [length - 1 for length in lengths]


def test_stop_at_the_ess_budget(make_job: MakeJob) -> None:
    job = make_job(text_pairs(24), recipe={"learning_rate": 2e-2, "stop_ess": 0.9})
    result = train(job)
    assert result.stopped_because == "ess"
    assert 0 < result.steps < result.steps_planned == 12
    assert Path(job.out_dir, "model.safetensors").exists()


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


# ---- what cannot be used


def test_every_pair_that_is_not_used_has_a_reason(base: Path) -> None:
    good, long_, refused, empty, unknown, same_, light = text_pairs(7)
    pairs = [
        good,
        replace(long_, rejected=PairSide("x" * 200)),
        replace(refused, prompt=()),
        replace(empty, prompt_token_ids=(1,), chosen=PairSide("", (), ()), rejected=PairSide("", (0,), (-1.0,))),
        replace(unknown, chosen=PairSide("?", (999,), (-1.0,))),
        replace(same_, chosen=same_.rejected),
        replace(light, weight=0.0),
    ]
    usable, dropped = tokenize(pairs, ChatTemplate.load(base), Limits(100, 257), parent_version=0)
    assert [pair.pair_id for pair in usable] == ["pair_0"]
    assert dropped == {"over_long": 1, "template_refused": 1, "same_tokens": 2, "unknown_token": 1, "no_weight": 1}


def test_over_long_pairs_are_refused_and_counted(make_job: MakeJob) -> None:
    long_ = replace(text_pairs(1)[0], pair_id="long", rejected=PairSide("x" * 300))
    result = train(make_job([*text_pairs(8), long_]))
    assert (result.pairs, result.dropped) == (8, {"over_long": 1})


@pytest.mark.parametrize("count", [0, 7])
def test_too_few_pairs_are_nothing_to_train(make_job: MakeJob, count: int) -> None:
    job = make_job(text_pairs(count))
    result = train(job)
    assert (result.status, result.error, result.exit_code, result.pairs) == (TrainStatus.NOTHING_TO_TRAIN, None, 0, count)
    assert not Path(job.out_dir).exists()
    assert TrainResult.load(Path(job.result_path)) == result


def test_too_few_usable_pairs_are_nothing_to_train(make_job: MakeJob) -> None:
    result = train(make_job(text_pairs(8), recipe={"max_length": 16}))
    assert (result.status, result.dropped) == (TrainStatus.NOTHING_TO_TRAIN, {"over_long": 8})


# ---- errors


def test_divergence_ends_with_the_code_nan(make_job: MakeJob) -> None:
    job = make_job(text_pairs(16), recipe={"learning_rate": 1e30, "warmup_steps": 0})
    result = train(job)
    assert result.error is not None
    assert (result.error.code, result.error.kind, result.exit_code) == ("nan", "user_error", 2)
    assert "learning_rate" in result.error.message
    rows = rows_of(job)
    assert [row["loss"] is None or row["grad_norm"] is None for row in rows[-3:]] == [True] * 3
    assert not Path(job.out_dir).exists()


def test_a_broken_model_is_the_users_error(make_job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    error = train(make_job(text_pairs(8), base_dir=str(tmp_path / "empty"))).error
    assert error is not None
    assert (error.code, error.kind) == ("bad_model", "user_error")
    assert "config.json is missing" in error.message


def test_a_broken_snapshot_is_the_users_error(make_job: MakeJob) -> None:
    job = make_job(text_pairs(8))
    with Path(job.snapshot_dir, "train.jsonl").open("a") as file:
        file.write('{"input": {}}\n')
    error = train(job).error
    assert error is not None
    assert (error.code, error.kind) == ("bad_rows", "user_error")
    assert "train.jsonl:9" in error.message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_the_machines_error(make_job: MakeJob) -> None:
    result = train(replace(make_job(text_pairs(8)), metrics_path="/dev/full"))
    assert result.error is not None
    assert (result.error.code, result.error.kind, result.exit_code) == ("disk_full", "system_error", 1)


def test_too_little_memory_is_the_machines_error() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert classify(caught.value).code == "out_of_memory"
    assert classify(MemoryError()).kind == "system_error"
    assert classify(ZeroDivisionError("x")).code == "crash"


# ---- going on


def cut_after(steps: int) -> Callable[[Mapping[str, Any]], None]:
    def report(row: Mapping[str, Any]) -> None:
        if row["step"] == steps:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_gives_the_same_bits(make_job: MakeJob, base: Path, method: str) -> None:
    pairs, heldout = [*recorded(text_pairs(12), base), *text_pairs(12, start=12)], text_pairs(4, start=24)
    recipe = {"checkpoint_every": 3}
    straight, cut = (make_job(pairs, heldout, name=name, recipe=recipe, method=method) for name in ("straight", "cut"))
    whole = train(straight)
    with pytest.raises(KeyboardInterrupt):
        train(cut, cut_after(8))
    assert last_checkpoint(Path(cut.checkpoint_dir)) == (6, Path(cut.checkpoint_dir, "step-00000006"))
    result = train(cut)
    assert (result.resumed_from, result.steps) == (6, whole.steps)
    assert same(weights_of(cut), weights_of(straight))
    assert result.heldout_after == whole.heldout_after
    timeless = [[{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows_of(job)] for job in (cut, straight)]
    assert timeless[0] == timeless[1]


def test_a_checkpoint_of_other_data_is_refused(make_job: MakeJob) -> None:
    job = make_job(text_pairs(16), recipe={"checkpoint_every": 2})
    with pytest.raises(KeyboardInterrupt):
        train(job, cut_after(3))
    snapshot.write(Path(job.snapshot_dir, "train.jsonl"), text_pairs(16, start=1))
    error = train(job).error
    assert error is not None
    assert (error.code, error.kind) == ("checkpoint_mismatch", "user_error")


def test_a_finished_run_is_not_done_again(make_job: MakeJob) -> None:
    job = make_job(text_pairs(8))
    first = train(job)
    before = Path(job.out_dir, "model.safetensors").stat().st_mtime_ns
    assert train(job) == first
    assert Path(job.out_dir, "model.safetensors").stat().st_mtime_ns == before


def child(job: TrainJob) -> subprocess.Popen[bytes]:
    path = Path(job.result_path).parent
    path.mkdir(exist_ok=True)
    job.save(path / "job.json")
    return subprocess.Popen([sys.executable, "-m", "pairloop.learner", str(path / "job.json")])


@pytest.mark.slow
def test_a_killed_child_goes_on_to_the_same_bits(make_job: MakeJob) -> None:
    """kill -9 of the real process after its first checkpoint; what goes on ends where an unbroken run ends."""
    recipe = {"checkpoint_every": 10, "epochs": 20}
    straight, killed = (make_job(text_pairs(24), name=name, recipe=recipe) for name in ("straight", "killed"))
    process = child(killed)
    while last_checkpoint(Path(killed.checkpoint_dir)) is None:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not Path(killed.out_dir).exists()
    result = train(killed)
    assert result.error is None
    assert result.resumed_from >= 10
    assert train(straight).error is None
    assert same(weights_of(killed), weights_of(straight))


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


def test_micro_batches_keep_every_pair_once() -> None:
    pairs = [replace(pair, prompt=(1,) * (9 - i)) for i, pair in enumerate(some_token_pairs(7))]
    parts = micro_batches(pairs, 3)
    assert [len(part) for part in parts] == [3, 3, 1]
    assert sorted(pair.pair_id for part in parts for pair in part) == sorted(pair.pair_id for pair in pairs)
    assert [pair.length for part in parts for pair in part] == sorted(pair.length for pair in pairs)


def some_token_pairs(count: int) -> list[TokenPair]:
    return tokenize(text_pairs(count), FakeTokens(), Limits(1000, 257), parent_version=0)[0]


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
