"""The group objectives beside TRL's trainers in float32, on what TRL itself sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import letter_tokenizer, write_model
from tests.trl_rig import (
    OLD_NAME,
    TOLERANCE,
    Gradient,
    Models,
    agree,
    differ,
    distance,
    gradient_of,
    ours,
    scored,
    trainer_of,
    trl,
)
from torch import nn

from pairloop.learner.data import TokenGroup
from pairloop.learner.scores import References, batch_of, group_logps
from pairloop.objective import Batch, ObjectiveSettings, group_metrics
from pairloop.policy.protocols import TokenCompletion
from pairloop.policy.scoring import load_causal_lm

__all__ = ["trl"]  # the fixture

pytestmark = OLD_NAME

G = 4
MOST_TOKENS = 10
PROMPTS = ("abc", "g", "ef", "bbbbb")


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Two random models of eight tokens, which end their answers early or late."""
    folder = tmp_path_factory.mktemp("letters")
    policy, reference = (
        write_model(folder / name, tokenizer=letter_tokenizer(), seed=seed, gain=5.0)
        for seed, name in enumerate(("policy", "reference"))
    )
    return Models(policy, reference)


@dataclass(frozen=True)
class Rollout:
    """Completions that TRL's trainer sampled and scored before its policy moved; ours moved to the same weights."""

    trainer: Any
    inputs: Any
    model: nn.Module
    batch: Batch

    def theirs(self) -> tuple[float, Gradient]:
        loss = self.trainer.compute_loss(self.trainer.model, self.inputs)
        loss.backward()
        return loss.item(), gradient_of(self.trainer.model)


def rollout(trl: Any, name: str, letters: Models, out: Path, *, scale: float, **options: Any) -> Rollout:
    """Groups of four answers to four prompts, their rewards of the order of ``scale``."""

    def reward(ids: Sequence[int]) -> float:
        return scale * (2 * ids.count(1) + ids.count(3) - 0.3 * len(ids))

    def rewards(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [reward(ids) for ids in completion_ids]

    known: dict[str, Any] = {
        "per_device_train_batch_size": len(PROMPTS) * G,
        "num_generations": G,
        "max_completion_length": MOST_TOKENS,
        "num_iterations": 2,
        "steps_per_generation": 1,
        "reward_funcs": rewards,
    }
    prompts = [{"prompt": prompt} for prompt in PROMPTS]
    trainer = trainer_of(trl, name, letters, out, prompts, **known | options)
    trainer.current_gradient_accumulation_steps = 1
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(load_causal_lm(letters.reference).state_dict())
    inputs = trainer._generate_and_score_completions([prompt for prompt in prompts for _ in range(G)])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.4 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))
    model = load_causal_lm(letters.policy, trainable=True)
    model.load_state_dict(trainer.model.state_dict())
    prompt_ids, completions = (
        [ids[mask.bool()].tolist() for ids, mask in zip(inputs[f"{part}_ids"], inputs[f"{part}_mask"], strict=True)]
        for part in ("prompt", "completion")
    )
    assert len({len(ids) for ids in completions}) > 3
    groups = [
        TokenGroup(
            f"group_{first}",
            tuple(prompt_ids[first]),
            tuple(TokenCompletion(tuple(ids)) for ids in completions[first : first + G]),
            tuple(reward(ids) for ids in completions[first : first + G]),
        )
        for first in range(0, len(completions), G)
    ]
    references = References(scored(letters.reference, groups), scored(letters.policy, groups))
    return Rollout(trainer, inputs, model, batch_of(groups, *group_logps(model, groups), references))


@dataclass(frozen=True)
class GroupCase:
    """As `Case`; TRL's loss is ``times`` ours."""

    objective: str
    settings: ObjectiveSettings
    options: Mapping[str, Any]
    fault: Mapping[str, Any]
    scale: float = 100.0
    times: float = 1.0

    def __str__(self) -> str:
        return f"{self.objective}-{self.options['loss_type']}"


GROUP_CASES = [
    GroupCase(
        "grpo",
        ObjectiveSettings(advantage_std="sample", kl_weight=0.05),
        {"loss_type": "grpo", "beta": 0.05, "use_bias_correction_kl": False},
        {"kl_weight": 0.08},
    ),
    GroupCase(
        "grpo",
        ObjectiveSettings(advantage_std="none", clip_high=0.1, loss_mean="tokens"),
        {"loss_type": "bnpo", "scale_rewards": "none", "epsilon_high": 0.1},
        {"clip_high": 0.2},
        scale=1.0,
    ),
    GroupCase(
        "dr_grpo",
        ObjectiveSettings(),
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"clip_low": 0.1},
        scale=1.0,
        times=1 / MOST_TOKENS,
    ),
    GroupCase(
        "dapo",
        ObjectiveSettings(advantage_std="sample"),
        {"loss_type": "dapo", "epsilon_high": 0.28},
        {"advantage_std": "population"},
    ),
]


@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
def test_losses_and_gradients_of_groups_are_those_of_trl(trl: Any, letters: Models, tmp_path: Path, case: GroupCase) -> None:
    """TRL adds 1e-4 to a group's standard deviation, the sample's: rewards in the hundreds make that nothing.

    Its Dr. GRPO divides by the longest completion that may be sampled, ours by nothing. Its KL is by default weighed by the
    policy's ratio to the sampler (2512.02556): here it is GRPO's own.
    """
    found = rollout(trl, "GRPO", letters, tmp_path, scale=case.scale, **case.options)
    other, other_gradient = found.theirs()
    mine, gradient = ours(case.objective, found.model, found.batch, case.settings)
    assert agree(case.times * mine, other), (mine, other)
    assert distance({name: case.times * value for name, value in gradient.items()}, other_gradient) < TOLERANCE
    wrong, _ = ours(case.objective, found.model, found.batch, replace(case.settings, **case.fault))
    assert differ(case.times * wrong, other), (wrong, other)
    assert group_metrics(found.batch, case.settings, torch.zeros(()))["clip_fraction"] > 0.05


def test_the_gradient_of_rloo_is_trls(trl: Any, letters: Models, tmp_path: Path) -> None:
    """Gradients alone: TRL's loss is -w A, ours -w A log pi with w as a constant, which have the same slope but not the value.

    w is the weight of a whole completion; the bounds on it, which differ, are out of the way.
    """
    options = {"beta": 0.0, "epsilon": 0.999_999, "epsilon_high": 1e6}
    found = rollout(trl, "RLOO", letters, tmp_path, scale=1.0, **options)
    _, other_gradient = found.theirs()
    settings = ObjectiveSettings(importance="sequence", max_importance=1e6)
    _, gradient = ours("rloo", found.model, found.batch, settings)
    assert distance(gradient, other_gradient) < TOLERANCE
    _, wrong = ours("rloo", found.model, found.batch, replace(settings, max_importance=1.0))
    assert distance(wrong, other_gradient) > 0.05
