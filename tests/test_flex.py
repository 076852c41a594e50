"""FlexAttention over packed rows: the mask on any machine, forward only; gradients where there is CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from tests.learner_rig import job_maker, text_pairs
from tests.packing_rig import some_rows, tiny, value_and_gradient, worst
from tests.test_packing import groups_of_ids, rows_of
from tests.tiny_models import write_model
from torch import Tensor, nn

from pairloop.learner import train
from pairloop.policy import flex
from pairloop.policy.packed import FLEX, attend_blocks, use_flex
from pairloop.policy.packing import Ids, Packing, Segment, pack
from pairloop.policy.scoring import completion_logps, load_causal_lm

# On the CPU it says that it is not compiled there.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


def by_flex_and_by_blocks(packing: Packing) -> float:
    """The largest difference over a row of random queries, keys and values."""
    torch.manual_seed(0)
    n = len(packing.ids_T)
    query, key, value = (torch.randn(n, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    with torch.no_grad():
        expected = attend_blocks(packing, query, key, value, scale=0.3)
        found = flex.attend_row(query, key, value, mask=flex.row_mask(packing), scale=0.3)
    return float((found - expected).abs().max())


@settings(max_examples=15, deadline=None)
@given(groups_of_ids)
def test_random_rows_attend_as_their_blocks_do(groups: Sequence[tuple[bool, Ids, Sequence[Ids]]]) -> None:
    prompts, completions = rows_of(groups)
    assert by_flex_and_by_blocks(pack(prompts, completions, torch.device("cpu"))) < 1e-10


@pytest.mark.parametrize("fault", ["siblings meet", "strangers meet"])
def test_a_wrong_interval_is_caught(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    right = flex._intervals

    def wrong(segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
        first, last = right(segments)
        if fault == "siblings meet":
            return first, [len(segments)] * len(last)
        return [0] * len(first), last

    packing = pack(*some_rows(), torch.device("cpu"))
    assert by_flex_and_by_blocks(packing) < 1e-10
    monkeypatch.setattr(flex, "_intervals", wrong)
    assert by_flex_and_by_blocks(packing) > 1e-3


def test_a_model_that_was_switched_says_the_same() -> None:
    model, switched = tiny(dtype=torch.float32), tiny(dtype=torch.float32)
    use_flex(switched)
    assert switched.config._attn_implementation == FLEX
    with torch.no_grad():
        expected, found = (completion_logps(of, *some_rows())[0] for of in (model, switched))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_training_by_it_needs_cuda(tmp_path: Path) -> None:
    make_job = job_maker(tmp_path, write_model(tmp_path / "base", gain=3.0))
    result = train(make_job(text_pairs(12), device="cpu", recipe={"attention": "flex"}))
    assert result.error is not None
    assert result.error.kind == "user_error"
    assert 'set it to "sdpa"' in result.error.message


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_blocks(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_model(tmp_path / "m", hidden=64, gain=4.0)
    prompts, completions = some_rows()

    def found(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        def logps() -> Tensor:
            logp_NT, mask_NT = completion_logps(model, prompts, completions)
            return logp_NT[mask_NT]

        return value_and_gradient(model, logps)

    blocks, switched = (load_causal_lm(folder, dtype=dtype, device="cuda", trainable=True) for _ in range(2))
    use_flex(switched)
    assert worst(found(switched), found(blocks)) < (1e-3 if dtype is torch.float32 else 5e-2)
