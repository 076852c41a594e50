"""What holds of every objective on any batch, each with the fault that it would find."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.objective_by_hand import F64, gradient, random_batch
from torch import Tensor

from pairloop.objective import OBJECTIVES, Batch, ObjectiveSettings, Totals, effective_sample_size, totals_of
from pairloop.objective.group import centred_rewards
from pairloop.objective.preference import cdpo

Loss = Callable[[Batch, ObjectiveSettings], Tensor]

FEW = settings(max_examples=6, deadline=None, database=None, derandomize=True)
NAMES = sorted(OBJECTIVES)
READS_REWARDS_WITHIN_GROUPS = [name for name in NAMES if name not in ("kto", "sft")]
ALL_OPTIONS = ObjectiveSettings(
    beta=0.6, label_smoothing=0.15, nll_weight=0.4, token_clip=0.5, importance="sequence", kl_weight=0.1, loss_mean="tokens"
)
seeds = st.integers(0, 2**31)


@st.composite
def batches(draw: st.DrawFn, *, pairs: bool) -> Batch:
    sizes = [2] * draw(st.integers(1, 5)) if pairs else draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    drift = draw(st.sampled_from([0.0, 0.3, 2.0]))
    return random_batch(draw(seeds), sizes, tokens=draw(st.integers(1, 5)), drift=drift)


def any_batch(name: str) -> st.SearchStrategy[Batch]:
    return batches(pairs=OBJECTIVES[name].needs_pairs)


def rows_of(batch: Batch, keep: slice | Tensor) -> Batch:
    """Some of the batch's groups, with log-probs that are leaves of their own."""
    assert batch.sampler_logp_BGT is not None
    return replace(
        batch,
        logp_BGT=batch.logp_BGT.detach()[keep].requires_grad_(),
        ref_logp_BGT=batch.ref_logp_BGT[keep],
        mask_BGT=batch.mask_BGT[keep],
        reward_BG=batch.reward_BG[keep],
        weight_B=batch.weight_B[keep],
        sampler_logp_BGT=batch.sampler_logp_BGT[keep],
    )


def adds_up(loss: Loss, batch: Batch, chosen: ObjectiveSettings) -> bool:
    """Loss and gradient of the batch are the sums of those of its groups, each a micro batch."""
    parts = [rows_of(replace(batch, totals=totals_of(batch)), slice(b, b + 1)) for b in range(batch.weight_B.numel())]
    whole = loss(batch, chosen)
    losses = [loss(part, chosen) for part in parts]
    grads = [gradient(of_part, part) for of_part, part in zip(losses, parts, strict=True)]
    is_sum = torch.allclose(whole, torch.stack(losses).sum(), rtol=1e-11, atol=1e-13)
    return is_sum and torch.allclose(gradient(whole, batch), torch.cat(grads), rtol=1e-11, atol=1e-13)


def ignores_padding(loss: Loss, batch: Batch, chosen: ObjectiveSettings) -> bool:
    """Two more tokens and a more completion, and all other padding, full of garbage: same loss, same gradient, 0 on padding."""
    assert batch.sampler_logp_BGT is not None
    mask_BGT = torch.nn.functional.pad(batch.mask_BGT, (0, 2, 0, 1))

    def dirty(value_BGT: Tensor, garbage: float) -> Tensor:
        padded_BGT = torch.nn.functional.pad(value_BGT.detach(), (0, 2, 0, 1))
        return torch.where(mask_BGT, padded_BGT, torch.full_like(padded_BGT, garbage))

    for first, second in ((math.nan, 0.0), (math.inf, math.inf), (-math.inf, 5.0), (1e30, math.nan)):
        padded = replace(
            batch,
            logp_BGT=dirty(batch.logp_BGT, first).requires_grad_(),
            ref_logp_BGT=dirty(batch.ref_logp_BGT, second),
            sampler_logp_BGT=dirty(batch.sampler_logp_BGT, first),
            mask_BGT=mask_BGT,
            reward_BG=torch.nn.functional.pad(batch.reward_BG, (0, 1), value=second),
        )
        of_padded, of_batch = loss(padded, chosen), loss(batch, chosen)
        grad = gradient(of_padded, padded)
        if not torch.allclose(of_padded, of_batch, rtol=1e-12, atol=1e-14) or bool((grad[~mask_BGT] != 0).any()):
            return False
        if not torch.allclose(grad[mask_BGT], gradient(of_batch, batch)[batch.mask_BGT], rtol=1e-11, atol=1e-13):
            return False
    return True


@pytest.mark.parametrize("chosen", [ObjectiveSettings(), ALL_OPTIONS], ids=["defaults", "options"])
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up_to_the_batch(name: str, chosen: ObjectiveSettings) -> None:
    @FEW
    @given(any_batch(name))
    def check(batch: Batch) -> None:
        assert adds_up(OBJECTIVES[name].loss, batch, chosen)
        totals = totals_of(batch)
        _, whole = OBJECTIVES[name](batch, chosen)
        parts = [
            OBJECTIVES[name](rows_of(replace(batch, totals=totals), slice(b, b + 1)), chosen)[1]
            for b in range(batch.weight_B.numel())
        ]
        for key in whole.keys() - {"ess"}:
            assert whole[key].item() == pytest.approx(sum(part[key].item() for part in parts), rel=1e-11, abs=1e-13), key

    check()


@pytest.mark.parametrize("chosen", [ObjectiveSettings(), ALL_OPTIONS], ids=["defaults", "options"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_of_tokens_and_of_completions_changes_nothing(name: str, chosen: ObjectiveSettings) -> None:
    @FEW
    @given(any_batch(name))
    def check(batch: Batch) -> None:
        assert ignores_padding(OBJECTIVES[name].loss, batch, chosen)

    check()


def test_the_two_checks_above_find_planted_faults() -> None:
    def own_mean(batch: Batch, chosen: ObjectiveSettings) -> Tensor:
        return OBJECTIVES["kto"].loss(replace(batch, totals=None), chosen)

    def multiplied_mask(batch: Batch, chosen: ObjectiveSettings) -> Tensor:
        delta_BGT = (batch.logp_BGT - batch.ref_logp_BGT) * batch.mask_BGT
        return chosen.beta * (delta_BGT.sum(-1) * batch.reward_BG).sum()

    def counts_absent(batch: Batch, chosen: ObjectiveSettings) -> Tensor:
        return chosen.beta * torch.where(batch.mask_BGT, batch.logp_BGT, 0.0).sum(-1).mean()

    batch = random_batch(0, [2, 2, 3])
    assert adds_up(OBJECTIVES["kto"].loss, batch, ObjectiveSettings())
    assert not adds_up(own_mean, batch, ObjectiveSettings())
    assert not ignores_padding(multiplied_mask, batch, ObjectiveSettings())
    assert not ignores_padding(counts_absent, batch, ObjectiveSettings())


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_groups_and_of_completions_says_nothing(name: str) -> None:
    @FEW
    @given(any_batch(name), seeds)
    def check(batch: Batch, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        order_B = torch.randperm(batch.weight_B.numel(), generator=generator)
        order_G = torch.randperm(batch.reward_BG.shape[1], generator=generator)
        rows = rows_of(batch, order_B)
        assert rows.sampler_logp_BGT is not None
        moved = replace(
            rows,
            logp_BGT=rows.logp_BGT.detach()[:, order_G].requires_grad_(),
            ref_logp_BGT=rows.ref_logp_BGT[:, order_G],
            mask_BGT=rows.mask_BGT[:, order_G],
            reward_BG=rows.reward_BG[:, order_G],
            sampler_logp_BGT=rows.sampler_logp_BGT[:, order_G],
        )
        loss, one = OBJECTIVES[name](batch, ALL_OPTIONS)
        of_moved, other = OBJECTIVES[name](moved, ALL_OPTIONS)
        assert {k: v.item() for k, v in one.items()} == pytest.approx(
            {k: v.item() for k, v in other.items()}, rel=1e-10, abs=1e-12
        )
        grad = gradient(loss, batch)[order_B][:, order_G]
        torch.testing.assert_close(gradient(of_moved, moved), grad, rtol=1e-10, atol=1e-13)

    check()


@pytest.mark.parametrize("name", [name for name in NAMES if OBJECTIVES[name].needs_pairs])
def test_of_a_pairs_rewards_only_the_order_counts(name: str) -> None:
    """Rewards (-1, -2) are a pair like (1, 0), also where an absent completion stands beside them."""
    batch = random_batch(8, [2, 2, 2, 1], ties=False)
    wide = rows_of(batch, slice(0, 3))
    absent = torch.nn.functional.pad(batch.mask_BGT[:3], (0, 0, 1, 0))
    wide = replace(
        wide,
        logp_BGT=torch.nn.functional.pad(wide.logp_BGT.detach(), (0, 0, 1, 0)),
        ref_logp_BGT=torch.nn.functional.pad(wide.ref_logp_BGT, (0, 0, 1, 0)),
        sampler_logp_BGT=None,
        mask_BGT=absent,
        reward_BG=torch.nn.functional.pad(wide.reward_BG - 2, (1, 0)),
    )
    pairs = replace(rows_of(batch, slice(0, 3)), sampler_logp_BGT=None)
    expected = OBJECTIVES[name].loss(pairs, ObjectiveSettings()).item()
    assert OBJECTIVES[name].loss(wide, ObjectiveSettings()).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_weights_count_groups(name: str) -> None:
    """Weights in another unit change nothing; weight 2 is the group twice, weight 0 is the group left out."""

    @FEW
    @given(any_batch(name))
    def check(batch: Batch) -> None:
        loss = OBJECTIVES[name].loss
        expected = loss(batch, ALL_OPTIONS).item()
        assert loss(replace(batch, weight_B=7 * batch.weight_B), ALL_OPTIONS).item() == pytest.approx(
            expected, rel=1e-11, abs=1e-13
        )
        n = batch.weight_B.numel()
        repeats_B = torch.arange(n) % 3
        repeats_B[-1] = 2
        counted = replace(batch, weight_B=repeats_B.to(F64))
        repeated = rows_of(replace(batch, weight_B=torch.ones(n, dtype=F64)), torch.arange(n).repeat_interleave(repeats_B))
        assert loss(counted, ALL_OPTIONS).item() == pytest.approx(loss(repeated, ALL_OPTIONS).item(), rel=1e-11, abs=1e-13)

    check()


@pytest.mark.parametrize("name", READS_REWARDS_WITHIN_GROUPS)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1e300])
def test_equal_rewards_give_exactly_nothing(name: str, reward: float) -> None:
    """.1 three times has a mean that is not .1 in floating point; a group of one has no spread at all."""
    for std in ("population", "sample", "none"):
        batch = random_batch(1, [2, 2] if OBJECTIVES[name].needs_pairs else [3, 1, 2])
        tied = replace(batch, reward_BG=torch.full_like(batch.reward_BG, reward))
        loss, metrics = OBJECTIVES[name](tied, ObjectiveSettings(advantage_std=std, nll_weight=0.5))
        assert loss.item() == 0
        assert not bool(gradient(loss, tied).any())
        assert all(math.isfinite(value.item()) for value in metrics.values())


@pytest.mark.parametrize("name", [name for name in NAMES if OBJECTIVES[name].needs_pairs])
def test_ties_count_as_0_and_stay_in_the_denominator(name: str) -> None:
    decided = random_batch(4, [2, 2], ties=False)
    with_tie = replace(decided, reward_BG=torch.stack([decided.reward_BG[0], torch.ones(2, dtype=F64)]))
    share = (decided.weight_B[0] / decided.weight_B.sum()).item()
    alone = OBJECTIVES[name].loss(rows_of(decided, slice(0, 1)), ALL_OPTIONS).item()
    loss, metrics = OBJECTIVES[name](with_tie, ALL_OPTIONS)
    assert loss.item() == pytest.approx(share * alone, rel=1e-12)
    assert metrics["usable"].item() == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_log_ratios_stay_finite(name: str, dtype: torch.dtype) -> None:
    """+-1e4 nats of policy to reference and to sampler, on either side, as log-probs that are possible and that are not."""
    for sign in (1.0, -1.0):
        for low, high in ((-1e4, 0.0), (-2e4, -1e4), (0.0, 1e4)):
            values = torch.tensor([[[high, low], [low, high]], [[high, high], [low, low]]], dtype=dtype)
            logp_BGT, other_BGT = (values, values.flip(1)) if sign > 0 else (values.flip(1), values)
            batch = Batch(
                logp_BGT.clone().requires_grad_(),
                other_BGT,
                torch.ones(2, 2, 2, dtype=torch.bool),
                torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=dtype),
                torch.ones(2, dtype=dtype),
            )
            for chosen in (
                ObjectiveSettings(beta=10.0),
                replace(ALL_OPTIONS, token_clip=0.0),
                replace(ALL_OPTIONS, importance="none"),
            ):
                loss, metrics = OBJECTIVES[name](batch, chosen)
                assert loss.dtype == dtype
                assert bool(torch.isfinite(gradient(loss, batch)).all()), (chosen, low, high)
                assert all(math.isfinite(value.item()) for value in metrics.values()), metrics


@pytest.mark.parametrize("name", NAMES)
def test_metrics_stay_in_their_bounds(name: str) -> None:
    @FEW
    @given(any_batch(name))
    def check(batch: Batch) -> None:
        loss, metrics = OBJECTIVES[name](batch, ObjectiveSettings(beta=0.8))
        n = int(batch.present_BG.sum())
        assert 0 <= metrics["accuracy"].item() <= metrics["usable"].item() + 1e-12
        assert 0 <= metrics["clip_fraction"].item() <= 1
        assert metrics["usable"].item() <= 1 + 1e-12
        assert 1 / n - 1e-12 <= metrics["ess"].item() <= 1 + 1e-12
        assert metrics["kl"].item() >= -1e-12
        assert not any(value.requires_grad for value in metrics.values())
        if name in ("dpo", "cdpo", "ipo", "dpo_norm", "ld_dpo", "dpop", "dpo_nll", "simpo", "orpo", "sft", "kto"):
            assert loss.item() >= 0
        if name == "kto":
            assert loss.item() <= 1

    check()


@FEW
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.1, 1.0, 3.0]), min_size=2, max_size=6), st.floats(0.01, 100), st.floats(-5, 5))
def test_advantages_are_centred_and_know_no_unit(rewards: list[float], scale: float, shift: float) -> None:
    def of(values: list[float], std: str = "population") -> Tensor:
        n = len(values)
        zeros = torch.zeros(1, n, 1, dtype=F64)
        reward_BG = torch.tensor([values], dtype=F64)
        return centred_rewards(Batch(zeros, zeros, zeros == 0, reward_BG, torch.ones(1, dtype=F64)), std)[0]  # type: ignore[arg-type]

    advantage = of(rewards)
    assert advantage.sum().item() == pytest.approx(0, abs=1e-12)
    assert advantage.abs().max().item() <= math.sqrt(len(rewards) - 1) + 1e-9
    if len(set(rewards)) > 1:
        assert (advantage**2).mean().item() == pytest.approx(1, rel=1e-12)
        torch.testing.assert_close(of([scale * reward + shift for reward in rewards]), advantage, rtol=1e-9, atol=1e-9)
        n = len(rewards)
        torch.testing.assert_close(of(rewards, "sample"), advantage * math.sqrt((n - 1) / n), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(of([1e-200 * reward for reward in rewards]), advantage, rtol=1e-9, atol=1e-12)


@FEW
@given(batches(pairs=True), st.floats(0.01, 0.49))
def test_a_flip_rate_and_its_complement_are_the_same_with_sides_exchanged(batch: Batch, away: float) -> None:
    one = cdpo(batch, ObjectiveSettings(label_smoothing=0.5 - away))
    other = cdpo(replace(batch, reward_BG=1 - batch.reward_BG), ObjectiveSettings(label_smoothing=0.5 + away))
    assert one.item() == pytest.approx(other.item(), rel=1e-12)


@FEW
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=20), st.floats(-1e3, 1e3))
def test_ess_knows_no_unit_and_falls_with_spread(log_w: list[float], shift: float) -> None:
    weights = torch.tensor(log_w, dtype=F64)
    ess = effective_sample_size(weights).item()
    assert 1 / len(log_w) - 1e-12 <= ess <= 1 + 1e-12
    assert effective_sample_size(weights + shift).item() == pytest.approx(ess, rel=1e-9)
    assert effective_sample_size(2 * weights).item() <= ess + 1e-12


def test_nothing_that_counts_is_0_and_not_nan() -> None:
    batch = random_batch(7, [2, 2])
    for name in NAMES:
        loss, metrics = OBJECTIVES[name](replace(batch, weight_B=torch.zeros(2, dtype=F64)), ObjectiveSettings())
        assert loss.item() == 0
        assert not bool(gradient(loss, batch).any())
        assert all(math.isfinite(value.item()) for value in metrics.values())
    assert totals_of(replace(batch, weight_B=torch.zeros(2, dtype=F64))) == Totals(0.0, 0.0, 0.0)
