"""The offline report against the fake policy's exact rule, and the offline duel with a verifier and with a judge."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.judge_server import judge_server
from tests.loop_rig import Rig, open_rig, settings
from tests.test_deploy import add_version, version

from pairloop.config import Config
from pairloop.errors import NotFoundError
from pairloop.formats import snapshot
from pairloop.loop import evaluate, gate
from pairloop.loop.evaluate.estimates import mean, ratio
from pairloop.policy.fake import EOS, FakePolicy, quality, token_logps
from pairloop.types import Dataset, DuelPick, Interval, PairSide, PreferencePair, TrainingGroup, TrainingRow, VerdictKind


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with open_rig(settings(tmp_path, evaluate={"prompts": 400})) as opened:
        yield opened


@pytest.fixture
def brief(tmp_path: Path) -> Iterator[Rig]:
    """One whose reports take few samples, for what is no matter of their number."""
    with open_rig(settings(tmp_path, evaluate={"prompts": 40})) as opened:
        yield opened


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> evaluate.Report:
    """A challenger's report that breaks no rule."""
    with open_rig(settings(tmp_path_factory.mktemp("sound"), evaluate={"prompts": 400})) as rig:
        rig.serve(0, gate_n=50)
        return report(rig, 1)


def report(rig: Rig, skill: int, *, config: Config | None = None, dataset: Dataset | None = None) -> evaluate.Report:
    return evaluate.run(
        rig.store,
        rig.policy,
        config or rig.loop.config,
        challenger=add_version(rig, skill),
        champion=version(rig, 0),
        dataset=dataset,
    )


def tens(skill: int) -> list[float]:
    weights = [math.exp(0.25 * skill * digit) for digit in range(10)]
    return [weight / sum(weights) for weight in weights]


def holds(interval: Interval, truth: float) -> bool:
    return interval.lo <= truth <= interval.hi and interval.lo < interval.mean < interval.hi


@pytest.mark.parametrize("skill", [1, 3])
def test_entropy_and_kl_are_those_of_the_rule(rig: Rig, skill: int) -> None:
    rig.serve(0, gate_n=50)
    found = report(rig, skill)
    entropy = math.log(10) - sum(p * math.log(p) for p in tens(skill))  # two random digits
    kl = sum(p * math.log(p / q) for p, q in zip(tens(skill), tens(0), strict=True))
    assert holds(found.metrics["entropy"], entropy)
    assert holds(found.metrics["entropy_ratio"], entropy / (2 * math.log(10)))
    assert holds(found.metrics["kl_parent"], kl)
    assert found.metrics["kl_parent"] == found.metrics["kl_base"]  # the champion is the base here
    assert found.metrics["length_ratio"] == Interval(1.0, 1.0, 1.0, 1_600)
    assert found.metrics["bad_share"].mean == 0
    assert 0 < found.metrics["bad_share"].hi < 0.01  # none of 1,600 does not mean none
    assert (found.prompts, found.samples, found.prompts_from, found.errors) == (50, 1_600, "gate", {})
    assert found.notes[0] == "only 50 prompts, sampled in turn until there were 1600 samples of each version"


def test_a_report_made_again_is_the_same_report(brief: Rig) -> None:
    brief.serve(0, gate_n=50)
    challenger, champion = add_version(brief, 2), version(brief, 0)

    def once() -> evaluate.Report:
        return evaluate.run(
            brief.store, brief.policy, brief.loop.config, challenger=challenger, champion=champion, dataset=None
        )

    first = once()
    assert once() == first
    assert evaluate.Report.from_json(json.loads(json.dumps(first.as_json()))) == first


def test_truncated_answers_are_counted(rig: Rig, tmp_path: Path) -> None:
    rig.serve(0, gate_n=20)
    short = settings(tmp_path, evaluate={"prompts": 40, "max_tokens": 5})
    found = report(rig, 1, config=short)
    assert found.metrics["bad_share"].mean == 1.0
    assert found.metrics["bad_share_increase"].mean == 0.0
    assert found.errors == {"entropy_ratio": "the ratio is undefined: its denominator is 0"}  # the first five bytes are certain


def test_without_gate_prompts_the_train_pools_are_taken_and_said_so(brief: Rig) -> None:
    brief.serve(20, gate_n=0)
    found = report(brief, 1)
    assert found.prompts_from == "train"
    assert "train pool" in found.notes[0]
    assert not found.errors


def test_without_any_prompt_the_gate_holds(rig: Rig) -> None:
    found = report(rig, 1)
    assert found.metrics == {}
    assert found.errors["length_ratio"] == "no prompts were recorded yet; it takes several to know a spread"
    now = datetime.now(UTC)
    assert gate.decide(found, (), rig.loop.config.gate, opened_at=now, now=now).kind is VerdictKind.HOLD


def test_an_unregistered_policy_is_refused(rig: Rig, tmp_path: Path) -> None:
    other = settings(tmp_path, policy={"name": "unknown"})
    with pytest.raises(NotFoundError, match="no version 0"):
        report(rig, 1, config=other)


class Forgetful(FakePolicy):
    """Evicts a version once, after it was loaded and before it is sampled, as a busy server may."""

    forgets = 0

    def sample(self, request: Any) -> Any:
        if request.version and self.forgets:
            self.forgets -= 1
            self.unload(request.version)
        return super().sample(request)


def test_an_eviction_between_load_and_sample_is_survived(brief: Rig) -> None:
    brief.serve(0, gate_n=20)
    policy = Forgetful()
    challenger, champion = add_version(brief, 1), version(brief, 0)

    def once() -> evaluate.Report:
        return evaluate.run(brief.store, policy, brief.loop.config, challenger=challenger, champion=champion, dataset=None)

    policy.forgets = 1
    assert once().errors == {}
    policy.forgets = 10_000
    assert "is not loaded" in once().errors["length_ratio"]
    policy.close()


# --- held-out pairs


def a_pair(chosen: int, rejected: int, *, recorded: bool = True, prompt: str = "help") -> PreferencePair:
    def side(number: int) -> PairSide:
        text = f"answer {number}"
        return PairSide(text, (*text.encode(), EOS) if recorded else ())

    return PreferencePair(f"pair_{chosen}_{rejected}_{recorded}", prompt, side(chosen), side(rejected))


def heldout(tmp_path: Path, pairs: Sequence[TrainingRow]) -> Dataset:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    snapshot.write(folder / "heldout.jsonl", pairs)
    return Dataset("dataset_1", "bot", str(folder), 0, len(pairs), {}, {}, datetime.now(UTC))


def test_heldout_loss_accuracy_and_d_by_hand(brief: Rig, tmp_path: Path) -> None:
    brief.serve(0, gate_n=5)
    pairs = [a_pair(91, 11), a_pair(12, 52), a_pair(73, 23, recorded=False)]
    found = report(brief, 2, dataset=heldout(tmp_path, pairs)).metrics

    def d(number: int) -> float:
        ids = (*f"answer {number}".encode(), EOS)
        return sum(token_logps(ids, 2)) - sum(token_logps(ids, 0))

    h = [d(91) - d(11), d(12) - d(52), d(73) - d(23)]
    assert h[0] == pytest.approx(4.0)  # eight steps of a half
    assert found["heldout_accuracy"].mean == pytest.approx(2 / 3)
    assert 0 <= found["heldout_accuracy"].lo <= found["heldout_accuracy"].hi <= 1
    assert found["heldout_loss"].mean == pytest.approx(sum(math.log1p(math.exp(-0.1 * x)) for x in h) / 3)
    assert found["d_chosen"].mean == pytest.approx((d(91) + d(12) + d(73)) / 3)
    assert found["d_rejected"].mean == pytest.approx((d(11) + d(52) + d(23)) / 3)
    assert found["d_chosen"].n == 3


def test_held_out_groups_are_measured_by_their_best_and_worst_and_demonstrations_not(brief: Rig, tmp_path: Path) -> None:
    brief.serve(0, gate_n=5)
    texts = [PairSide(f"answer {number}") for number in (52, 91, 11)]
    rows: list[TrainingRow] = [
        a_pair(12, 52),
        TrainingGroup("group", a_pair(1, 2).prompt, tuple(texts), (0.5, 0.9, 0.1)),
        TrainingGroup("demo", a_pair(1, 2).prompt, (texts[0],)),
    ]
    pairs = [a_pair(12, 52), a_pair(91, 11, recorded=False)]
    (tmp_path / "pairs").mkdir()
    of_rows = report(brief, 2, dataset=heldout(tmp_path, rows)).metrics
    of_pairs = report(brief, 2, dataset=heldout(tmp_path / "pairs", pairs)).metrics
    assert of_rows["heldout_loss"] == of_pairs["heldout_loss"]
    assert of_rows["heldout_accuracy"].n == 2


def test_what_cannot_be_scored_is_said(brief: Rig, tmp_path: Path) -> None:
    brief.serve(0, gate_n=5)
    dataset = heldout(tmp_path, [a_pair(91, 11), a_pair(92, 12), a_pair(93, 13, prompt="x" * 5_000)])
    found = report(brief, 1, dataset=dataset)
    assert found.metrics["d_chosen"].n == 2
    assert "1 held-out pairs are longer than the context and were left out" in found.notes
    (Path(dataset.path) / "heldout.jsonl").unlink()
    gone = report(brief, 2, dataset=dataset)
    assert "are gone" in gone.errors["heldout_loss"]
    assert "length_ratio" in gone.metrics  # the rest of the report stands


# --- intervals


def test_the_ratios_interval_covers_the_truth() -> None:
    """Lengths of 20 +- 8 and 25 +- 10 tokens, paired by a common part: 95 % of the intervals hold 1.25."""
    rng = random.Random(5)
    covered = 0
    for _ in range(1_000):
        common = [rng.gauss(0, 6) for _ in range(64)]
        champion = [20 + c + rng.gauss(0, 5) for c in common]
        challenger = [25 + c + rng.gauss(0, 8) for c in common]
        interval = ratio(mean(challenger), mean(champion)).interval()
        covered += interval.lo <= 1.25 <= interval.hi
    assert 0.925 <= covered / 1_000 <= 0.975


def test_samples_of_one_prompt_are_one_observation() -> None:
    """Four samples each of 40 prompts whose means differ: 95 % of the intervals hold the mean over all prompts."""
    rng = random.Random(6)
    covered, naive = 0, 0
    for _ in range(1_000):
        prompts = [rng.gauss(10, 3) for _ in range(40)]
        estimate = mean([prompt + rng.gauss(0, 2) for _ in range(4) for prompt in prompts])
        clustered, plain = estimate.interval(40), estimate.interval()
        covered += clustered.lo <= 10 <= clustered.hi
        naive += plain.lo <= 10 <= plain.hi
    assert 0.92 <= covered / 1_000 <= 0.975
    assert naive / 1_000 < 0.85  # what it would be without


# --- the offline duel


def offline(rig: Rig, config: Config, skill: int = 2) -> evaluate.OfflineDuel:
    return evaluate.offline_duel(rig.store, rig.policy, config, challenger=add_version(rig, skill), champion=version(rig, 0))


_calls = count()


def score_two_of_three(_messages: list[dict[str, str]], completion: str) -> float:
    """A verifier that fails on every third call."""
    if next(_calls) % 3 == 2:
        raise ValueError("no opinion")
    return float(quality(completion))


def test_a_verifier_gives_one_vote_per_prompt(rig: Rig, tmp_path: Path) -> None:
    rig.serve(0, gate_n=150)
    rig.serve(30, gate_n=0)
    duel = offline(rig, settings(tmp_path, label={"verifier": "tests.loop_rig:score"}, gate={"offline": True}))
    assert duel.labeller == "verifier tests.loop_rig:score"
    assert (duel.prompts, len(duel.picks), duel.errors) == (150, 150, 0)
    assert len({pick.rater_id for pick in duel.picks}) == 150
    tally = duel.as_json()
    assert tally["wins"] > 1.5 * tally["losses"]
    assert tally["wins"] + tally["losses"] + tally["ties"] == 150


def test_a_verifiers_errors_are_no_ties(rig: Rig, tmp_path: Path) -> None:
    rig.serve(0, gate_n=60)
    duel = offline(rig, settings(tmp_path, label={"verifier": "tests.test_evaluate:score_two_of_three"}))
    assert duel.errors > 10
    assert len(duel.picks) == 60 - duel.errors
    assert duel.first_error is not None
    assert "score_two_of_three raised ValueError (test_evaluate.py:" in duel.first_error


@pytest.mark.parametrize(("errors", "passed"), [(0, True), (5, True), (6, None), (100, None)])
def test_a_labeller_that_fails_too_often_is_an_open_rule(
    sound: evaluate.Report, tmp_path: Path, errors: int, passed: bool | None
) -> None:
    now = datetime.now(UTC)
    won = tuple(DuelPick(f"prompt-{i}", 1, now) for i in range(100 - errors))
    duel = evaluate.OfflineDuel(won, 100, errors, "verifier v", "no opinion" if errors else None)
    verdict = gate.decide(
        sound,
        duel.picks,
        settings(tmp_path).gate,
        opened_at=now,
        now=now,
        more_to_come=False,
        also=duel.problems(0.5),
    )
    assert verdict.kind is (VerdictKind.PROMOTE if passed else VerdictKind.HOLD)
    if errors:
        assert f"verifier v failed on {errors} of 100 prompts" in verdict.text
        assert ("an error is HOLD, never PROMOTE" in verdict.text) == (passed is None)
        assert "no opinion" in verdict.text


def test_a_judge_decides_and_its_failures_are_counted_apart(rig: Rig, tmp_path: Path) -> None:
    rig.serve(0, gate_n=30)

    def reply(a: str, b: str) -> str | int:
        if quality(a) == quality(b):
            return "[[TIE]]"
        if quality(a) // 10 == 0 or quality(b) // 10 == 0:
            return 500
        return "[[A]]" if quality(a) > quality(b) else "[[B]]"

    with judge_server(reply) as (url, requests):
        duel = offline(rig, settings(tmp_path, label={"judge_url": url, "judge_model": "j"}))
    assert duel.labeller == "judge j"
    assert duel.errors > 0
    assert len(duel.picks) + duel.errors == 30
    assert duel.as_json()["wins"] > duel.as_json()["losses"]
    assert len(requests) >= 2 * len(duel.picks) - duel.as_json()["ties"]
