"""Jobs for the learner's tests: tiny models, pairs as imported and as recorded at sampling."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pairloop.config import TrainSection
from pairloop.formats import snapshot
from pairloop.learner import TrainJob
from pairloop.learner.data import Limits, tokenize
from pairloop.learner.scores import score
from pairloop.policy.protocols import TokenCompletion
from pairloop.policy.scoring import load_causal_lm
from pairloop.template import ChatTemplate
from pairloop.types import Message, PairSide, PreferencePair, TrainingRow, VersionKind

MakeJob = Callable[..., TrainJob]

RECIPE: dict[str, Any] = {
    "learning_rate": 2e-3,
    "batch_size": 4,
    "epochs": 2,
    "warmup_steps": 2,
    "checkpoint_every": 1000,
    "min_length_ratio": 0.0,
    "max_length_ratio": 0.0,
    "min_entropy_ratio": 0.0,
}
"""Rates at which a tiny model moves far in few steps; so the rules that would stop a round for that are off."""


def text_pairs(count: int, start: int = 0) -> list[PreferencePair]:
    """Pairs without token ids, as read from a file: the chosen answer is the shorter one."""
    return [
        PreferencePair(
            pair_id=f"pair_{i}",
            prompt=(Message("user", f"what is {i}?"),),
            chosen=PairSide(f"{i}!"),
            rejected=PairSide(f"no idea {i}"),
        )
        for i in range(start, start + count)
    ]


def recorded(pairs: list[PreferencePair], base: Path, *, wrong_by: float = 0.0) -> list[PreferencePair]:
    """The same pairs as the base's own samples: token ids and log-probs recorded, each log-prob wrong by so much."""
    tokens = ChatTemplate.load(base)
    encoded, _ = tokenize(pairs, tokens, Limits(10_000, 10_000), parent_version=0)
    scores = score(load_causal_lm(base), encoded)

    def side(side: PairSide, ids: TokenCompletion, logps: torch.Tensor) -> PairSide:
        return replace(side, token_ids=ids.token_ids, logps=tuple((logps + wrong_by).tolist()))

    return [
        replace(
            pair,
            sampled_by=0,
            prompt_token_ids=found.prompt,
            chosen=side(pair.chosen, found.completions[0], logps[0]),
            rejected=side(pair.rejected, found.completions[1], logps[1]),
        )
        for pair, found, logps in zip(pairs, encoded, scores, strict=True)
    ]


def job_maker(folder: Path, base: Path) -> MakeJob:
    """Gives a function that writes the snapshot and makes a job on it; the job's own files lie in ``folder / name``."""

    def make(
        pairs: Sequence[TrainingRow],
        heldout: Sequence[TrainingRow] | None = None,
        *,
        name: str = "run",
        recipe: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> TrainJob:
        data = folder / f"{name}-data"
        data.mkdir(parents=True, exist_ok=True)
        snapshot.write(data / "train.jsonl", pairs)
        snapshot.write(data / "heldout.jsonl", heldout or [])
        defaults: dict[str, Any] = {
            "base_dir": str(base),
            "parent_path": None,
            "parent_kind": VersionKind.BASE,
            "parent_version": 0,
            "method": "full",
            "device": "cpu",
        }
        section = TrainSection.model_validate({**RECIPE, **(recipe or {})})
        return TrainJob.in_folder(folder / name, snapshot_dir=str(data), train=section, **{**defaults, **settings})

    return make


def rows_of(job: TrainJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(job.metrics_path).read_text().splitlines()]


def weights_of(job: TrainJob) -> dict[str, torch.Tensor]:
    name = "model.safetensors" if job.method == "full" else "adapter_model.safetensors"
    return load_file(Path(job.out_dir) / name)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def cut_after(steps: int) -> Callable[[Mapping[str, Any]], None]:
    def report(row: Mapping[str, Any]) -> None:
        if row["step"] == steps:
            raise KeyboardInterrupt

    return report
