"""Laid-out linear layers: the same answers, no second copy of the weights, and the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny_models import version, write_adapter, write_model
from torch import nn

from pairloop.config import PolicySection
from pairloop.policy import linear
from pairloop.policy.linear import laid_out, lay_out
from pairloop.policy.local import LocalPolicy
from pairloop.policy.protocols import SampleRequest
from pairloop.policy.scoring import completion_logps, load_causal_lm
from pairloop.types import SamplingParams, VersionKind

pytestmark = pytest.mark.skipif(
    not linear._candidates(nn.Linear(256, 256)), reason="needs a PyTorch with oneDNN on an x86 processor"
)


class Tied(nn.Module):
    """An embedding, a layer with a bias, a layer that is too small, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(300, 256)
        self.inner = nn.Linear(256, 256)
        self.small = nn.Linear(256, 2)
        self.head = nn.Linear(256, 300, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(self.embedding(ids))
        answer: torch.Tensor = self.head(hidden) + self.small(hidden).sum(-1, keepdim=True)
        return answer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (1, 70)])
@torch.no_grad()
def test_answers_stay_and_only_what_is_tied_is_there_twice(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    model, ids = Tied().to(dtype), torch.arange(shape[0] * shape[1]).reshape(shape)
    before = model(ids)
    lay_out(model)
    assert model.inner.weight.is_mkldnn
    assert not model.small.weight.is_mkldnn
    assert model.head.weight is model.embedding.weight
    assert not model.head.weight.is_mkldnn
    assert (model(ids) - before).abs().max() <= tolerance
    assert model.inner.weight.shape == (256, 256)
    lay_out(model)
    assert (model(ids) - before).abs().max() <= tolerance


def test_while_open_answers_are_of_the_weights_at_its_opening_and_then_of_the_weights() -> None:
    model, ids = Tied(), torch.arange(5)[None]
    with torch.no_grad():
        before = model(ids)
        with laid_out(model):
            model.inner.weight.mul_(2.0)
            assert (model(ids) - before).abs().max() < 1e-4
        assert (model(ids) - before).abs().max() > 0.1
    torch.autograd.backward(model(ids).sum())
    assert model.inner.weight.grad is not None


def test_what_raises_while_open_leaves_the_model_as_it_was() -> None:
    model = Tied()
    with pytest.raises(KeyError), laid_out(model):
        raise KeyError
    assert "forward" not in model.inner.__dict__


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_adapters_stand_on_a_laid_out_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, tolerance: float
) -> None:
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 1)
    base = write_model(tmp_path / "base", gain=4.0)
    adapters = {n: write_adapter(tmp_path / f"v{n}", base, seed=n) for n in (1, 2)}
    section = {"model": str(base), "lora_rank": 4, "lora_alpha": 8, "dtype": dtype}
    policy = LocalPolicy(base, PolicySection.model_validate(section))
    try:
        for n, path in adapters.items():
            policy.load(version(n, VersionKind.ADAPTER, path))
        policy.unload(1)
        for n in (0, 2):
            kind = VersionKind.ADAPTER if n else VersionKind.BASE
            alone = load_causal_lm(base, adapters.get(n), kind)
            drawn = policy.sample(SampleRequest((5, 6, 7), n, 3, SamplingParams(max_tokens=12, seed=4))).result(timeout=60)
            logp_NT, mask_NT = completion_logps(alone, [(5, 6, 7)] * 3, [c.token_ids for c in drawn])
            recorded = torch.tensor([logp for c in drawn for logp in c.logps])
            assert (logp_NT[mask_NT] - recorded).abs().max() < tolerance
    finally:
        policy.close()
