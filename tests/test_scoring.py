"""Log-probs of given completions, and the loading of base, full and LoRA versions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import FAMILIES, write_adapter, write_model

from pairloop.errors import ModelError
from pairloop.policy.scoring import LoraSettings, completion_logps, load_causal_lm
from pairloop.types import VersionKind

DATA = Path(os.environ.get("PAIRLOOP_TEST_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data")
RWKV = DATA / "models" / "tiny-rwkv-4v0-660K"
PROMPTS = ((5,), (9, 8, 7, 6, 5, 4), (3, 2, 1))
COMPLETIONS = ((1, 2, 3, 4), (8,), (7, 7, 0))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), gain=4.0)


def backward(loss: Any) -> None:
    loss.backward()


def one_by_one(model: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> list[float]:
    """By the definition: a forward pass without padding, float64 softmax, one look-up per token."""
    ids = [*prompt, *completion]
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [float(logp[len(prompt) - 1 + t, token]) for t, token in enumerate(completion)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_batch_equals_one_by_one(tmp_path: Path, family: str) -> None:
    model = load_causal_lm(write_model(tmp_path / family, family=family, gain=4.0))
    logp_NT, mask_NT = completion_logps(model, PROMPTS, COMPLETIONS)
    assert logp_NT.dtype is torch.float32
    assert mask_NT.tolist() == [[t < len(c) for t in range(4)] for c in COMPLETIONS]
    assert logp_NT[~mask_NT].eq(0).all()
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        assert logp_NT[i, : len(completion)].tolist() == pytest.approx(one_by_one(model, prompt, completion), abs=1e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mamba"])
def test_a_ragged_batch_equals_one_by_one_in_float64(tmp_path: Path, family: str) -> None:
    """Without Mamba, which rounds its logits to float32 whatever its weights are."""
    model = load_causal_lm(write_model(tmp_path / family, family=family, gain=4.0)).double()
    logp_NT, _ = completion_logps(model, PROMPTS, COMPLETIONS)
    assert logp_NT.dtype is torch.float64
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        expected = one_by_one(model, prompt, completion)
        assert logp_NT[i, : len(completion)].tolist() == pytest.approx(expected, rel=0, abs=1e-9)
        assert logp_NT[i].sum().item() == pytest.approx(sum(expected), rel=0, abs=1e-9)


def gradient_of_the_first(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids that the model read, and the gradient at their embeddings of the first completion's log-probs."""
    model = load_causal_lm(folder, trainable=True)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append((args[0], output))

    embedding.register_forward_hook(keep)
    logp_NT, _ = completion_logps(model, PROMPTS, COMPLETIONS)
    backward(logp_NT[0].sum())
    ((ids, output),) = seen
    assert output.grad is not None
    return ids, output.grad


def test_strangers_in_the_row_get_no_gradient(llama: Path) -> None:
    """Only the first sequence's tokens before its last have a say in its log-probs; nothing is padded."""
    ids, gradient = gradient_of_the_first(llama)
    assert ids.tolist() == [[5, 3, 2, 1, 9, 8, 7, 6, 5, 4, 7, 7, 1, 2, 3]]
    assert [t for t in range(15) if gradient[0, t].ne(0).any()] == [0, 12, 13, 14]


def test_prompt_and_padding_get_no_gradient(tmp_path: Path) -> None:
    """The same of a model that takes no packed rows."""
    _, gradient = gradient_of_the_first(write_model(tmp_path / "bloom", family="bloom", gain=4.0))
    assert gradient[0, :4].abs().sum() > 0
    assert gradient[0, 4:].eq(0).all()
    assert gradient[1:].eq(0).all()


def test_gradients_are_those_of_one_sequence_at_a_time(llama: Path) -> None:
    batched, single = load_causal_lm(llama, trainable=True), load_causal_lm(llama, trainable=True)
    backward(completion_logps(batched, PROMPTS, COMPLETIONS)[0].sum())
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = single(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        backward(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())
    for (name, one), other in zip(batched.named_parameters(), single.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert other.grad.abs().max() > 0, name
        assert (one.grad - other.grad).abs().max() < 1e-4 * other.grad.abs().max() + 1e-6, name


def test_the_head_runs_on_completion_positions_only_and_the_hook_is_gone(llama: Path) -> None:
    model = load_causal_lm(llama)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    sizes: list[torch.Size] = []
    hook = head.register_forward_hook(lambda _, __, output: sizes.append(output.shape))
    completion_logps(model, PROMPTS, COMPLETIONS)
    model(input_ids=torch.tensor([[1, 2, 3]]))
    hook.remove()
    assert sizes == [torch.Size((1, 8, 257)), torch.Size((1, 3, 257))]


def test_an_empty_prompt_is_refused_and_an_empty_completion_is_not(llama: Path) -> None:
    model = load_causal_lm(llama)
    with pytest.raises(ValueError, match="at least one token"):
        completion_logps(model, [(), (1,)], [(1,), (2,)])
    logp_NT, mask_NT = completion_logps(model, [(1,), (1, 2)], [(), (3,)])
    assert mask_NT.tolist() == [[False], [True]]
    assert logp_NT[1].tolist() == pytest.approx(one_by_one(model, (1, 2), (3,)), abs=1e-5)


def test_an_adapter_changes_the_model_and_goes_on_from_its_own_weights(llama: Path, tmp_path: Path) -> None:
    lora = LoraSettings(rank=4, alpha=8)
    path = write_adapter(tmp_path / "a", llama, seed=1)
    base, _ = completion_logps(load_causal_lm(llama), PROMPTS, COMPLETIONS)
    adapted, _ = completion_logps(load_causal_lm(llama, path, VersionKind.ADAPTER), PROMPTS, COMPLETIONS)
    assert (adapted - base).abs().max() > 0.01
    going_on = load_causal_lm(llama, path, VersionKind.ADAPTER, trainable=True, lora=lora)
    logp, _ = completion_logps(going_on, PROMPTS, COMPLETIONS)
    assert torch.equal(logp, adapted)
    backward(logp.sum())
    trained = {name for name, p in going_on.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert all(p.grad is not None for p in going_on.parameters() if p.requires_grad)


def test_an_adapter_fits_a_base_that_was_moved(llama: Path, tmp_path: Path) -> None:
    """PEFT writes the base's path into the adapter's configuration; nobody goes there."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(llama, old)
    path = write_adapter(tmp_path / "a", old, seed=1)
    before, _ = completion_logps(load_causal_lm(old, path, VersionKind.ADAPTER), PROMPTS, COMPLETIONS)
    assert str(old) in (path / "adapter_config.json").read_text()
    old.rename(new)
    lora = LoraSettings(rank=4, alpha=8)
    for trainable in (False, True):
        moved = load_causal_lm(new, path, VersionKind.ADAPTER, trainable=trainable, lora=lora)
        assert torch.equal(completion_logps(moved, PROMPTS, COMPLETIONS)[0], before)


def test_a_fresh_adapter_changes_nothing_before_its_first_step(llama: Path) -> None:
    base, _ = completion_logps(load_causal_lm(llama), PROMPTS, COMPLETIONS)
    fresh = load_causal_lm(llama, trainable=True, lora=LoraSettings(rank=4, alpha=8))
    assert torch.equal(completion_logps(fresh, PROMPTS, COMPLETIONS)[0], base)
    assert not fresh.training
    assert any(p.requires_grad for p in fresh.parameters())
    assert not any(p.requires_grad for p in load_causal_lm(llama).parameters())
    assert all(p.requires_grad for p in load_causal_lm(llama, trainable=True).parameters())


def test_a_full_version_has_its_own_weights(llama: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "v1", seed=5, gain=4.0)
    logp, _ = completion_logps(load_causal_lm(llama, other, VersionKind.FULL), PROMPTS, COMPLETIONS)
    assert torch.equal(logp, completion_logps(load_causal_lm(other), PROMPTS, COMPLETIONS)[0])
    with pytest.raises(ModelError, match="needs its folder"):
        load_causal_lm(llama, None, VersionKind.FULL)


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        (LoraSettings(rank=8, alpha=8), "r = 4, the policy's configuration says 8"),
        (LoraSettings(rank=4, alpha=16), "lora_alpha = 8, the policy's configuration says 16"),
        (LoraSettings(rank=4, alpha=8, targets=("q_proj",)), r"configuration says \['q_proj'\]"),
    ],
)
def test_an_adapter_of_another_chain_is_refused(llama: Path, tmp_path: Path, lora: LoraSettings, reason: str) -> None:
    path = write_adapter(tmp_path / "a", llama, seed=1)
    with pytest.raises(ModelError, match=reason):
        load_causal_lm(llama, path, VersionKind.ADAPTER, trainable=True, lora=lora)


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"missing keys: model\.layers\.2"):
        load_causal_lm(folder)
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(ModelError, match=r"cannot be loaded|do not fit"):
        load_causal_lm(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load_causal_lm(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000])
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load_causal_lm(folder)


@pytest.mark.skipif(not RWKV.is_dir(), reason="the shared model is not here")
def test_the_shared_recurrent_model_scores_and_trains() -> None:
    model = load_causal_lm(RWKV, trainable=True)
    logp_NT, _ = completion_logps(model, PROMPTS, COMPLETIONS)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        assert logp_NT[i, : len(completion)].tolist() == pytest.approx(one_by_one(model, prompt, completion), abs=1e-4)
    backward(logp_NT.sum())
    assert all(parameter.grad is not None for parameter in model.parameters())
