"""The claims that need no training: each passes on small numbers, and fails where a fault is planted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pairloop import __version__
from pairloop.cli import pairloop
from pairloop.config import GateSection
from pairloop.errors import UserError
from pairloop.lab.claims import CLAIMS, Claim, Outcome, Settings, duels, equivalence, gate, noise, position
from pairloop.lab.claims.results import judged, measure, read, write
from pairloop.loop.gate import decide
from pairloop.policy.scoring import load_causal_lm
from pairloop.starter import MODEL_DIR
from pairloop.statistics import share
from pairloop.types import Interval, VerdictKind

SHORT = GateSection(max_picks=600)


def changed(data: dict[str, Any], *keys: str | int, to: object) -> dict[str, Any]:
    """A copy of the data with one value exchanged."""
    copy: dict[str, Any] = json.loads(json.dumps(data))
    at: Any = copy
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = to
    return copy


# --- the duels that are simulated are the gate's


def one_by_one(won: list[bool], config: GateSection) -> int:
    """The pick after which ``decide`` promotes, asked after every single pick; 0 where it never does."""
    gate_asked = duels.GateAsked(config)
    for n in range(1, len(won) + 1):
        wins = sum(won[:n])
        kind = gate_asked.verdict(wins, n - wins)
        if kind is not VerdictKind.CONTINUE:
            return n if kind is VerdictKind.PROMOTE else 0
    return 0


@pytest.mark.parametrize("win_rate", [0.35, 0.5, 0.65])
def test_the_tables_say_what_the_gate_says_pick_by_pick(win_rate: float) -> None:
    config = GateSection(max_picks=120)
    generator = torch.Generator().manual_seed(1)
    (won_DN,) = duels.picks_of(win_rate, duels=12, picks=120, generator=generator)
    by_table = duels.promoted_at(won_DN, duels.borders(config)).tolist()
    assert by_table == [one_by_one(won, config) for won in won_DN.tolist()]
    assert any(by_table) is (win_rate > 0.5)


def test_borders_follow_the_configuration() -> None:
    table = duels.borders(GateSection(max_picks=60, min_picks=20, min_raters=10))
    assert int(table.promote_N[19]) == 20  # none of 19 picks is enough
    assert int(table.promote_N[20]) <= 20
    assert int(table.reject_N[19]) == -1
    lax = duels.borders(GateSection(max_picks=60, min_picks=20, min_raters=10, alpha=0.2))
    assert int(lax.promote_N[60]) < int(table.promote_N[60])


@pytest.mark.slow
def test_a_rejected_duel_is_not_promoted_later() -> None:
    comeback = torch.tensor([[False] * 60 + [True] * 540])
    table = duels.borders(SHORT)
    assert duels.promoted_at(comeback, table).tolist() == [0]
    unrejected = replace(table, reject_N=torch.full_like(table.reject_N, -1))
    assert duels.promoted_at(comeback, unrejected).item() > 0


def test_a_duel_needs_a_report_that_passes() -> None:
    opened_at = duels.OPENED_AT
    without = duels.PassingReport({"length_ratio": Interval(1, 1, 1, 9)})
    verdict = decide(without, [], SHORT, opened_at=opened_at, now=opened_at)
    assert verdict.kind is VerdictKind.HOLD
    assert decide(duels.PassingReport(), [], SHORT, opened_at=opened_at, now=opened_at).kind is VerdictKind.CONTINUE


# --- R10


@cache
def r10() -> dict[str, Any]:
    sizes = gate.Sizes(null_duels=2_000, duels=1_000, win_rates=(0.5, 0.6))
    return gate.simulate(1, SHORT, sizes, Settings())


@pytest.mark.slow
def test_r10_passes_and_tells_its_figures() -> None:
    outcome = gate.judge(r10())
    assert outcome.passed is True, outcome.result
    assert "of 2,000 duels" in outcome.result
    assert "| 0.60 | 0.97" in outcome.details or "| 0.60 | 0.98" in outcome.details
    null, gain = r10()["rows"]
    assert gain["promoted_by"] == sorted(gain["promoted_by"])
    assert gain["promoted_by"][-1] == gain["promoted"]
    assert null["promoted"] <= r10()["null_without_minimum"] <= 0.05 * 2_000


@pytest.mark.slow
def test_planted_fault_the_repeated_z_test_as_the_gate_fails() -> None:
    naive = r10()["z_test"]
    assert naive["promoted"] / naive["duels"] > 0.1
    assert gate.judge(changed(r10(), "rows", 0, "promoted", to=naive["promoted"])).passed is False


@pytest.mark.slow
def test_planted_fault_a_gate_without_power_fails() -> None:
    strict = gate.simulate(1, GateSection(max_picks=600, alpha=0.0001), gate.Sizes(500, 500, (0.5, 0.6)), Settings())
    assert gate.judge(strict).passed is False


def test_planted_fault_a_null_that_fools_nobody_is_no_null() -> None:
    assert gate.judge(changed(r10(), "z_test", "promoted", to=0)).passed is False


# --- R11


@cache
def r11() -> dict[str, Any]:
    return position.simulate(2, SHORT, position.Sizes(duels=500, crowds=20_000))


def test_r11_passes_and_a_fixed_side_is_caught() -> None:
    outcome = position.judge(r11())
    assert outcome.passed is True, outcome.result
    assert r11()["promoted"]["challenger_always_left"] / r11()["duels"] > 0.2
    fixed = changed(r11(), "promoted", "sides_by_coin", to=r11()["promoted"]["challenger_always_left"])
    assert position.judge(fixed).passed is False


def test_the_bias_of_few_picks_is_not_known_within_a_tenth() -> None:
    few, enough, many = r11()["estimates"]
    assert few["within"] / few["crowds"] < 0.9 < enough["within"] / enough["crowds"] < many["within"] / many["crowds"]
    assert position.judge(changed(r11(), "estimates", 1, "within", to=few["within"])).passed is False
    assert enough["rms_error"] == pytest.approx(1 / math.sqrt(1_600 * 0.55 * 0.45), rel=0.03)


def test_the_customers_show_their_bias_where_answers_are_worth_the_same() -> None:
    seen = r11()["customers"]
    alike = position.logit_of_left(seen["alike"]["left"], seen["alike"]["picks"])
    mixed = position.logit_of_left(seen["mixed"]["left"], seen["mixed"]["picks"])
    assert alike == pytest.approx(position.BIAS, abs=0.15)
    assert mixed < alike


def test_swapped_pairs_show_the_bias_whatever_the_answers_are_worth() -> None:
    def left(logit: float) -> float:
        return 1 / (1 + math.exp(-logit))

    bias, pairs = 0.4, 1e9
    for worth in (0.0, 1.0, 3.0):
        both_left = pairs * left(worth + bias) * left(-worth + bias)
        both_right = pairs * (1 - left(worth + bias)) * (1 - left(-worth + bias))
        assert position.bias_of_swapped(round(both_left), round(both_right)) == pytest.approx(bias, abs=1e-3)


# --- R9


@cache
def r9() -> dict[str, Any]:
    sizes = noise.Sizes(pairs=8, draws=1_000, blocks=3, flip_rates=(0.2, 0.5))
    return {"gradient": noise.measure_flips(3, sizes, Settings()), "coins": noise.coin_duels(3, SHORT)}


def test_r9_passes_and_drift_breaks_the_law() -> None:
    outcome = noise.judge(r9())
    assert outcome.passed is True, outcome.result
    here, there = (r9()["gradient"][at]["rows"][0] for at in ("at_reference", "drifted"))
    assert here["cosine"] > 0.999
    assert there["ratio"] < 0.6 - 0.02  # -beta (sigmoid(-beta h) - e): less than 1 - 2e of it once h > 0
    assert noise.judge(changed(r9(), "gradient", "at_reference", "rows", 0, "ratio", to=there["ratio"])).passed is False


def test_flips_of_another_rate_are_seen() -> None:
    probe = noise.Probe(noise.starter_pairs(0, 8), load_causal_lm(MODEL_DIR, dtype=torch.float64, trainable=True))
    clean = probe.gradient(probe.loss("dpo"))
    left = noise.left_of(clean, probe, 0.3, noise.Sizes(pairs=8, draws=1_000, blocks=2), torch.Generator().manual_seed(0))
    assert left["ratio"] == pytest.approx(0.4, abs=0.02)
    wrong_rate = noise.exact_errors(probe, 0.1)
    assert wrong_rate["cdpo_ratio"] == pytest.approx(0.8, abs=1e-12)
    assert wrong_rate["rdpo_ratio"] == pytest.approx(1 / 0.8, abs=1e-12)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("gradient", "drifted", "rdpo_expects_the_clean"), 1e-3),
        (("gradient", "at_reference", "cdpo_ratio"), 1.0),  # what plain DPO under another name would give
        (("coins", "promoted"), 5),
        (("coins", "promoted_by_z_test"), 0),
    ],
)
def test_planted_faults_fail_r9(keys: tuple[str, ...], value: float) -> None:
    assert noise.judge(changed(r9(), *keys, to=value)).passed is False


# --- R1 to R3


def row(cosine_distance: float, ratio: float, expected: float | None) -> dict[str, Any]:
    names = {"model": "tiny", "dpo": "dpo", "grpo": "grpo", "lengths": "ragged", "cosine": 1 - cosine_distance}
    return {**names, "cosine_distance": cosine_distance, "ratio": ratio, "expected_ratio": expected}


@pytest.mark.parametrize(
    ("rows", "passed"),
    [
        ([row(1e-15, 0.1, 0.1), row(0.05, 0.02, None)], True),
        ([row(1e-11, 0.1, 0.1)], False),
        ([row(1e-15, 0.1 + 1e-9, 0.1)], False),
        ([row(1e-15, 0.1, 0.1), row(1e-6, 0.02, None)], False),
        ([row(0.05, 0.02, None)], None),
    ],
)
def test_the_gradient_table_is_judged_by_its_own_figures(rows: list[dict[str, Any]], passed: bool | None) -> None:
    assert equivalence.judge_gradients({"rows": rows, "holds": True}).passed is passed


def test_expectations_are_judged_claim_by_claim() -> None:
    figures = {"expected": 1.0, "value": 1.0}
    rows = [
        {"claim": "R2", "name": "E[grad]", "relative_error": 1e-12, **figures},
        {"claim": "R3", "name": "c_G", "relative_error": 0.019, **figures},
    ]
    assert equivalence.judge_expectations({"expectations": rows}).passed is True
    assert equivalence.judge_weights({"expectations": rows}).passed is True
    assert equivalence.judge_expectations({"expectations": [{**rows[0], "relative_error": 0.019}]}).passed is False
    assert equivalence.judge_weights({"expectations": [{**rows[1], "relative_error": 0.021}]}).passed is False
    assert equivalence.judge_expectations({"expectations": rows[1:]}).passed is None


# --- claims, results files and the command


def test_every_row_of_the_table_is_there_once_and_in_order() -> None:
    assert list(CLAIMS) == [f"R{i}" for i in range(1, 14)]
    for claim in CLAIMS.values():
        assert claim.command.startswith("pairloop lab ")
        assert claim.run is None or claim.judge is not None


COIN = Claim(
    id="R10",
    title="a coin",
    threshold="heads",
    command="pairloop lab claim R10",
    judge=lambda data: Outcome(data["heads"] > 0, f"{data['heads']} heads"),
    run=lambda settings: {"heads": settings.seed},
)


def test_a_measurement_comes_back_from_its_file(tmp_path: Path) -> None:
    measurement = measure(COIN, Settings(seed=4))
    assert measurement.command == "pairloop lab claim R10 --seed 4"
    assert (measurement.pairloop, measurement.seed, measurement.data) == (__version__, 4, {"heads": 4})
    assert measurement.measured_at.endswith("+00:00")
    assert write(measurement, COIN, tmp_path) == tmp_path / "R10.json"
    assert read(COIN, tmp_path) == measurement
    assert [path.name for path in tmp_path.iterdir()] == ["R10.json"]
    assert read(CLAIMS["R11"], tmp_path) is None


def test_what_cannot_be_written_leaves_the_older_file(tmp_path: Path) -> None:
    write(measure(COIN, Settings(seed=4)), COIN, tmp_path)
    endless = replace(measure(COIN, Settings(seed=5)), data={"heads": math.inf})
    with pytest.raises(ValueError, match="JSON compliant"):
        write(endless, COIN, tmp_path)
    kept = read(COIN, tmp_path)
    assert kept is not None
    assert kept.seed == 4
    assert [path.name for path in tmp_path.iterdir()] == ["R10.json"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ("[1]", "no JSON object"),
        ('{"claim": "R10"}', "not a measurement of R10"),
        (
            json.dumps(
                {
                    **dict.fromkeys(("command", "pairloop", "measured_at"), ""),
                    "seed": 0,
                    "cpu_s": 0.0,
                    "claim": "R11",
                    "data": {},
                }
            ),
            "results of R11",
        ),
    ],
)
def test_a_broken_file_is_named(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "R10.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=why) as raised:
        read(COIN, tmp_path)
    assert str(tmp_path / "R10.json") in str(raised.value)


def test_data_of_another_measurement_are_named_and_not_judged(tmp_path: Path) -> None:
    path = write(replace(measure(COIN, Settings()), data={"tails": 3}), COIN, tmp_path)
    measurement = read(COIN, tmp_path)
    assert measurement is not None
    with pytest.raises(UserError, match=r"R10\.json: not what R10 measures \(KeyError: 'heads'\)"):
        judged(COIN, measurement, path)


def test_the_command_says_what_it_cannot_do() -> None:
    unknown = CliRunner().invoke(pairloop, ["lab", "claim", "R99"])
    assert unknown.exit_code == 2
    assert "no claim R99" in unknown.output
    elsewhere = CliRunner().invoke(pairloop, ["lab", "claim", "R1", "--json"])
    assert elsewhere.exit_code == 2
    assert "pairloop lab equivalence" in elsewhere.output


def test_share_is_wilsons() -> None:
    assert share(0.5, 0) == Interval(0.5, 0.0, 1.0, 0)
    low = share(0.0, 20)
    assert (low.lo, round(low.hi, 3)) == (0.0, 0.161)  # z^2 / (n + z^2)
    assert share(1.0, 20).lo == pytest.approx(1 - low.hi)
