"""Plans and promises: duels simulated with the gate's own count, by hand and by the benchmark; explanations in words."""

from __future__ import annotations

import json
import math
import re
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from tests.loop_rig import Rig, coin, open_rig
from tests.loop_rig import settings as rig_settings
from tests.test_cli import run, run_json
from tests.test_gate import GOOD, T0

from pairloop.bench import trust, trust_gate
from pairloop.config import GateSection
from pairloop.loop import cycle
from pairloop.loop.gate import Crowd, decide, plan, simulate
from pairloop.types import Cycle, DuelPick, VerdictKind


@pytest.mark.parametrize("cluster", ["pick", "rater_day", "rater"])
@pytest.mark.parametrize("robust", [0.0, 0.1])
def test_a_simulated_duel_ends_where_the_gate_ends_it(cluster: str, robust: float) -> None:
    """``decide`` itself, asked after every vote of the same crowd."""
    config = GateSection.model_validate({"cluster": cluster, "robust": robust, "max_hours": 10_000})
    crowd = Crowd(0.68, picks_per_rater=4)
    for seed in range(3):
        (end,) = simulate(crowd, config, duels=1, picks=240, seed=seed)
        votes: list[DuelPick] = []
        said = 0
        for vote in crowd.votes(Random(seed), 240):
            votes.append(vote)
            kind = decide(GOOD, votes, config, opened_at=T0, now=T0).kind
            if kind is not VerdictKind.CONTINUE:
                said = len(votes) if kind is VerdictKind.PROMOTE else 0
                break
        assert end == said


def test_crowds_are_what_they_say() -> None:
    def rate(crowd: Crowd, picks: int = 6_000) -> float:
        return sum(vote.outcome > 0 for vote in crowd.votes(Random(1), picks)) / picks

    assert rate(Crowd(0.6)) == pytest.approx(0.6, abs=0.02)
    assert rate(Crowd(0.6, flips=0.2)) == pytest.approx(0.56, abs=0.02)
    assert rate(Crowd(0.5, colluders=0.1, picks_per_rater=6)) == pytest.approx(0.55, abs=0.02)
    assert rate(Crowd(0.6, taste=0.3)) == pytest.approx(0.6, abs=0.02)
    assert rate(Crowd(0.5, side_bias=1.0)) == pytest.approx(0.5, abs=0.02)
    assert rate(Crowd(0.5, side_bias=1.0, first_share=1.0)) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.02)
    votes = list(Crowd(0.5, picks_per_rater=6).votes(Random(2), 600))
    assert len({vote.rater_id for vote in votes}) == 100
    assert len({(vote.rater_id, vote.created_at.date()) for vote in votes}) == 600
    assert all(a.created_at <= b.created_at for a, b in pairwise(votes))


def test_two_picks_of_one_rater_correlate_as_taste_says() -> None:
    votes = list(Crowd(0.5, taste=0.4, picks_per_rater=2).votes(Random(3), 8_000))
    by_rater: dict[str, list[int]] = {}
    for vote in votes:
        by_rater.setdefault(vote.rater_id, []).append(vote.outcome)
    assert sum(a * b for a, b in by_rater.values()) / len(by_rater) == pytest.approx(0.4, abs=0.05)


def test_a_plan_says_median_and_power() -> None:
    steps: list[tuple[int, int]] = []
    made = plan(
        Crowd(0.6),
        GateSection(),
        at=(100, 600),
        duels=200,
        picks=1_000,
        on_step=lambda _text, done, of: steps.append((done, of)),
    )
    assert made.median is not None
    assert made.p90 is not None
    assert 110 <= made.median <= 220  # 162 in the long run
    assert made.median < made.p90 < 600
    assert made.power[0][1].mean < made.power[1][1].mean
    assert made.power[1][1].mean == pytest.approx(0.98, abs=0.03)
    assert steps[-1] == (200, 200)


def test_the_plan_by_hand(tmp_path: Path) -> None:
    wanted = ("gate", "plan", "--win", "0.65", "--duels", "100", "--picks", "200", "--config", str(tmp_path))
    (tmp_path / "pairloop.toml").write_text("[gate]\nmax_picks = 60\n", encoding="utf-8")
    made = run_json(*wanted)
    assert made["gate"]["max_picks"] == 60
    assert made == run_json(*wanted)
    assert made != run_json(*wanted, "--seed", "1")
    assert [one["picks"] for one in made["power"]] == [50, 100, 200]
    text = run(*wanted).output
    assert f"{made['median']} picks in the median, {made['p90']} at 90 %" in text
    assert "ends undecided at gate.max_picks = 60" in text
    assert re.search(r"\n50 +\d+\.\d % +\d+\.\d % to \d+\.\d %\n", text), text  # as the pages write it
    robust = run_json(*wanted, "--robust", "0.1", "--flip", "0.1", "--cluster", "rater")
    assert robust["gate"]["robust"] == 0.1
    assert robust["power"][2]["mean"] < made["power"][2]["mean"]
    hopeless = run_json(*wanted[:3], "0.4", *wanted[4:])
    assert (hopeless["median"], hopeless["p90"]) == (None, None)


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    refused = run("gate", "plan", "--win", "0.6", "--config", str(tmp_path / "nowhere"))
    assert refused.exit_code == 2
    assert "nowhere" in refused.output
    assert run("gate", "plan", "--win", "1.6").exit_code == 2
    assert run("gate", "plan").exit_code == 2


def test_the_benchmark_measures_its_cases_and_sees_a_broken_promise() -> None:
    by_name = {case.name: case for case in trust_gate.CASES}
    cases = [by_name["robust_power_65_at_600"], by_name["fault_challenger_always_first"]]
    found = trust_gate.measure(duels=30, seed=0, cases=cases)
    assert found["robust_power_65_at_600"] > 0.9
    assert all(one["kept"] for one in found["detail"].values())
    assert len(trust_gate.rows(found)) == 2
    broken = trust_gate.Case("null_rate", Crowd(0.7), GateSection(), 300, 0.05, is_error=True)
    (row,) = trust_gate.rows(trust_gate.measure(duels=20, seed=0, cases=[broken]))
    assert row[-1] == "NO"


@pytest.mark.slow
def test_a_part_of_the_trust_benchmark_runs_alone_and_is_kept_beside_the_others(tmp_path: Path) -> None:
    (tmp_path / "trust.json").write_text('{"swap": {"swaps": 50}}')
    found = run_json("bench", "trust", "--part", "gate", "--duels", "100", "--out", str(tmp_path))
    kept = json.loads((tmp_path / "trust.json").read_text())
    assert (kept["swap"], kept["gate"]) == ({"swaps": 50}, found["gate"])
    del kept["swap"]
    lines = trust.section(kept)
    assert sum(line.startswith("| ") for line in lines) == 1 + len(trust_gate.CASES)
    assert list(found) == ["gate", "files"]
    assert found["gate"]["power_60_at_600"] > 0.9


def test_an_unknown_part_of_the_trust_benchmark_is_refused() -> None:
    refused = run("bench", "trust", "--part", "gates")
    assert refused.exit_code == 2
    assert "'gate'" in refused.output


@pytest.mark.slow
def test_every_promise_is_kept() -> None:
    found = trust_gate.measure(duels=2_000, seed=0)
    assert {name: one for name, one in found["detail"].items() if not one["kept"]} == {}


# --- explanations, and anchors, in a loop


def explain(config_dir: Path, *more: str) -> str:
    return run("gate", "explain", "--config", str(config_dir), *more).output


def test_explain_says_what_an_open_duel_lacks_now(tmp_path: Path) -> None:
    with open_rig(rig_settings(tmp_path)) as rig:
        rig.serve(60)
        cycle.run(rig.loop, trigger="test")
        cycle.run(rig.loop, trigger="a look that writes CONTINUE down")
        rig.judge(20, coin)
    (tmp_path / "pairloop.toml").write_text('[policy]\nmodel = "fake"\nname = "bot"\n', encoding="utf-8")
    told = explain(tmp_path)
    assert "CONTINUE. The challenger won" in told
    assert "Undecided: more picks are needed for duel, min_picks, min_raters." in told
    assert "of 20 raters" in told


def test_the_base_is_an_anchor_where_it_is_demanded(tmp_path: Path) -> None:
    demands = {"require": ["seed_duel", "verifier"], "max_verifier_drop": 40, "min_seed_win_rate": 0.3}
    config = rig_settings(tmp_path, gate=demands, label={"verifier": "tests.loop_rig:score", "after": "1d"})
    with open_rig(config) as rig:
        done = checked(rig)
        report = done.steps[-1].record["report"]
        assert done.state == "duelling"
        assert report["metrics"]["seed_win_rate"]["lo"] > 0.3
        assert report["metrics"]["verifier_increase"]["n"] == 32


def checked(rig: Rig) -> Cycle:
    rig.serve(200)
    return cycle.run(rig.loop, trigger="test")


def test_limits_end_a_duel_whose_demands_stay_open() -> None:
    won = [DuelPick(str(i), 1, T0 + timedelta(seconds=i)) for i in range(80)]
    demanding = GateSection(require=("sides",))
    waiting = decide(GOOD, won, demanding, opened_at=T0, now=T0)
    assert waiting.kind is VerdictKind.CONTINUE
    assert "no vote says on which side" in waiting.text
    assert decide(GOOD, won, demanding, opened_at=T0, now=T0 + timedelta(hours=25)).kind is VerdictKind.HOLD
