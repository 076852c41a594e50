"""Evaluate: challenger against champion and base, before any traffic is spent.

Samples of each at T = 1 on recent prompts of the gate pool (which never train), so that length, entropy, KL and truncation
are known with intervals; and the held-out pairs of the round's snapshot under both. A metric that could not be computed is
an entry in ``errors`` with the reason, never a number. Left out on purpose: any judgement, which is the gate's.

The offline duel takes the place of live traffic where there is none: the configured verifier or judge compares one sample
each of champion and challenger on each held-out prompt.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from pairloop.config import Config
from pairloop.errors import EngineError, NotFoundError, PairloopError, StoreError, UserError
from pairloop.formats import snapshot
from pairloop.formats.snapshot import HELDOUT_FILE
from pairloop.judge import Outcome, PairwiseJudge, VerifierError, load_verifier, messages_of
from pairloop.policy.protocols import Policy, SampleRequest, TokenSequence
from pairloop.statistics import Z95, share
from pairloop.store import Store, groups, versions
from pairloop.types import (
    BASE_VERSION,
    Completion,
    Dataset,
    DuelPick,
    FinishReason,
    Group,
    Interval,
    PairSide,
    Pool,
    PreferencePair,
    Reason,
    SamplingParams,
    Version,
)

HELDOUT_PAIRS = 256
"""The newest held-out pairs that one report scores."""
SAMPLES_PER_PROMPT = 4
"""One would do for an estimate; the gate asks that the whole interval keeps within a limit, and a good challenger must pass."""
MAX_LABELLER_ERRORS = 0.05
"""Share of an offline duel's prompts on which the labeller may fail: an error is HOLD, never PROMOTE, for what a verifier
cannot score may be just what is bad about a version. A judge that was once out of reach out of a hundred decides nothing."""
_SCORED_TOGETHER = 32

SAMPLE_METRICS = ("length_ratio", "entropy", "entropy_ratio", "bad_share", "bad_share_increase")
KL_METRICS = ("kl_parent", "kl_base")
HELDOUT_METRICS = ("heldout_accuracy", "heldout_loss", "d_chosen", "d_rejected")


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured: metrics with 95 % intervals, errors by metric, and notes for the reader.

    ``length_ratio`` tokens per answer over the champion's · ``entropy`` nats per answer of the challenger's own samples ·
    ``entropy_ratio`` that over the base's · ``bad_share`` truncated or empty answers · ``bad_share_increase`` that above
    the champion's · ``kl_parent``, ``kl_base`` nats per answer · ``heldout_accuracy``, ``heldout_loss`` of held-out pairs
    with the champion as reference · ``d_chosen``, ``d_rejected`` log-ratio challenger to champion in nats per answer.
    """

    challenger: int
    champion: int
    prompts: int
    prompts_from: str
    samples: int
    metrics: Mapping[str, Interval]
    errors: Mapping[str, str]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data; ``from_json`` is the way back."""
        return {
            "challenger": self.challenger,
            "champion": self.champion,
            "prompts": self.prompts,
            "prompts_from": self.prompts_from,
            "samples": self.samples,
            "metrics": {name: value._asdict() for name, value in self.metrics.items()},
            "errors": dict(self.errors),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        metrics = {name: Interval(**value) for name, value in data["metrics"].items()}
        return cls(**{**data, "metrics": metrics, "notes": tuple(data["notes"])})


@dataclass(frozen=True, slots=True)
class OfflineDuel:
    """One vote per held-out prompt; prompts on which the labeller failed are counted apart and are no ties."""

    picks: tuple[DuelPick, ...]
    prompts: int
    errors: int
    labeller: str
    first_error: str | None = None

    @property
    def failure(self) -> Reason | None:
        """The gate's rule on the labeller's errors; open, which holds, above ``MAX_LABELLER_ERRORS``. None without errors."""
        if not self.errors:
            return None
        share = self.errors / self.prompts
        is_too_much = share > MAX_LABELLER_ERRORS
        text = f"{self.labeller} failed on {self.errors} of {self.prompts} prompts, {'above' if is_too_much else 'within'} "
        text += f"{MAX_LABELLER_ERRORS:.0%}" + (": an error is HOLD, never PROMOTE" if is_too_much else "")
        text += f" (the first: {self.first_error})"
        return Reason("labeller_errors", None if is_too_much else True, text, share, MAX_LABELLER_ERRORS)

    def as_json(self) -> dict[str, Any]:
        wins = sum(pick.outcome == 1 for pick in self.picks)
        losses = sum(pick.outcome == -1 for pick in self.picks)
        return {
            "labeller": self.labeller,
            "prompts": self.prompts,
            "wins": wins,
            "losses": losses,
            "ties": len(self.picks) - wins - losses,
            "errors": self.errors,
            "first_error": self.first_error,
        }


def run(
    store: Store, policy: Policy, config: Config, *, challenger: Version, champion: Version, dataset: Dataset | None
) -> Report:
    """The offline report on ``challenger``; loads what it needs, and leaves it loaded."""
    with store.reading() as c:
        base = versions.get(c, config.policy.name, BASE_VERSION)
    if base is None:
        raise NotFoundError(f"{config.policy.name} has no version 0; `pairloop serve` registers it")
    metrics: dict[str, Interval] = {}
    errors: dict[str, str] = {}
    notes: list[str] = []
    prompts, prompts_from = _prompts(store, config, limit=config.evaluate.prompts)
    n = SAMPLES_PER_PROMPT * config.evaluate.prompts if prompts else 0
    if len(prompts) < 2:
        found = "no prompts were" if not prompts else "one prompt was"
        errors |= dict.fromkeys(SAMPLE_METRICS + KL_METRICS, f"{found} recorded yet; it takes several to know a spread")
    else:
        if prompts_from is Pool.TRAIN:
            notes.append("no prompts of the gate pool were recorded: sampled on prompts of the train pool instead")
        if len(prompts) < config.evaluate.prompts:
            notes.append(f"only {len(prompts)} prompts, sampled in turn until there were {n} samples of each version")
        with _recorded(errors, SAMPLE_METRICS + KL_METRICS):
            metrics |= _sampled_metrics(policy, config, prompts, errors, challenger=challenger, champion=champion, base=base)
    if dataset is not None and dataset.n_heldout:
        folder = store.artifacts.root / dataset.path
        with _recorded(errors, HELDOUT_METRICS):
            metrics |= _heldout_metrics(policy, config, folder, challenger=challenger, champion=champion, notes=notes)
    else:
        notes.append("no held-out pairs in this round")
    return Report(challenger.number, champion.number, len(prompts), str(prompts_from), n, metrics, errors, tuple(notes))


def offline_duel(store: Store, policy: Policy, config: Config, *, challenger: Version, champion: Version) -> OfflineDuel:
    """Votes of the configured verifier or judge, one per recent prompt of the gate pool; UserError where none is configured."""
    with store.reading() as c:
        prompts = groups.recent_prompts(c, config.policy.name, pool=Pool.GATE, limit=config.gate.offline_prompts)
    old, new = (_sample(policy, config, prompts, version, role="duel") for version in (champion, challenger))
    started = datetime.now(UTC)
    picks: list[DuelPick] = []
    problems: list[str] = []
    with _labeller(config) as (name, compare):
        for i, (group, theirs, ours) in enumerate(zip(prompts, old, new, strict=True)):
            try:
                outcome = 0 if theirs.text == ours.text else compare(messages_of(group.prompt), theirs.text, ours.text)
            except _LabellerFailed as failure:
                problems.append(str(failure))
                continue
            picks.append(DuelPick(group.group_id, outcome, started + timedelta(microseconds=i)))
    return OfflineDuel(tuple(picks), len(prompts), len(problems), name, problems[0] if problems else None)


class _LabellerFailed(UserError):
    """The verifier or judge said nothing about one prompt."""


_Compare = Callable[[list[dict[str, str]], str, str], int]
"""(messages, the champion's answer, the challenger's) → +1 for the challenger, -1 for the champion, 0 for a tie."""


@contextmanager
def _labeller(config: Config) -> Iterator[tuple[str, _Compare]]:
    """The configured verifier or judge, by its name and as one function."""
    section = config.label
    if section.verifier is not None:
        verifier = load_verifier(section.verifier)

        def by_score(messages: list[dict[str, str]], theirs: str, ours: str) -> int:
            try:
                difference = verifier(messages, ours) - verifier(messages, theirs)
            except VerifierError as error:
                raise _LabellerFailed(str(error)) from error
            return (difference > 0) - (difference < 0)

        yield f"verifier {section.verifier}", by_score
        return
    with PairwiseJudge.configured(section) as judge:

        def by_judge(messages: list[dict[str, str]], theirs: str, ours: str) -> int:
            judgement = judge.compare(messages, theirs, ours)
            if judgement.outcome is Outcome.ERROR:
                raise _LabellerFailed(judgement.reason or "the judge failed")
            return {Outcome.A: -1, Outcome.B: 1}.get(judgement.outcome, 0)

        yield f"judge {section.judge_model}", by_judge


# --- samples


def _sampled_metrics(
    policy: Policy,
    config: Config,
    prompts: Sequence[Group],
    errors: dict[str, str],
    *,
    challenger: Version,
    champion: Version,
    base: Version,
) -> dict[str, Interval]:
    """Length, entropy, truncation and KL from samples of challenger, champion and base, prompt by prompt in turn."""
    asked = list(itertools.islice(itertools.cycle(prompts), SAMPLES_PER_PROMPT * config.evaluate.prompts))
    new, old, seed = (
        _sample(policy, config, asked, version, role=role)
        for version, role in ((challenger, "challenger"), (champion, "champion"), (base, "base"))
    )
    bad_new, bad_old = (_mean([float(_is_bad(answer)) for answer in answers]) for answers in (new, old))
    entropy, every = _entropy(new), len(prompts)
    metrics = {
        "entropy": entropy.interval(every),
        "bad_share": _share(bad_new),
        "bad_share_increase": _difference(bad_new, bad_old).interval(every),
        "kl_parent": _kl(policy, champion, asked, new).interval(every),
        "kl_base": _kl(policy, base, asked, new).interval(every),
    }
    with _recorded(errors, ("length_ratio",)):
        metrics["length_ratio"] = _ratio(_length(new), _length(old)).interval(every)
    with _recorded(errors, ("entropy_ratio",)):
        metrics["entropy_ratio"] = _ratio(entropy, _entropy(seed)).interval(every)
    return metrics


def _sample(policy: Policy, config: Config, asked: Sequence[Group], version: Version, *, role: str) -> list[Completion]:
    """One completion per prompt at T = 1, all queued before the first is waited for; once more where it was evicted."""
    for last_try in (False, True):
        policy.load(version)
        requests = [_request(policy, config, group, version, f"{role}/{i}") for i, group in enumerate(asked)]
        futures = [policy.sample(request) for request in requests]
        try:
            return _scored(policy, version, requests, [future.result()[0] for future in futures])
        except EngineError:
            if last_try or version.number in policy.loaded():
                raise
        finally:
            for future in futures:
                future.cancel()
    raise AssertionError("the second try returns or raises")


def _scored(policy: Policy, version: Version, requests: Sequence[SampleRequest], answers: list[Completion]) -> list[Completion]:
    """The answers with log-probs also where an engine recorded none, as its own do not agree with the trainer's."""
    bare = [i for i, answer in enumerate(answers) if not answer.logps]
    sequences = [TokenSequence(requests[i].prompt_token_ids, answers[i].token_ids) for i in bare]
    for i, logps in zip(bare, policy.logps(version.number, sequences) if bare else (), strict=True):
        answers[i] = replace(answers[i], logps=logps)
    return answers


def _request(policy: Policy, config: Config, group: Group, version: Version, key: str) -> SampleRequest:
    """Seeded by version and place, so that a report that is made again is the same report."""
    seed = int.from_bytes(hashlib.sha256(f"{version.name}/{key}".encode()).digest()[:4])
    params = SamplingParams(max_tokens=config.evaluate.max_tokens, seed=seed)
    return SampleRequest(_prompt_token_ids(policy, group), version.number, params=params)


def _prompt_token_ids(policy: Policy, group: Group | PreferencePair) -> tuple[int, ...]:
    return group.prompt_token_ids or policy.tokens.encode_prompt(group.prompt)


def _prompts(store: Store, config: Config, *, limit: int) -> tuple[list[Group], Pool]:
    """The newest distinct prompts of the gate pool; of the train pool only where the gate pool has none."""
    with store.reading() as c:
        for pool in (Pool.GATE, Pool.TRAIN):
            found = groups.recent_prompts(c, config.policy.name, pool=pool, limit=limit)
            if found:
                break
    return found, pool


def _is_bad(completion: Completion) -> bool:
    """Truncated or empty."""
    return completion.finish_reason is FinishReason.LENGTH or not completion.text.strip()


def _length(answers: Sequence[Completion]) -> _Estimate:
    return _mean([float(len(answer.token_ids)) for answer in answers])


def _entropy(answers: Sequence[Completion]) -> _Estimate:
    """Nats per answer: -log p of a policy's own samples estimates the entropy of what it may say.

    Per answer, not per token: learning a fixed greeting adds tokens without choice, and is no collapse.
    """
    return _mean([-math.fsum(answer.logps) for answer in answers])


def _kl(policy: Policy, reference: Version, asked: Sequence[Group], answers: Sequence[Completion]) -> _Estimate:
    """KL(challenger || reference) in nats per answer: the mean log-ratio of the challenger's own samples."""
    sequences = [
        TokenSequence(_prompt_token_ids(policy, group), answer.token_ids) for group, answer in zip(asked, answers, strict=True)
    ]
    sums = _summed_logps(policy, reference, sequences)
    return _mean([math.fsum(answer.logps) - theirs for answer, theirs in zip(answers, sums, strict=True)])


def _summed_logps(policy: Policy, version: Version, sequences: Sequence[TokenSequence]) -> list[float]:
    policy.load(version)
    sums: list[float] = []
    for start in range(0, len(sequences), _SCORED_TOGETHER):
        sums += map(math.fsum, policy.logps(version.number, sequences[start : start + _SCORED_TOGETHER]))
    return sums


# --- held-out pairs


def _heldout_metrics(
    policy: Policy, config: Config, folder: Path, *, challenger: Version, champion: Version, notes: list[str]
) -> dict[str, Interval]:
    """DPO loss and accuracy with the champion as reference; d+ and d- apart, for their difference hides a common shift."""
    path = folder / HELDOUT_FILE
    if not path.is_file():
        raise StoreError(f"{path}: the snapshot's held-out pairs are gone")
    pairs = list(deque(_pairs(path), maxlen=HELDOUT_PAIRS))
    sequences = [(_sequence(policy, pair, pair.chosen), _sequence(policy, pair, pair.rejected)) for pair in pairs]
    fitting = [both for both in sequences if all(_size(one) <= policy.max_context for one in both)]
    if len(fitting) < len(sequences):
        notes.append(f"{len(sequences) - len(fitting)} held-out pairs are longer than the context and were left out")
    if len(fitting) < 2:
        notes.append("fewer than two held-out pairs: not scored")
        return {}
    flat = [one for both in fitting for one in both]
    new, old = (_summed_logps(policy, version, flat) for version in (challenger, champion))
    log_ratios = [a - b for a, b in zip(new, old, strict=True)]
    chosen, rejected = log_ratios[0::2], log_ratios[1::2]
    margins = [config.train.beta * (plus - minus) for plus, minus in zip(chosen, rejected, strict=True)]
    return {
        "heldout_accuracy": _share(_mean([0.5 if margin == 0 else float(margin > 0) for margin in margins])),
        "heldout_loss": _mean([_softplus(-margin) for margin in margins]).interval(),
        "d_chosen": _mean(chosen).interval(),
        "d_rejected": _mean(rejected).interval(),
    }


def _pairs(path: Path) -> Iterator[PreferencePair]:
    """The held-out pairs; of a scored group its best and its worst answer. Demonstrations compare nothing."""
    for row in snapshot.read_rows(path):
        if isinstance(row, PreferencePair):
            yield row
        elif not row.is_demonstration:
            best, worst = (row.answers[row.rewards.index(pick(row.rewards))] for pick in (max, min))
            yield PreferencePair(row.row_id, row.prompt, best, worst, prompt_token_ids=row.prompt_token_ids)


def _sequence(policy: Policy, pair: PreferencePair, side: PairSide) -> TokenSequence:
    completion = side.token_ids or policy.tokens.encode_completion(pair.prompt, side.text)
    return TokenSequence(_prompt_token_ids(policy, pair), completion)


def _size(sequence: TokenSequence) -> int:
    return len(sequence.prompt_token_ids) + len(sequence.completion_token_ids)


def _softplus(x: float) -> float:
    """log(1 + e^x) = -log sigmoid(-x), without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# --- estimates with intervals


@dataclass(frozen=True, slots=True)
class _Estimate:
    """A value with the influence of each sample on it (delta method), so that ratios and differences stay paired by prompt."""

    value: float
    influence: tuple[float, ...]

    def interval(self, every: int | None = None) -> Interval:
        """Normal 95 % interval. Samples ``every`` places apart share a prompt: they are one observation of it, not several."""
        n = len(self.influence)
        by_prompt = [math.fsum(self.influence[i :: every or n]) for i in range(every or n)]
        spread = math.fsum(i * i for i in by_prompt) * len(by_prompt) / (len(by_prompt) - 1)
        half = Z95 * math.sqrt(spread) / n
        return Interval(self.value, self.value - half, self.value + half, n)


def _mean(values: Sequence[float]) -> _Estimate:
    mean = math.fsum(values) / len(values)
    return _Estimate(mean, tuple(value - mean for value in values))


def _ratio(a: _Estimate, b: _Estimate) -> _Estimate:
    if b.value == 0:
        raise UserError("the ratio is undefined: its denominator is 0")
    ratio = a.value / b.value
    return _Estimate(ratio, tuple((i - ratio * j) / b.value for i, j in zip(a.influence, b.influence, strict=True)))


def _difference(a: _Estimate, b: _Estimate) -> _Estimate:
    return _Estimate(a.value - b.value, tuple(i - j for i, j in zip(a.influence, b.influence, strict=True)))


def _share(mean: _Estimate) -> Interval:
    return share(mean.value, len(mean.influence))


# --- bits


@contextmanager
def _recorded(errors: dict[str, str], metrics: Sequence[str]) -> Iterator[None]:
    """A part that fails becomes the reason of its metrics: the gate holds on it, the rest of the report stands."""
    try:
        yield
    except PairloopError as error:
        errors |= dict.fromkeys(metrics, str(error))
