"""A base in 4 bits: engine and trainer see the same numbers, and what is trained is a plain adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.learner_rig import RECIPE
from tests.tiny_models import byte_tokenizer, version, write_model, write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from pairloop.config import PolicySection, TrainSection
from pairloop.errors import ModelError
from pairloop.formats import snapshot
from pairloop.learner import TrainJob, TrainResult, train
from pairloop.learner.merge import merge
from pairloop.policy.local import LocalPolicy
from pairloop.policy.protocols import SampleRequest, TokenSequence
from pairloop.policy.scoring import LoraSettings, completion_logps, load_causal_lm
from pairloop.types import Completion, Message, PairSide, PreferencePair, SamplingParams, VersionKind

has_it = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason='needs the extra "quantized"')
noisy = pytest.mark.filterwarnings("ignore")  # bitsandbytes' own, of every kind
LORA = LoraSettings(4, 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices of whole blocks of 64 numbers, large enough that the answers differ."""
    folder = tmp_path_factory.mktemp("base")
    write_tokenizer(folder, byte_tokenizer())
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def engine(base: Path) -> Iterator[LocalPolicy]:
    section = {"model": str(base), "quantization": "nf4", "lora_rank": LORA.rank, "lora_alpha": LORA.alpha}
    local = LocalPolicy(base, PolicySection.model_validate(section))
    yield local
    local.close()


def sampled(engine: LocalPolicy, count: int) -> list[PreferencePair]:
    """Pairs as the loop records them: two answers of the engine with their log-probs."""
    pairs = []
    for i in range(count):
        prompt = engine.tokens.encode_prompt((Message("user", f"what is {i}?"),))
        chosen, rejected = engine.sample(SampleRequest(prompt, 0, 2, SamplingParams(max_tokens=8, seed=i))).result(timeout=60)
        pairs.append(
            PreferencePair(
                f"pair_{i}",
                (Message("user", f"what is {i}?"),),
                side(chosen),
                side(rejected),
                sampled_by=0,
                prompt_token_ids=prompt,
            )
        )
    return pairs


def side(completion: Completion) -> PairSide:
    return PairSide(completion.text, completion.token_ids, completion.logps)


def trained(base: Path, folder: Path, pairs: list[PreferencePair]) -> tuple[TrainJob, TrainResult]:
    data = folder / "data"
    data.mkdir()
    snapshot.write(data / "train.jsonl", pairs)
    snapshot.write(data / "heldout.jsonl", [])
    job = TrainJob.in_folder(
        folder / "run",
        base_dir=str(base),
        parent_path=None,
        parent_kind=VersionKind.BASE,
        parent_version=0,
        method="lora",
        lora_rank=LORA.rank,
        lora_alpha=LORA.alpha,
        snapshot_dir=str(data),
        device="cpu",
        quantization="nf4",
        train=TrainSection.model_validate(RECIPE),
    )
    return job, train(job)


@has_it
@noisy
def test_what_the_engine_recorded_is_what_the_trainer_sees(engine: LocalPolicy, base: Path, tmp_path: Path) -> None:
    job, result = trained(base, tmp_path, sampled(engine, 16))
    assert result.error is None
    assert result.reference["passed"] is True
    assert result.reference["max_token_delta"] < 1e-4
    assert result.reference["scored"] == 0
    # An adapter like any other, which the engine puts on its own base in 4 bits.
    weights = load_file(Path(job.out_dir) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    engine.load(version(1, VersionKind.ADAPTER, Path(job.out_dir)))
    sequence = TokenSequence((1, 2, 3), (4, 5, 6))
    served, parent = (engine.logps(number, [sequence])[0] for number in (1, 0))
    module = load_causal_lm(base, Path(job.out_dir), VersionKind.ADAPTER, quantization="nf4")
    with torch.no_grad():
        logp_NT, _ = completion_logps(module, [(1, 2, 3)], [(4, 5, 6)])
    torch.testing.assert_close(torch.tensor(served), logp_NT[0], rtol=1e-4, atol=1e-4)
    assert max(abs(a - b) for a, b in zip(served, parent, strict=True)) > 1e-2
    # Its products are in 4 bits, so it is served in turn with the base, not mixed.
    assert engine._lanes[1] is not engine._lanes[0]
    (drawn,) = engine.sample(SampleRequest((1, 2, 3), 1, 1, SamplingParams(max_tokens=6, seed=1))).result(timeout=60)
    (scored,) = engine.logps(1, [TokenSequence((1, 2, 3), drawn.token_ids)])
    assert scored == pytest.approx(drawn.logps, abs=1e-4)


@has_it
@noisy
def test_the_base_in_full_precision_is_another_policy(engine: LocalPolicy, base: Path) -> None:
    """So a trainer that forgot the 4 bits would fail the comparison above."""
    prompt, completion = (1, 2, 3), (4, 5, 6)
    with torch.no_grad():
        full, _ = completion_logps(load_causal_lm(base), [prompt], [completion])
    served = torch.tensor(engine.logps(0, [TokenSequence(prompt, completion)])[0])
    assert float((served - full[0]).abs().max()) > 1e-2


@has_it
@noisy
def test_a_merged_version_is_the_rounded_base_with_its_adapter(base: Path, tmp_path: Path) -> None:
    adapter: Any = load_causal_lm(base, trainable=True, lora=LORA, quantization="nf4")
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    adapter.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    out = tmp_path / "out"
    out.mkdir()
    merge(base, tmp_path / "adapter", out, dtype="float32", quantization="nf4")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    asked = ([(1, 2, 3)], [(4, 5, 6)])
    with torch.no_grad():
        merged, _ = completion_logps(load_causal_lm(out), *asked)
        served, _ = completion_logps(
            load_causal_lm(base, tmp_path / "adapter", VersionKind.ADAPTER, quantization="nf4"), *asked
        )
        exact, _ = completion_logps(load_causal_lm(base, tmp_path / "adapter", VersionKind.ADAPTER), *asked)
    torch.testing.assert_close(merged, served, rtol=1e-4, atol=1e-4)
    assert float((exact - served).abs().max()) > 1e-2


@has_it
@noisy
def test_an_adapter_of_another_shape_is_refused(engine: LocalPolicy, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", tokenizer=byte_tokenizer())
    adapter = load_causal_lm(other, trainable=True, lora=LORA)
    saver: Any = adapter
    saver.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ModelError, match="does not fit"):
        engine.load(version(1, VersionKind.ADAPTER, tmp_path / "adapter"))


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_bitsandbytes_the_extra_is_named(base: Path) -> None:
    with pytest.raises(ModelError, match=r"pairloop\[quantized\]"):
        load_causal_lm(base, quantization="nf4")
