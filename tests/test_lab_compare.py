"""The comparison: arms spend what they say, learn, are repeatable and resumable; summaries and pairing by hand."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from pairloop.cli import pairloop
from pairloop.config import TrainSection
from pairloop.errors import UserError
from pairloop.lab import compare, summary
from pairloop.lab.arms import ARMS, STANDARD, Arm
from pairloop.lab.bases import load
from pairloop.lab.compare import RUNS_FILE, jobs_of
from pairloop.lab.run import Budget, groups_of, run
from pairloop.lab.tasks import TASKS
from pairloop.lab.tasks.base import Problem
from pairloop.lab.tasks.caesar import Caesar
from pairloop.objective import OBJECTIVES
from pairloop.policy.protocols import TokenCompletion
from pairloop.policy.rollout import sample

SMALL = Budget(rollouts=256, completions_per_step=32, learning_rate=1e-3, points=2, problems=16, final_problems=32)


class Quick(Caesar):
    """A graded task, so that few groups are tied, on a base of a few steps."""

    name = "quick"
    recipe = replace(Caesar.recipe, steps=20)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.mark.parametrize(
    ("name", "rollouts", "steps"),
    [("grpo_8", 256, 8), ("grpo_2_quarter", 64, 8), ("dpo_s4", 256, 8), ("offline", 256, 8), ("kto", 256, 8), ("dapo", 256, 8)],
)
def test_an_arm_spends_its_rollouts(cache: Path, name: str, rollouts: int, steps: int) -> None:
    found = run(ARMS[name], Quick(), 0, SMALL, cache)
    assert (found.rollouts, found.steps <= steps) == (rollouts, True)
    assert [point.rollouts for point in found.curve][::2] == [0, rollouts]
    assert 0 < found.ess <= 1 + 1e-6
    assert found.curve[0].kl_to_base == pytest.approx(0, abs=1e-4)


class Exact(Quick):
    """Any right letter is enough: of two samples often both have one, or neither."""

    name = "exact"

    def score(self, problem: Problem, answer: str) -> float:
        return float(super().score(problem, answer) > 0)


@pytest.mark.slow
def test_tied_groups_are_sampled_again_within_the_budget(cache: Path) -> None:
    plain, resampled = (run(ARMS[name], Exact(), 0, SMALL, cache) for name in ("grpo_2", "grpo_2_resampled"))
    assert 0.1 < plain.ties < 1
    assert (plain.rollouts, resampled.rollouts) == (256, 256)
    assert (plain.steps, resampled.steps < plain.steps) == (8, True)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_another(cache: Path) -> None:
    first, again, other = (run(ARMS["dpo_s4"], Quick(), seed, SMALL, cache) for seed in (0, 0, 1))
    assert first.curve == again.curve
    assert first.curve[1:] != other.curve[1:]


def test_the_first_step_of_online_dpo_has_full_effective_sample_size_and_stale_steps_have_less(cache: Path) -> None:
    budget = replace(SMALL, learning_rate=3e-3)
    online, stale = (run(ARMS[name], Quick(), 0, budget, cache).ess for name in ("dpo_s1", "offline"))
    assert online == pytest.approx(1, abs=1e-3)
    assert stale < 0.97


@pytest.mark.slow
def test_an_arms_rate_is_a_share_of_the_comparisons(cache: Path) -> None:
    whole, half = Arm("whole", rounds=1), Arm("half", rounds=1, rate=0.5)
    slower, same, faster = (
        run(arm, Quick(), 0, replace(SMALL, learning_rate=rate), cache).curve
        for arm, rate in ((half, 1e-3), (whole, 5e-4), (whole, 1e-3))
    )
    assert slower == same
    assert slower[-1] != faster[-1]


def test_a_round_ends_where_the_products_controller_says(cache: Path) -> None:
    free = Arm("free", rounds=2, heldout_share=0.25, train={"warmup_steps": 0, "epochs": 3, "heldout_every": 1})
    strict = replace(free, train={**free.train, "stop_ess": 0.9999})
    budget = replace(SMALL, learning_rate=3e-4)
    whole, cut = (run(arm, Quick(), 0, budget, cache) for arm in (free, strict))
    assert (whole.stops, whole.steps) == (("completed", "completed"), 2 * 3 * 4)
    assert cut.stops == ("ess", "ess")
    assert cut.steps < whole.steps
    assert (whole.rollouts, cut.rollouts, cut.curve[-1].rollouts) == (256, 256, 256)


def test_a_round_takes_the_best_weights_its_controller_kept(cache: Path) -> None:
    """At an absurd rate the held-out loss rises from the first look on: the round ends early and takes its first weights."""
    only_heldout = {"min_length_ratio": 0.0, "max_length_ratio": 0.0, "min_entropy_ratio": 0.0, "heldout_every": 1}
    arm = Arm("wild", rounds=1, heldout_share=0.9, train={"warmup_steps": 0, "epochs": 4, **only_heldout})
    found = run(arm, Quick(), 0, replace(SMALL, learning_rate=0.3), cache)
    assert found.stops == ("heldout_loss",)
    assert found.steps < 4 * 4


def test_samples_are_the_policys_own(cache: Path) -> None:
    """Recorded log-probs are those of the scorer, EOS included; the same random numbers give the same samples."""
    from pairloop.learner.data import TokenGroup
    from pairloop.learner.scores import score

    task = Quick()
    model = load(task, cache)
    prompts = [task.tokens.encode_prompt(task.problem(random.Random(i)).prompt) for i in range(5)]

    def sampled(seed: int) -> list[list[TokenCompletion]]:
        rng = random.Random(seed)
        return sample(model, prompts, group_size=3, max_tokens=7, eos=task.tokens.eos_id, rng=rng)

    groups = sampled(1)
    assert groups == sampled(1)
    assert groups != sampled(2)
    as_groups = [
        TokenGroup(str(i), tuple(p), tuple(g), (0.0,) * 3) for i, (p, g) in enumerate(zip(prompts, groups, strict=True))
    ]
    for group, logps in zip(groups, score(model, as_groups), strict=True):
        for completion, logp_T in zip(group, logps, strict=True):
            assert completion.logps == pytest.approx(logp_T.tolist(), abs=1e-4)
            assert task.tokens.eos_id not in completion.token_ids[:-1]


def completions(n: int) -> list[TokenCompletion]:
    return [TokenCompletion((i,), (-1.0,)) for i in range(n)]


def test_groups_of_pairs_are_best_against_worst() -> None:
    pairs = groups_of(Arm("a"), "g", [1], completions(4), [0.2, 0.9, 0.5, 0.5])
    assert [[c.token_ids[0] for c in pair.completions] for pair in pairs] == [[1, 0]]
    two = groups_of(Arm("a"), "g", [1], completions(4), [0.2, 0.9, 0.4, 0.5])
    assert [[c.token_ids[0] for c in pair.completions] for pair in two] == [[1, 0], [3, 2]]
    assert groups_of(Arm("a"), "g", [1], completions(2), [1.0, 1.0]) == []


def test_filtered_imitation_keeps_the_best_that_are_worth_something() -> None:
    arm = ARMS["sft"]
    (kept,) = groups_of(arm, "g", [1], completions(3), [1.0, 0.0, 1.0])
    assert [c.token_ids[0] for c in kept.completions] == [0, 2]
    assert groups_of(arm, "g", [1], completions(3), [0.0, 0.0, 0.0]) == []


@pytest.mark.slow
def test_a_comparison_resumes_and_cuts_off_a_half_written_line(tmp_path: Path) -> None:
    jobs = jobs_of([ARMS["sft"], ARMS["dpo_s1"]], ["sort"], [0], replace(SMALL, rollouts=64))
    rows = compare.compare(jobs[:1], tmp_path, tmp_path / "bases")
    with (tmp_path / RUNS_FILE).open("a") as file:
        file.write('{"key": "half')
    seen: list[str] = []
    both = compare.compare(jobs, tmp_path, tmp_path / "bases", report=lambda _d, _t, row: seen.append(row["arm"]))
    assert seen == ["dpo_s1"]
    assert both[0] == json.loads(json.dumps(rows[0]))
    assert len(compare.read(tmp_path / RUNS_FILE)) == 2
    other = replace(jobs[0], arm=replace(ARMS["sft"], train={"beta": 0.7}))
    assert other.key != jobs[0].key


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    (tmp_path / RUNS_FILE).write_text('{"score": 1}\n')
    with pytest.raises(UserError, match=r"runs\.jsonl: line 1"):
        compare.read(tmp_path / RUNS_FILE)


def row(arm: str, seed: int, scores: list[float]) -> dict[str, object]:
    point = {"entropy": 1.0, "kl_to_base": 0.5, "length": 7.0}
    curve = [{"rollouts": 100 * i, "score": score, **point} for i, score in enumerate(scores)]
    phases = {"train": 2.0, "sample": 1.0}
    common = {"task": "sort", "greedy": 1.0, "rollouts": 200, "ess": 0.9, "cpu_s": phases, "wall_s": phases}
    return {"arm": arm, "seed": seed, "score": scores[-1], "curve": curve, **common}


def test_the_summary_by_hand() -> None:
    rows = [row("grpo_8", 0, [0.3, 0.6, 0.8]), row("grpo_8", 1, [0.3, 0.6, 0.9]), row("sft", 0, [0.3, 0.35, 0.4])]
    grpo, sft = summary.summarise(rows)["arms"]
    assert grpo["score"]["mean"] == pytest.approx(0.85)
    # Student's t with one degree of freedom: 12.706 * stdev / sqrt(2) = 12.706 * .05
    assert grpo["score"]["ci95"] == pytest.approx([0.85 - 0.6353, 0.85 + 0.6353])
    # 95 % of the gain is .8225, between .6 at 100 and .85 at 200
    assert grpo["rollouts_to_95"] == pytest.approx(100 + 100 * 0.2225 / 0.25)
    assert (sft["score"]["ci95"], sft["rollouts_to_95"]) == (None, None)
    assert sft["share_of_grpo_gain"] == pytest.approx(0.1 / 0.55)
    assert (sft["cpu_s"], sft["phases"]["cpu_s"]) == (pytest.approx(3.0), {"train": 2.0, "sample": 1.0})


def test_every_objective_has_an_arm_and_every_arm_legal_settings() -> None:
    assert set(OBJECTIVES) <= set(ARMS)
    assert [arm.name for arm in STANDARD][:2] == ["offline", "dpo_s1"]
    for arm in ARMS.values():
        assert TrainSection.model_validate({**arm.train, "objective": arm.objective}).objective == arm.objective


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--arms", "grpo_9"], "--arms: unknown grpo_9; there are offline"),
        (["--tasks", "chess"], "--tasks: unknown chess; there are sort"),
        (["--seeds", "a-b"], "--seeds a-b"),
        (["--seeds", "3-1"], "names no seed"),
        (["--rollouts", "64", "--step", "128"], "no optimizer step"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    found = CliRunner().invoke(pairloop, ["lab", "compare", "--out", str(tmp_path / "out"), *arguments])
    assert (found.exit_code, complaint in found.output) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_verb_prints_one_document(tmp_path: Path) -> None:
    small = ["--arms", "grpo_2,sft", "--tasks", "sort", "--seeds", "0", "--rollouts", "64", "--step", "32", "--workers", "1"]
    found = CliRunner().invoke(pairloop, ["lab", "compare", *small, "--out", str(tmp_path), "--json"])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert [(entry["arm"], entry["task"], entry["rollouts"]) for entry in document["arms"]] == [
        ("grpo_2", "sort", 64),
        ("sft", "sort", 64),
    ]
    assert Path(document["files"][0]).stat().st_size > 5_000
    assert TASKS["sort"].name == "sort"
