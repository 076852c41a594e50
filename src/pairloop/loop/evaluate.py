"""Evaluate: challenger against champion and base, before any traffic is spent.

One sample each at T = 1 on recent prompts of the gate pool (which never train), so that length, entropy, KL and truncation
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from pairloop.config import Config, secret
from pairloop.errors import EngineError, NotFoundError, PairloopError, StoreError, UserError
from pairloop.formats import snapshot
from pairloop.judge import PairwiseJudge, load_verifier
from pairloop.policy.protocols import Policy, SampleRequest, TokenSequence
from pairloop.store import Store, groups, versions
from pairloop.types import (
    BASE_VERSION,
    Completion,
    Dataset,
    DuelPick,
    FinishReason,
    Group,
    Interval,
    Message,
    PairSide,
    Pool,
    PreferencePair,
    Prompt,
    SamplingParams,
    Version,
)

HELDOUT_FILE = "heldout.jsonl"
HELDOUT_PAIRS = 256
"""The newest held-out pairs that one report scores."""
_SCORED_TOGETHER = 32
_Z95 = 1.959963984540054

SAMPLE_METRICS = ("length_ratio", "entropy", "entropy_ratio", "bad_share", "bad_share_increase")
KL_METRICS = ("kl_parent", "kl_base")
HELDOUT_METRICS = ("heldout_accuracy", "heldout_loss", "d_chosen", "d_rejected")


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured: metrics with 95 % intervals, errors by metric, and notes for the reader.

    ``length_ratio`` tokens per answer over the champion's · ``entropy`` nats per token of the challenger's own samples ·
    ``entropy_ratio`` that over the base's · ``bad_share`` truncated or empty answers · ``bad_share_increase`` over the
    champion's · ``kl_parent``, ``kl_base`` nats per answer · ``heldout_accuracy``, ``heldout_loss`` of held-out pairs with
    the champion as reference · ``d_chosen``, ``d_rejected`` log-ratio challenger to champion in nats per answer.
    """

    challenger: int
    champion: int
    prompts: int
    prompts_from: str
    samples: int
    metrics: Mapping[str, Interval]
    errors: Mapping[str, str]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data; ``from_dict`` is the way back."""
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
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
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

    def as_dict(self) -> dict[str, Any]:
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
    base = _version(store, config, BASE_VERSION)
    metrics: dict[str, Interval] = {}
    errors: dict[str, str] = {}
    notes: list[str] = []
    prompts, prompts_from = _prompts(store, config, limit=config.evaluate.prompts)
    n = config.evaluate.prompts if prompts else 0
    if not prompts:
        errors |= dict.fromkeys(SAMPLE_METRICS + KL_METRICS, "no prompts were recorded yet")
    else:
        if prompts_from is Pool.TRAIN:
            notes.append("no prompts of the gate pool were recorded: sampled on prompts of the train pool instead")
        if len(prompts) < n:
            notes.append(f"{len(prompts)} prompts sampled in turn until there were {n} samples")
        with _recorded(errors, SAMPLE_METRICS + KL_METRICS):
            metrics |= _sampled_metrics(policy, config, prompts, challenger=challenger, champion=champion, base=base)
    if dataset is not None and dataset.n_heldout:
        with _recorded(errors, HELDOUT_METRICS):
            metrics |= _heldout_metrics(policy, config, dataset, challenger=challenger, champion=champion, notes=notes)
    else:
        notes.append("no held-out pairs in this round")
    return Report(
        challenger.number, champion.number, len(prompts), str(prompts_from), n, metrics, _unless_known(errors, metrics), tuple(notes)
    )


def offline_duel(store: Store, policy: Policy, config: Config, *, challenger: Version, champion: Version) -> OfflineDuel:
    """Votes of the configured verifier or judge, one per recent prompt of the gate pool; UserError where none is configured."""
    labeller, compare = _labeller(config)
    with store.reading() as c:
        prompts = groups.recent_prompts(c, config.policy.name, pool=Pool.GATE, limit=config.gate.offline_prompts)
    old = _sample(policy, config, prompts, champion, role="duel")
    new = _sample(policy, config, prompts, challenger, role="duel")
    started = datetime.now(UTC)
    picks: list[DuelPick] = []
    problems: list[str] = []
    for i, (group, a, b) in enumerate(zip(prompts, old, new, strict=True)):
        try:
            outcome = 0 if a.text == b.text else compare(_messages(group.prompt), a.text, b.text)
        except PairloopError as error:
            problems.append(str(error))
            continue
        picks.append(DuelPick(group.group_id, outcome, started + timedelta(microseconds=i)))
    return OfflineDuel(tuple(picks), len(prompts), len(problems), labeller, problems[0] if problems else None)
