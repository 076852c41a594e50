"""Evaluate: challenger against champion and base, before any traffic is spent.

Samples of each at T = 1 on recent prompts of the gate pool (which never train), so that length, entropy, KL and truncation
are known with intervals (some are kept, to be read); and the held-out pairs of the round's snapshot under both. A metric that
could not be computed is an entry in ``errors`` with the reason, never a number. Left out on purpose: any judgement, which is
the gate's.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pairloop.config import Config
from pairloop.errors import NotFoundError, PairloopError, StoreError
from pairloop.formats import snapshot
from pairloop.formats.snapshot import HELDOUT_FILE
from pairloop.loop.evaluate import anchors, suite
from pairloop.loop.evaluate import kept as samples_kept
from pairloop.loop.evaluate.estimates import Estimate, difference, mean, ratio, shared
from pairloop.loop.evaluate.sampling import prompt_token_ids, sample
from pairloop.policy.protocols import Policy, TokenSequence
from pairloop.store import Store, groups, versions
from pairloop.store.samples import Sample
from pairloop.types import (
    BASE_VERSION,
    Completion,
    Dataset,
    FinishReason,
    Group,
    Interval,
    PairSide,
    Pool,
    PreferencePair,
    Version,
)

HELDOUT_PAIRS = 256
"""The newest held-out pairs that one report scores."""
SAMPLES_PER_PROMPT = 4
"""One would do for an estimate; the gate asks that the whole interval keeps within a limit, and a good challenger must pass."""
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
    with the champion as reference · ``d_chosen``, ``d_rejected`` log-ratio challenger to champion in nats per answer ·
    ``verifier_increase`` the verifier's mean score above the champion's · ``seed_win_rate`` share of prompts on which the
    verifier or judge prefers the challenger's answer to the base's, ties half · ``suite_lost`` cases that the champion
    passes and the challenger fails.
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
    kept: list[Sample] = []
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
            metrics |= _sampled_metrics(
                policy, config, prompts, errors, kept, challenger=challenger, champion=champion, base=base
            )
    if (problem := samples_kept.keep(store, challenger, kept)) is not None:
        notes.append(problem)
    if dataset is not None and dataset.n_heldout:
        folder = store.artifacts.hold(dataset.path)
        with _recorded(errors, HELDOUT_METRICS):
            metrics |= _heldout_metrics(policy, config, folder, challenger=challenger, champion=champion, notes=notes)
    else:
        notes.append("no held-out pairs in this round")
    if config.evaluate.suite is not None:
        with _recorded(errors, (suite.METRIC,)):
            lost, names = suite.measure(policy, config, challenger=challenger, champion=champion)
            metrics |= lost
            notes += names
    return Report(challenger.number, champion.number, len(prompts), str(prompts_from), n, metrics, errors, tuple(notes))


# --- samples


def _sampled_metrics(
    policy: Policy,
    config: Config,
    prompts: Sequence[Group],
    errors: dict[str, str],
    kept: list[Sample],
    *,
    challenger: Version,
    champion: Version,
    base: Version,
) -> dict[str, Interval]:
    """Length, entropy, truncation and KL from samples of challenger, champion and base, prompt by prompt in turn.

    The first answers to some of the prompts are ``kept``.
    """
    asked = list(itertools.islice(itertools.cycle(prompts), SAMPLES_PER_PROMPT * config.evaluate.prompts))
    new, old, seed = (
        sample(policy, config, asked, version, role=role)
        for version, role in ((challenger, "challenger"), (champion, "champion"), (base, "base"))
    )
    kept += samples_kept.pairs(prompts, new, old, champion, most=config.evaluate.keep_samples)
    bad_new, bad_old = (mean([float(_is_bad(answer)) for answer in answers]) for answers in (new, old))
    entropy, every = _entropy(new), len(prompts)
    metrics = {
        "entropy": entropy.interval(every),
        "bad_share": shared(bad_new),
        "bad_share_increase": difference(bad_new, bad_old).interval(every),
        "kl_parent": _kl(policy, champion, asked, new).interval(every),
        "kl_base": _kl(policy, base, asked, new).interval(every),
    }
    with _recorded(errors, ("length_ratio",)):
        metrics["length_ratio"] = ratio(_length(new), _length(old)).interval(every)
    with _recorded(errors, ("entropy_ratio",)):
        metrics["entropy_ratio"] = ratio(entropy, _entropy(seed)).interval(every)
    if judged := anchors.wanted(config):
        with _recorded(errors, judged):
            metrics |= anchors.measure(config, prompts, *(answers[:every] for answers in (new, old, seed)))
    return metrics


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


def _length(answers: Sequence[Completion]) -> Estimate:
    return mean([float(len(answer.token_ids)) for answer in answers])


def _entropy(answers: Sequence[Completion]) -> Estimate:
    """Nats per answer: -log p of a policy's own samples estimates the entropy of what it may say.

    Per answer, not per token: learning a fixed greeting adds tokens without choice, and is no collapse.
    """
    return mean([-math.fsum(answer.logps) for answer in answers])


def _kl(policy: Policy, reference: Version, asked: Sequence[Group], answers: Sequence[Completion]) -> Estimate:
    """KL(challenger || reference) in nats per answer: the mean log-ratio of the challenger's own samples."""
    sequences = [
        TokenSequence(prompt_token_ids(policy, group), answer.token_ids) for group, answer in zip(asked, answers, strict=True)
    ]
    sums = _summed_logps(policy, reference, sequences)
    return mean([math.fsum(answer.logps) - theirs for answer, theirs in zip(answers, sums, strict=True)])


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
        "heldout_accuracy": shared(mean([0.5 if margin == 0 else float(margin > 0) for margin in margins])),
        "heldout_loss": mean([_softplus(-margin) for margin in margins]).interval(),
        "d_chosen": mean(chosen).interval(),
        "d_rejected": mean(rejected).interval(),
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
    return TokenSequence(prompt_token_ids(policy, pair), completion)


def _size(sequence: TokenSequence) -> int:
    return len(sequence.prompt_token_ids) + len(sequence.completion_token_ids)


def _softplus(x: float) -> float:
    """log(1 + e^x) = -log sigmoid(-x), without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# --- bits


@contextmanager
def _recorded(errors: dict[str, str], metrics: Sequence[str]) -> Iterator[None]:
    """A part that fails becomes the reason of its metrics: the gate holds on it, the rest of the report stands."""
    try:
        yield
    except PairloopError as error:
        errors |= dict.fromkeys(metrics, str(error))
