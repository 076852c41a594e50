"""The lab's exact checks: what they find in pairloop's objectives, and that a wrong objective does not pass them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tests.tiny_models import write_model
from torch import Tensor

from pairloop.cli import pairloop
from pairloop.errors import ModelError
from pairloop.lab import drift, equivalence, expectations, taylor
from pairloop.lab.probes import Probe, Sampled, cosine_distance, load_probe, pair_batch, sample_pairs
from pairloop.lab.worlds import all_completions, make_world, world_logps
from pairloop.objective import OBJECTIVES, Batch, Objective, ObjectiveSettings
from pairloop.policy.scoring import completion_logps, load_causal_lm

Loss = Callable[[Batch, ObjectiveSettings], Tensor]


@pytest.fixture(scope="module")
def tiny() -> Probe:
    return load_probe("tiny", seed=0)


@pytest.fixture(scope="module")
def ragged(tiny: Probe) -> Sampled:
    return sample_pairs(tiny, "ragged", seed=0)


@pytest.fixture(scope="module")
def equal(tiny: Probe) -> Sampled:
    return sample_pairs(tiny, "equal", seed=0)


def failing(rows: list[dict[str, Any]]) -> set[str]:
    return {row.get("grpo") or row.get("name") or row["step"] for row in rows if not row["holds"]}


def with_fault(name: str, loss: Loss) -> dict[str, Objective]:
    return {**OBJECTIVES, name: Objective(loss)}


def of(name: str, **changes: Any) -> Loss:
    """The objective as it is, under other settings than were asked for."""
    return lambda batch, settings: OBJECTIVES[name].loss(batch, replace(settings, **changes))


def test_pairs_are_sampled_as_they_are_named(ragged: Sampled, equal: Sampled) -> None:
    assert {len(completion) for completion in equal.completions} == {8}
    lengths = [len(completion) for completion in ragged.completions]
    assert all(a != b for a, b in zip(lengths[::2], lengths[1::2], strict=True))


def test_recorded_log_probs_are_the_models_own(tiny: Probe, ragged: Sampled) -> None:
    batch = pair_batch(tiny.model, ragged)
    assert batch.logp_BGT.dtype is torch.float64
    assert torch.allclose(batch.logp_BGT, batch.ref_logp_BGT, rtol=0, atol=1e-12)
    assert batch.reward_BG.tolist() == [[1.0, 0.0]] * 6


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_float64_models_are_scored_in_float64_and_no_other(tmp_path: Path, dtype: str) -> None:
    folder = write_model(tmp_path / "llama", gain=4.0)
    logp_NT, _ = completion_logps(load_causal_lm(folder, dtype=dtype), ((5,), (9, 8)), ((1, 2, 3), (8,)))
    assert logp_NT.dtype is (torch.float64 if dtype == "float64" else torch.float32)


def test_every_line_of_the_table_holds(tiny: Probe, ragged: Sampled, equal: Sampled) -> None:
    rows = equivalence.gradient_rows(tiny, equal, "equal") + equivalence.gradient_rows(tiny, ragged, "ragged")
    assert failing(rows) == set()
    ratio = {(row["dpo"], row["grpo"], row["lengths"]): row["ratio"] for row in rows}
    n_tokens = sum(map(len, ragged.completions))
    for lengths in ("equal", "ragged"):
        assert ratio["dpo", "grpo sum, population std", lengths] == pytest.approx(0.1, rel=1e-9)
        assert ratio["dpo", "grpo sum, sample std", lengths] == pytest.approx(0.1 * math.sqrt(2), rel=1e-9)
        assert ratio["dpo", "dr_grpo", lengths] == pytest.approx(0.2, rel=1e-9)
        assert ratio["dpo", "cdpo", lengths] == pytest.approx(1.25, rel=1e-9)
        assert ratio["dpo", "kto", lengths] == pytest.approx(4.0, rel=1e-9)
    assert ratio["dpo", "dapo", "ragged"] == pytest.approx(0.1 * n_tokens / 12, rel=1e-9)
    assert ratio["dpo", "grpo 1/|o|, population std", "equal"] == pytest.approx(0.8, rel=1e-9)


def test_length_normalisation_is_claimed_to_differ_only_where_lengths_do(tiny: Probe, ragged: Sampled, equal: Sampled) -> None:
    found = {}
    for name, sampled in (("ragged", ragged), ("equal", equal)):
        rows = equivalence.gradient_rows(tiny, sampled, "equal" if name == "equal" else "ragged")
        found[name] = next(row for row in rows if row["dpo"] == "dpo" and row["grpo"].startswith("grpo 1/|o|"))
    assert found["ragged"]["expected_ratio"] is None
    assert found["ragged"]["cosine"] < 0.99
    assert found["equal"]["cosine"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "fault", "caught"),
    [
        ("grpo", of("grpo", advantage_std="sample"), "grpo sum, population std"),
        ("grpo", of("grpo", loss_mean="sequence"), "grpo sum, population std"),
        ("grpo", of("grpo", loss_mean="sum"), "grpo 1/|o|, population std"),
        ("dpo", of("dpo", length_normalized=True), "grpo sum, population std"),
        ("dapo", OBJECTIVES["dr_grpo"].loss, "dapo"),
        ("kto", lambda batch, settings: 2 * OBJECTIVES["kto"].loss(batch, settings), "kto"),
        ("rdpo", OBJECTIVES["cdpo"].loss, "rdpo"),
    ],
    ids=["sample std", "1/|o| in the sum", "sum in 1/|o|", "dpo by length", "no token mean", "twice", "cdpo"],
)
def test_a_planted_fault_fails_its_line(tiny: Probe, ragged: Sampled, name: str, fault: Loss, caught: str) -> None:
    rows = equivalence.gradient_rows(tiny, ragged, "ragged", objectives=with_fault(name, fault))
    assert caught in failing(rows)


@pytest.mark.parametrize(
    "fault",
    [
        lambda batch, settings: (1 + 2e-9) * OBJECTIVES["rloo"].loss(batch, settings),
        lambda batch, settings: OBJECTIVES["rloo"].loss(batch, settings) + 1e-4 * OBJECTIVES["grpo"].loss(batch, settings),
    ],
    ids=["ratio", "direction"],
)
def test_the_thresholds_see_a_small_fault(tiny: Probe, ragged: Sampled, fault: Loss) -> None:
    rows = equivalence.gradient_rows(tiny, ragged, "ragged", objectives=with_fault("rloo", fault))
    assert failing(rows) == {"rloo"}


def test_a_model_in_float32_is_refused(tiny: Probe, ragged: Sampled) -> None:
    rounded = replace(ragged, logp_NT=ragged.logp_NT.float().double())
    with pytest.raises(ModelError, match="float64 throughout"):
        equivalence.gradient_rows(tiny, rounded, "ragged")


def test_cosine_distance_does_not_cancel() -> None:
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert cosine_distance(a, torch.tensor([1.0, 1e-9], dtype=torch.float64)) == pytest.approx(0.5e-18, rel=1e-6)
    assert cosine_distance(a, -a) == 2.0


def test_a_world_forgets_no_completion() -> None:
    completions = all_completions()
    assert len(completions) == len(set(completions)) == 1 + 3 + 9 + 27
    world = make_world(3)
    logp_PYT, _ = world_logps(world, world.model)
    assert logp_PYT.sum(-1).exp().sum(-1).tolist() == pytest.approx([1.0] * 3, abs=1e-12)
    assert all(0 < share < 1 for share in world.reward_PY.mean(-1).tolist())


def test_expectations_are_exact_and_a_wrong_tie_or_std_is_found() -> None:
    assert failing(expectations.exact_rows(seed=0, n_worlds=1)) == set()

    def ties_left_out(batch: Batch, settings: ObjectiveSettings) -> Tensor:
        """DPO averaged over discordant pairs alone."""
        decided_B = (batch.reward_BG[:, 0] != batch.reward_BG[:, 1]).double()
        return OBJECTIVES["dpo"].loss(replace(batch, weight_B=batch.weight_B * decided_B), settings)

    found = failing(expectations.exact_rows(seed=0, n_worlds=1, objectives=with_fault("dpo", ties_left_out)))
    # Given that the rewards differ nothing has changed; what is averaged over all pairs has.
    assert found == {
        "E[grad L_DPO], ties as 0 = -beta grad E[r]",
        "E[grad L_DPO], labels flipped at e = 0.2 = -(1 - 2e) beta grad E[r]",
    }


def test_the_printed_weights_are_those_of_the_formula() -> None:
    for p, claimed in expectations.CLAIMED_WEIGHT.items():
        exact = [expectations.group_weight(p, size) for size in expectations.GROUP_SIZES]
        assert [*exact, (p * (1 - p)) ** -0.5] == pytest.approx(claimed, abs=6e-3)
    assert expectations.group_weight(0.3, 2) == pytest.approx(1.0)
    assert [round(expectations.usable_share(0.1, size), 3) for size in (2, 8, 16)] == [0.18, 0.57, 0.815]


@pytest.mark.slow
def test_simulated_weights_agree_and_a_wrong_std_is_found() -> None:
    rows = expectations.simulated_rows(seed=0, rates=(0.3,))
    assert failing(rows) == set()
    assert len(rows) == 4 * 3 + 1
    wrong = with_fault("grpo", of("grpo", advantage_std="sample"))
    found = failing(expectations.simulated_rows(seed=0, rates=(0.3,), objectives=wrong))
    assert found == {f"c_G(p), G = {size}, p = 0.3" for size in (2, 4, 8, 16)}


def test_taylor_steps_shrink_as_derived(tiny: Probe, ragged: Sampled) -> None:
    rows = taylor.taylor_rows(tiny, ragged)
    assert failing(rows) == set()
    by_step = {row["step"]: row for row in rows}
    linear = by_step["DPO: -log sigmoid(beta h) = log 2 - (beta/2) h"]
    assert linear["measured_order"]["gradient_dropped"] == pytest.approx(1, abs=0.05)
    clip = by_step["GRPO: without clipping"]["points"]
    assert clip[0]["gradient_dropped"] == 0 < clip[-1]["gradient_dropped"]
    # The one step that cannot be made: 1/|o| is as far from a sum at the smallest drift as at the largest.
    assert min(point["gradient_dropped"] for point in by_step["GRPO: 1/|o| as one constant, 1/(mean length)"]["points"]) > 0.1


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("dpo", lambda batch, settings: 1.001 * OBJECTIVES["dpo"].loss(batch, settings)),
        ("dpo", of("dpo", label_smoothing=0.01)),
        ("grpo", of("grpo", advantage_std="sample")),
    ],
    ids=["scaled", "smoothed", "sample std"],
)
def test_taylor_steps_find_a_wrong_objective(tiny: Probe, ragged: Sampled, name: str, fault: Loss) -> None:
    assert failing(taylor.taylor_rows(tiny, ragged, objectives=with_fault(name, fault)))


def test_drift_starts_at_cosine_one_and_costs_ess() -> None:
    rows = drift.drift_rows(seed=0, n_seeds=1)
    assert [row["target_kl"] for row in rows] == list(drift.KL_GRID)
    assert rows[0]["holds"]
    assert [row["kl"] for row in rows] == pytest.approx(drift.KL_GRID, abs=2e-3)
    ess = [row["ess"] for row in rows]
    assert ess == sorted(ess, reverse=True)
    assert 0.8 < ess[2] < 0.85
    assert 0.6 < rows[1]["cosine"] < 0.999 > rows[-1]["cosine"]


def test_drift_finds_a_dpo_that_is_no_policy_gradient() -> None:
    rows = drift.drift_rows(seed=0, n_seeds=1, grid=(0.0,), objectives=with_fault("dpo", of("dpo", length_normalized=True)))
    assert not rows[0]["holds"]


@pytest.mark.slow
def test_the_verb_writes_its_document_and_plots(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        pairloop, ["lab", "equivalence", "--json", "--out", str(tmp_path / "out")], catch_exceptions=False
    )
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["holds"] is True
    assert {"rows", "expectations", "taylor", "drift"} < document.keys()
    assert {(row["model"], row["lengths"]) for row in document["rows"]} == {
        (model, lengths) for model in ("tiny", "starter") for lengths in ("equal", "ragged")
    }
    assert all({"dpo", "grpo", "lengths", "cosine", "ratio", "expected_ratio"} < row.keys() for row in document["rows"])
    assert len(document["drift"]) == drift.N_SEEDS * len(drift.KL_GRID)
    assert [Path(path).name for path in document["files"]] == ["equivalence.json", "drift.png", "taylor.png"]
    assert all(Path(path).stat().st_size > 10_000 for path in document["files"])
    assert json.loads((tmp_path / "out" / "equivalence.json").read_text())["rows"] == document["rows"]


def test_a_claim_that_fails_fails_the_whole(tiny: Probe, ragged: Sampled) -> None:
    rows = equivalence.gradient_rows(tiny, ragged, "ragged", objectives=with_fault("rdpo", OBJECTIVES["cdpo"].loss))
    claims = equivalence.claims_of({"rows": rows, "expectations": [], "taylor": [], "drift": [{"kl": 0.1}]})
    assert [claim["grpo"] for claim in claims if not claim["holds"]] == ["rdpo"]


def test_the_verb_refuses_a_folder_without_a_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(pairloop, ["lab", "equivalence", "--model", str(tmp_path), "--json"])
    assert result.exit_code == 2
    assert "config.json is missing" in json.loads(result.stdout)["error"]["message"]
