"""Our objectives of pairs and thumbs, and a training run, beside TRL's trainers in float32.

TRL tokenizes, collates and computes its own loss. Both read the same texts under the same random models. Where conventions
differ a test feeds one that both share, and says so. Not compared, for TRL has no counterpart: dpop, token_clip, importance on
pairs; and rloo's KL, which TRL takes off the rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import byte_tokenizer, write_model
from tests.trl_rig import EOS_ID, OLD_NAME, TOLERANCE, Models, agree, differ, distance, ours, scored, theirs, trainer_of, trl

from pairloop.config import TrainSection
from pairloop.formats import write_rows
from pairloop.learner.data import TokenGroup
from pairloop.learner.memory import TokenBudget
from pairloop.learner.scores import References, batch_of, group_logps
from pairloop.learner.step import Trainer, optimizer_of
from pairloop.objective import ObjectiveSettings
from pairloop.policy.protocols import TokenCompletion
from pairloop.policy.scoring import load_causal_lm
from pairloop.types import Message, PairSide, PreferencePair

__all__ = ["trl"]  # the fixture

pytestmark = OLD_NAME


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Two random models of bytes, nats apart."""
    folder = tmp_path_factory.mktemp("models")
    policy, reference = (write_model(folder / name, seed=seed, gain=5.0) for seed, name in enumerate(("policy", "reference")))
    return Models(policy, reference)


# ---- pairs and thumbs

WORDS = ("yes", "no idea at all", "ask me later", "it depends", "never", "a", "that is wrong", "why not?")


@dataclass(frozen=True)
class Texts:
    prompt: str
    chosen: str
    rejected: str


def some_texts(count: int, *, prompt_letters: int | None = None) -> list[Texts]:
    """Prompts and answers of many lengths, the chosen at times the longer; or prompts of so many tokens."""
    texts = []
    for i in range(count):
        chosen, rejected = WORDS[i % 8], WORDS[(3 * i + 1 + i // 8) % 8]
        texts.append(Texts(f"what is {i}?"[:prompt_letters] + "!" * (i % 5 if prompt_letters is None else 0), chosen, rejected))
    return texts


def token_ids(text: str) -> tuple[int, ...]:
    return tuple(byte_tokenizer().encode(text).ids)


def groups_of(texts: Sequence[Texts]) -> list[TokenGroup]:
    """Pairs as token ids, each answer with the EOS that TRL adds."""
    return [
        TokenGroup(
            f"pair_{i}",
            token_ids(pair.prompt),
            tuple(TokenCompletion((*token_ids(answer), EOS_ID)) for answer in (pair.chosen, pair.rejected)),
            (1.0, 0.0),
        )
        for i, pair in enumerate(texts)
    ]


@dataclass(frozen=True)
class Case:
    """An objective of ours, the trainer of TRL's with the options that make it the same, and settings of ours that differ.

    alone: TRL gets one pair at a time, and the mean is over its batches.
    """

    objective: str
    trainer: str
    settings: ObjectiveSettings
    options: Mapping[str, Any]
    fault: Mapping[str, Any] = field(default_factory=lambda: {"beta": 0.4})
    alone: bool = False
    prompt_letters: int | None = None

    def __str__(self) -> str:
        loss_type = self.options.get("loss_type", self.trainer)
        return f"{self.objective}-{loss_type if isinstance(loss_type, str) else '+'.join(loss_type)}"


def of_dpo(objective: str, loss: Sequence[str], *, alone: bool = False, fault: str = "beta", **settings: Any) -> Case:
    """DPOTrainer's own settings have our names, and its losses are a list."""
    known = {"beta": 0.3, **settings}
    options = {key: value for key, value in known.items() if key in ("beta", "label_smoothing", "ld_alpha")}
    changed = {fault: 1.3 * known[fault]}
    if "nll_weight" in known:
        options["loss_weights"] = [1.0, known["nll_weight"]]
    return Case(objective, "DPO", ObjectiveSettings(**known), {**options, "loss_type": list(loss)}, changed, alone)


CASES = [
    of_dpo("dpo", ["sigmoid"]),
    of_dpo("cdpo", ["aot"], label_smoothing=0.2, fault="label_smoothing", alone=True),
    of_dpo("rdpo", ["robust"], label_smoothing=0.2, fault="label_smoothing"),
    of_dpo("ipo", ["ipo"], length_normalized=True),
    of_dpo("dpo_norm", ["sigmoid_norm"], beta=2.0),
    of_dpo("ld_dpo", ["sigmoid"], ld_alpha=0.4, fault="ld_alpha"),
    of_dpo("dpo_nll", ["sigmoid", "sft"], nll_weight=0.7, fault="nll_weight", alone=True),
    Case(
        "simpo",
        "CPO",
        ObjectiveSettings(beta=2.0, simpo_margin=0.7),
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0},
        {"simpo_margin": 0.6},
    ),
    Case(
        "simpo",
        "CPO",
        ObjectiveSettings(beta=2.0, label_smoothing=0.1, nll_weight=0.8),
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.8, "label_smoothing": 0.1},
        {"label_smoothing": 0.15},
        alone=True,
    ),
    Case("orpo", "ORPO", ObjectiveSettings(beta=0.3), {"beta": 0.3}, alone=True, prompt_letters=1),
    Case("sft", "SFT", ObjectiveSettings(), {}, {"importance": "sequence"}, alone=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients_of_pairs_are_those_of_trl(trl: Any, models: Models, tmp_path: Path, case: Case) -> None:
    """cdpo is TRL's aot of one pair, where there is nothing to sort: TRL's sigmoid reads no label smoothing.

    ipo is length-normalised there. Means over the batch's tokens (sft, the likelihood beside dpo and simpo) are ours of each
    pair alone. ORPO's likelihood is there of prompt and answer: of the answer alone where the prompt is one token, which
    nothing predicts.
    """
    texts = some_texts(8, prompt_letters=case.prompt_letters)
    groups = groups_of(texts)
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in texts]
    if case.trainer == "SFT":
        rows = [{"prompt": pair.prompt, "completion": pair.chosen} for pair in texts]
    options = {**case.options, **({"per_device_train_batch_size": 1} if case.alone else {})}
    other, other_gradient = theirs(trainer_of(trl, case.trainer, models, tmp_path, rows, **options))
    model = load_causal_lm(models.policy, trainable=True)
    batch = batch_of(groups, *group_logps(model, groups), References(scored(models.reference, groups)))
    mine, gradient = ours(case.objective, model, batch, case.settings)
    assert agree(mine, other), (mine, other)
    assert distance(gradient, other_gradient) < TOLERANCE
    wrong, _ = ours(case.objective, model, batch, replace(case.settings, **case.fault))
    assert differ(wrong, other), (wrong, other)


def test_kto_is_trls(trl: Any, models: Models, tmp_path: Path) -> None:
    """Lone thumbs. TRL's z0 is the mean log-ratio of every completion after the next prompt: the test feeds that one."""
    texts = some_texts(8)
    rows: list[dict[str, Any]] = [
        {"prompt": pair.prompt, "completion": answer, "label": label}
        for pair in texts
        for answer, label in ((pair.chosen, True), (pair.rejected, False))
    ][:-1]
    settings = ObjectiveSettings(beta=0.2, desirable_weight=1.2, undesirable_weight=0.7)
    weights = {"beta": 0.2, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    other, other_gradient = theirs(trainer_of(trl, "KTO", models, tmp_path, rows, **weights))

    def lone(name: str, answers: Sequence[str]) -> list[TokenGroup]:
        return [
            TokenGroup(
                f"{name}_{i}",
                token_ids(row["prompt"]),
                (TokenCompletion((*token_ids(answer), EOS_ID)),),
                (float(row["label"]),),
            )
            for i, (row, answer) in enumerate(zip(rows, answers, strict=True))
        ]

    answers = [row["completion"] for row in rows]
    groups, mismatched = lone("own", answers), lone("other", [answers[-1], *answers[:-1]])
    policy, reference = (scored(path, mismatched) for path in (models.policy, models.reference))
    z0 = torch.stack([policy[name][0].sum() - reference[name][0].sum() for name in policy]).mean()
    assert z0 > 1
    model = load_causal_lm(models.policy, trainable=True)
    batch = batch_of(groups, *group_logps(model, groups), References(scored(models.reference, groups)))
    mine, gradient = ours("kto", model, replace(batch, kl_reference=z0), settings)
    assert agree(mine, other), (mine, other)
    assert distance(gradient, other_gradient) < TOLERANCE
    wrong, _ = ours("kto", model, batch, settings)
    assert differ(wrong, other), (wrong, other)


# ---- a run

STEPS, EPOCHS, BATCH_SIZE, RATE = 12, 3, 8, 1e-3


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """One model, policy and reference alike, whose gradients are large enough to be clipped."""
    path = write_model(tmp_path_factory.mktemp("start"), hidden=32)
    return Models(path, path)


def our_run(models: Models, groups: Sequence[TokenGroup], beta: float) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    settings = TrainSection(
        beta=beta, batch_size=BATCH_SIZE, learning_rate=RATE, clip_norm=1.0, adam_betas=(0.9, 0.999), adam_eps=1e-8
    )
    model = load_causal_lm(models.policy, trainable=True)
    parameters = list(model.parameters())
    trainer = Trainer(
        model,
        optimizer_of(parameters, settings),
        parameters,
        References(scored(models.policy, groups)),
        settings,
        TokenBudget(),
    )
    rows = []
    for step in range(STEPS):
        first = step * BATCH_SIZE % len(groups)
        rows.append(trainer.step(groups[first : first + BATCH_SIZE], RATE))
    return [(row["loss"], row["grad_norm"]) for row in rows]


def largest_differences(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> tuple[float, float]:
    losses, norms = zip(*((abs(a - c), abs(b - d)) for (a, b), (c, d) in zip(one, other, strict=True)), strict=True)
    return max(losses), max(norms)


def test_twelve_steps_of_dpo_are_trls(trl: Any, start: Models, tmp_path: Path) -> None:
    """The same pairs in the same order from the same weights, which are the reference; AdamW at a constant rate, clipped."""
    texts = [Texts(f"what is {i}?", f"yes, {i}", f"no idea{i % 5 * '!'}") for i in range(STEPS * BATCH_SIZE // EPOCHS)]
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in texts]
    trainer = trainer_of(
        trl,
        "DPO",
        start,
        tmp_path,
        rows,
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=EPOCHS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.1,
        logging_steps=1,
    )
    trainer.train()
    wanted = [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
    assert len(wanted) == STEPS
    groups = groups_of(texts)
    found = our_run(start, groups, beta=0.1)
    loss_apart, norm_apart = largest_differences(found, wanted)
    assert loss_apart < 1e-4
    assert norm_apart < 1e-2
    # What is compared moves, and the clipping acts.
    losses, norms = zip(*wanted, strict=True)
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] < 0.2 * losses[0]
    assert max(norms) > 1
    loss_apart, norm_apart = largest_differences(our_run(start, groups, beta=0.11), wanted)
    assert loss_apart > 1e-3
    assert norm_apart > 1e-2


@pytest.mark.slow
def test_trl_trains_on_an_export_as_it_is(trl: Any, tmp_path: Path) -> None:
    from datasets import load_dataset  # type: ignore[import-untyped]
    from transformers import AutoTokenizer

    model = write_model(tmp_path / "model")
    pairs = [
        PreferencePair(f"pair_{n}", (Message("user", f"What is {n}?"),), PairSide(f"It is {n}."), PairSide("No idea."))
        for n in range(8)
    ]
    write_rows(tmp_path / "picks" / "train.jsonl", pairs, "trl")
    # As `trl dpo --dataset_name picks` loads it.
    rows = load_dataset(str(tmp_path / "picks"), split="train", cache_dir=str(tmp_path / "cache"))
    settings = trl.DPOConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trl.DPOTrainer(model=str(model), args=settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 2
    losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    assert losses
    assert 0 < losses[0] < 5
