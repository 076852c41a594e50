"""TRL's trainers and our objectives, asked for loss and gradient in the same way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pairloop.learner.data import TokenGroup
from pairloop.learner.scores import score
from pairloop.objective import OBJECTIVES, Batch, ObjectiveSettings
from pairloop.policy.scoring import load_causal_lm

TOLERANCE = 1e-4
"""Of losses absolute and relative; of gradients the norm of the difference over the norm."""
FAULT = 1e-3
"""A planted fault moves the loss by more than this, absolute and relative."""
EOS_ID = 0
OLD_NAME = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
"""TRL asks transformers by an old name whether activations are checkpointed."""

Gradient = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def trl() -> Iterator[Any]:
    """TRL, imported where it is used because that takes seconds; it reports its use to nobody."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        import datasets  # type: ignore[import-untyped]
        import trl
        import trl.experimental.cpo
        import trl.experimental.orpo

        datasets.disable_progress_bars()
        yield trl


@dataclass(frozen=True)
class Models:
    policy: Path
    reference: Path


def trainer_of(trl: Any, name: str, models: Models, out: Path, rows: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """TRL's trainer on these rows, in their order, all of them one batch where the options do not say otherwise."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    home = {"CPO": trl.experimental.cpo, "ORPO": trl.experimental.orpo}.get(name, trl)
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": len(rows),
        "train_sampling_strategy": "sequential",
        "activation_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    reference = {"ref_model": load_causal_lm(models.reference)} if name in ("DPO", "KTO") else {}
    reward = {"reward_funcs": options.pop("reward_funcs")} if name in ("GRPO", "RLOO") else {}
    tokenizer: Any = AutoTokenizer.from_pretrained(models.policy)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = getattr(home, f"{name}Trainer")(
        model=load_causal_lm(models.policy, trainable=True),
        args=getattr(home, f"{name}Config")(**defaults | options),
        train_dataset=Dataset.from_list([dict(row) for row in rows]),
        processing_class=tokenizer,
        **reference,
        **reward,
    )
    trainer.model.train()
    return trainer


def theirs(trainer: Any) -> tuple[float, Gradient]:
    """Loss and gradient of TRL's trainer, the mean over its batches."""
    batches = list(trainer.get_train_dataloader())
    total = 0.0
    for inputs in batches:
        loss = trainer.compute_loss(trainer.model, inputs) / len(batches)
        assert loss.dtype is torch.float32
        loss.backward()
        total += loss.item()
    return total, gradient_of(trainer.model)


def ours(name: str, model: nn.Module, batch: Batch, settings: ObjectiveSettings) -> tuple[float, Gradient]:
    """Loss and gradient of our objective."""
    model.zero_grad()
    loss = OBJECTIVES[name].loss(batch, settings)
    assert loss.dtype is torch.float32
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    return loss.item(), gradient_of(model)


def gradient_of(model: nn.Module) -> Gradient:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def distance(one: Gradient, other: Gradient) -> float:
    assert one.keys() == other.keys()
    apart = sum(float((one[name] - other[name]).double().pow(2).sum()) for name in one)
    return float((apart / sum(float(value.double().pow(2).sum()) for value in other.values())) ** 0.5)


def scored(model_path: Path, groups: Sequence[TokenGroup]) -> dict[str, tuple[Tensor, ...]]:
    scores = score(load_causal_lm(model_path), groups)
    return {group.group_id: logps for group, logps in zip(groups, scores, strict=True)}


def agree(mine: float, other: float) -> bool:
    return abs(mine - other) < TOLERANCE * min(1.0, abs(other))


def differ(mine: float, other: float) -> bool:
    return abs(mine - other) > FAULT * max(1.0, abs(other))
