"""Our objectives, and a training run, beside TRL's trainers in float32: TRL tokenizes, collates and computes its own loss.

Both read the same texts under the same random models. Where conventions differ a test feeds one that both share, and says so.
Not compared, for TRL has no counterpart: dpop, token_clip, importance on pairs; and rloo's KL, which TRL takes off the rewards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import byte_tokenizer, letter_tokenizer, write_model
from torch import Tensor, nn

from pairloop.config import TrainSection
from pairloop.formats import write_rows
from pairloop.learner.data import TokenGroup
from pairloop.learner.memory import TokenBudget
from pairloop.learner.scores import References, batch_of, group_logps, score
from pairloop.learner.step import Trainer, optimizer_of
from pairloop.objective import OBJECTIVES, Batch, ObjectiveSettings, group_metrics
from pairloop.policy.protocols import TokenCompletion
from pairloop.policy.scoring import load_causal_lm
from pairloop.types import Message, PairSide, PreferencePair

# TRL asks transformers by an old name whether activations are checkpointed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TOLERANCE = 1e-4
"""Of losses absolute and relative; of gradients the norm of the difference over the norm."""
FAULT = 1e-3
"""A planted fault moves the loss by more than this, absolute and relative."""
EOS_ID = 0

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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Two random models of bytes, nats apart."""
    folder = tmp_path_factory.mktemp("models")
    policy, reference = (write_model(folder / name, seed=seed, gain=5.0) for seed, name in enumerate(("policy", "reference")))
    return Models(policy, reference)


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Two random models of eight tokens, which end their answers early or late."""
    folder = tmp_path_factory.mktemp("letters")
    policy, reference = (
        write_model(folder / name, tokenizer=letter_tokenizer(), seed=seed, gain=5.0)
        for seed, name in enumerate(("policy", "reference"))
    )
    return Models(policy, reference)


# ---- both sides


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


# ---- groups

G = 4
MOST_TOKENS = 10
PROMPTS = ("abc", "g", "ef", "bbbbb")


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
    from datasets import load_dataset
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
