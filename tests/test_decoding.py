"""Drawing tokens from logits: temperature, nucleus, the inverse of the cumulative distribution."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from pairloop.policy.decoding import draw


def test_top_p_draws_from_the_smallest_nucleus_and_renormalises() -> None:
    probs = torch.tensor([[0.05, 0.5, 0.15, 0.3]])
    points = [i / 1_000 for i in range(1_000)]
    tokens, logps = draw(probs.log().expand(1_000, 4), points, [1.0] * 1_000, [0.6] * 1_000)
    counts = Counter(tokens.tolist())
    assert set(counts) == {1, 3}
    assert counts[1] == pytest.approx(625, abs=1)
    assert logps[tokens == 3].tolist() == pytest.approx([math.log(0.3)] * counts[3], abs=1e-6)


@pytest.mark.parametrize("size", [5, 64, 65, 1_000])
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(size: int) -> None:
    torch.manual_seed(size)
    logits_BV = torch.randn(300, size) * 6
    points = [(i + 0.5) / 298 for i in range(298)] + [0.0, 1 - 2**-53]
    tokens, logps = draw(logits_BV, points, [1.0] * 300, [1.0] * 300)
    exact_BV = logits_BV.double().log_softmax(-1)
    below_B = (exact_BV.exp().cumsum(-1) - exact_BV.exp()).gather(1, tokens[:, None])[:, 0]
    above_B = exact_BV.exp().cumsum(-1).gather(1, tokens[:, None])[:, 0]
    assert all(low - 1e-6 <= point <= high + 1e-6 for low, point, high in zip(below_B, points, above_B, strict=True))
    assert (logps - exact_BV.gather(1, tokens[:, None])[:, 0]).abs().max() < 1e-5
    # A token that the nucleus leaves out has no mass, and is drawn at neither end.
    nucleus, _ = draw(logits_BV, [1 - 2**-53] * 300, [1.0] * 300, [1e-9] * 300)
    assert torch.equal(nucleus, logits_BV.argmax(-1))


def test_rows_of_one_step_each_keep_their_own_settings() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0]]).expand(3, 3)
    tokens, _ = draw(logits, [0.0, 0.0, 0.999], [0.0, 1.0, 1.0], [1.0, 1.0, 0.2])
    assert tokens.tolist() == [2, 0, 2]


@pytest.mark.parametrize("temperature", [0.0, 1e-46, 1e-38, 1e-6, 9e-5, 1e-4])
def test_a_tiny_temperature_is_greedy_and_its_log_probs_are_raw(temperature: float) -> None:
    logits = torch.tensor([[-40.0, 10.0, 9.9, 12.0, 0.0]]).expand(3, 5)
    for beside in (1.0, temperature):
        tokens, logps = draw(logits, [0.999, 0.0, 0.999], [beside, temperature, temperature], [1.0, 1.0, 0.9])
        assert tokens.tolist()[1:] == [3, 3]
        assert logps[1:].tolist() == pytest.approx([float(logits[0].log_softmax(-1)[3])] * 2)
    plain, _ = draw(logits, [0.0, 0.5, 0.999], [1.0] * 3, [1.0] * 3)
    assert plain.tolist() != [3, 3, 3]
