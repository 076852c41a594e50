"""Rebuilds the starter model from nothing: corpus -> tokenizer -> a tiny Llama -> the plain Hugging Face layout.

    python -m pairloop.starter.build --out DIR [--steps 7000] [--seed 0]
    python -m pairloop.starter.build --measure DIR

The model is meant to be fluent, sound at copying order numbers, and of mixed quality: it has learnt every style of
the corpus, so picks have something to improve. Left out on purpose: validation splits, checkpoints, mixed precision.
"""

import argparse
import copy
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.progress import Progress, TextColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pairloop.starter import corpus, customers
from pairloop.starter.corpus import Case, Message

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
IGNORED = -100
MAX_NEW_TOKENS = 80

CHAT_TEMPLATE = """\
{#- System messages are left out: the model has never seen one. Any role but system, user, assistant is an error. -#}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<|user|>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<|assistant|>' + message['content'] + '<|end|>' -}}
{%- elif message['role'] != 'system' -%}
{{- raise_exception('unknown role: ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Recipe:
    """The settings of a build; the defaults made the packaged model."""

    steps: int = 7000
    seed: int = 0
    batch: int = 16
    matrix_lr: float = 0.02
    other_lr: float = 3e-3
    warm_up: int = 30
    final_lr_share: float = 0.05
    vocabulary: int = 1000
    tokenizer_chats: int = 20_000
    hidden: int = 96
    layers: int = 2
    heads: int = 3
    mlp: int = 256
    positions: int = 512


@dataclass(frozen=True)
class Answer:
    """One sampled answer; `tokens` counts the end token, `ended` tells whether there was one."""

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Figures:
    """What was measured on held-out prompts at temperature 1; fidelity and step are shares of answers."""

    answers: int
    utility: float
    perfect: float
    right_step: float
    fidelity: float
    with_number: int
    second_turn_utility: float
    second_turn_fidelity: float
    ended: float
    mean_tokens: float


def build(out: Path, recipe: Recipe) -> None:
    """Train with this recipe and write the whole model directory."""
    tokenizer = train_tokenizer(recipe)
    model = train_model(tokenizer, recipe)
    save(model, tokenizer, out)


def train_tokenizer(recipe: Recipe) -> Tokenizer:
    """Byte-pair tokenizer in which every digit is a token of its own, so a number is copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for chat in islice(corpus.chats(recipe.seed), recipe.tokenizer_chats) for t in chat.turns for text in t)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_model(tokenizer: Tokenizer, recipe: Recipe) -> LlamaForCausalLM:
    """Next-token training on the corpus, with the loss on the agents' answers and their end token only."""
    torch.manual_seed(recipe.seed)
    model = new_model(tokenizer, recipe)
    optimizers = _optimizers(model, recipe)
    columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=recipe.steps, loss=float("nan"))
        for step, (input_ids_BT, labels_BT) in enumerate(islice(_batches(tokenizer, recipe), recipe.steps)):
            _set_learning_rates(optimizers, step, recipe)
            # No attention mask: padding is on the right, where no answer token of a causal model sees it.
            logits_BTV = model(input_ids=input_ids_BT).logits
            loss = torch.nn.functional.cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED
            )
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            progress.update(task, advance=1, loss=loss.item())
    return model


def new_model(tokenizer: Tokenizer, recipe: Recipe) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=recipe.mlp,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the plain Hugging Face layout, weights in fp16."""
    out.mkdir(parents=True, exist_ok=True)
    # half() works in place and the caller keeps a float32 model; a copied model (not copied tensors) stays tied.
    copy.deepcopy(model).half().save_pretrained(out)  # type: ignore[no-untyped-call]
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    # Loaders take the dtype from the config: stored small, computed in float32 unless asked otherwise.
    _patch_json(out / "config.json", {"dtype": "float32"})
    ids = {"eos_token_id": tokenizer.token_to_id(END), "pad_token_id": tokenizer.token_to_id(PAD)}
    _write_json(out / "generation_config.json", {"do_sample": True, "temperature": 1.0, **ids})
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": PAD,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.max_position_embeddings,
        },
    )
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[Message]], seed: int) -> list[Answer]:
    """One answer per prompt at temperature 1 from the whole vocabulary."""
    torch.manual_seed(seed)
    rendered = [str(tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)) for p in prompts]
    batch = tokenizer(rendered, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.inference_mode():
        ids_BT = model.generate(**batch, generation_config=settings)  # type: ignore[operator]
    answers = []
    for ids in ids_BT[:, batch["input_ids"].shape[1] :].tolist():
        ended = tokenizer.eos_token_id in ids
        kept = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
        answers.append(Answer(str(tokenizer.decode(kept)), len(kept) + ended, ended))
    return answers


def measure(directory: Path, prompts: int = 2000, seed: int = 0) -> Figures:
    """Sample answers to held-out first messages, then to a follow-up each, and score both by the hidden utility."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rng = random.Random(f"measure-{seed}")
    cases = [corpus.draw_held_out_case(rng) for _ in range(prompts)]
    first = sample(model, tokenizer, [case.messages() for case in cases], seed)
    questions = [customers.follow_up(case, rng) for case in cases]
    chats = [
        [*case.messages(), {"role": "assistant", "content": answer.text}, {"role": "user", "content": question}]
        for case, answer, question in zip(cases, first, questions, strict=True)
    ]
    second = sample(model, tokenizer, chats, seed + 1)
    worth, right, numbers = _judged(cases, first, [None] * prompts)
    later_worth, _, later_numbers = _judged(cases, second, questions)
    return Figures(
        answers=prompts,
        utility=_mean(worth),
        perfect=_mean([value >= customers.MAX_UTILITY for value in worth]),
        right_step=_mean(right),
        fidelity=_mean(numbers),
        with_number=len(numbers),
        second_turn_utility=_mean(later_worth),
        second_turn_fidelity=_mean(later_numbers),
        ended=_mean([answer.ended for answer in (*first, *second)]),
        mean_tokens=_mean([answer.tokens for answer in first]),
    )


def _judged(
    cases: Sequence[Case], answers: Sequence[Answer], turns: Sequence[str | None]
) -> tuple[list[float], list[bool], list[bool]]:
    """(utilities, whether the step is right, whether the numbers are right where an answer names one)."""
    rows = list(zip(cases, [answer.text for answer in answers], turns, strict=True))
    worth = [customers.utility(case, text, turn=turn) for case, text, turn in rows]
    right = [customers.has_right_step(case, text, turn=turn) for case, text, turn in rows]
    numbers = [known for case, text, _ in rows if (known := customers.numbers_right(case, text)) is not None]
    return worth, right, numbers


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _batches(tokenizer: Tokenizer, recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input_ids [B, T], labels [B, T]) of chats of like length: sorted in blocks, batches then shuffled."""
    rng = random.Random(f"batches-{recipe.seed}")
    stream = corpus.chats(recipe.seed)
    while True:
        block = sorted((encode_chat(tokenizer, chat) for chat in islice(stream, recipe.batch * 32)), key=lambda c: len(c[0]))
        batches = [block[start : start + recipe.batch] for start in range(0, len(block), recipe.batch)]
        rng.shuffle(batches)
        for rows in batches:
            width = max(len(ids) for ids, _ in rows)
            pad = tokenizer.token_to_id(PAD)
            yield (
                torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
                torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
            )


def encode_chat(tokenizer: Tokenizer, chat: corpus.Chat) -> tuple[list[int], list[int]]:
    """Token ids and labels of a chat, as the chat template renders it; labels are ignored on the customer's side."""
    ids: list[int] = []
    labels: list[int] = []
    for question, answer in chat.turns:
        prompt_ids = tokenizer.encode(f"{USER}{question}{ASSISTANT}").ids
        answer_ids = tokenizer.encode(f"{answer}{END}").ids
        ids += prompt_ids + answer_ids
        labels += [IGNORED] * len(prompt_ids) + answer_ids
    return ids, labels


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _set_learning_rates(optimizers: list[torch.optim.Optimizer], step: int, recipe: Recipe) -> None:
    """Linear warm-up, then a cosine down to the final share."""
    progress = torch.tensor(max(0, step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up) * torch.pi)
    cosine = recipe.final_lr_share + (1 - recipe.final_lr_share) * (1 + float(torch.cos(progress))) / 2
    share = min(1.0, (step + 1) / recipe.warm_up) * cosine
    for optimizer, peak in zip(optimizers, (recipe.matrix_lr, recipe.other_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * share


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _patch_json(path: Path, changes: dict[str, object]) -> None:
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


MODEL_CARD = """\
# Starter support bot

A very small Llama ({parameters:,} parameters, fp16 on disk) that answers customers of an invented shop, well and badly
in turns: fluent, sound at copying order numbers, of mixed quality. It exists so that picks have something to improve.
It knows nothing else, and is of no use outside this demonstration.

- Data: chats generated by `pairloop.starter.corpus`, no real people. Held out: one in ten combinations of name and order
  number, so the figures show generalisation inside that world only.
- Rebuild: `python -m pairloop.starter.build --out DIR --steps {recipe.steps} --seed {recipe.seed}`
- Settings: {settings}
- Chat template: system messages are left out, because the model has never seen one.

Measured on {figures.answers:,} held-out prompts at temperature 1 (the second turn answers a follow-up):

| | |
|---|---|
{rows}

Licence: Apache-2.0
"""


def write_model_card(directory: Path, recipe: Recipe, figures: Figures) -> None:
    parameters = AutoModelForCausalLM.from_pretrained(directory).num_parameters()
    settings = ", ".join(f"{name} {value}" for name, value in asdict(recipe).items())
    card = MODEL_CARD.format(parameters=parameters, recipe=recipe, settings=settings, figures=figures, rows=table(figures))
    (directory / "MODEL_CARD.md").write_text(card, encoding="utf-8")


def table(figures: Figures) -> str:
    """The figures as rows of a Markdown table."""
    rows = {
        "mean utility (at most 4)": f"{figures.utility:.2f}",
        "perfect answers": f"{figures.perfect:.1%}",
        "answers with the right step": f"{figures.right_step:.1%}",
        f"fidelity of order numbers (n = {figures.with_number})": f"{figures.fidelity:.1%}",
        "second turn: mean utility": f"{figures.second_turn_utility:.2f}",
        "second turn: fidelity": f"{figures.second_turn_fidelity:.1%}",
        "answers that end by themselves": f"{figures.ended:.1%}",
        "tokens per answer": f"{figures.mean_tokens:.1f}",
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the starter model, or measure one.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="build into this directory")
    action.add_argument("--measure", type=Path, metavar="DIR", help="print the figures of the model in this directory")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(table(measure(arguments.measure)))
        return
    recipe = Recipe(steps=arguments.steps, seed=arguments.seed)
    build(arguments.out, recipe)
    figures = measure(arguments.out)
    write_model_card(arguments.out, recipe, figures)
    print(table(figures))


if __name__ == "__main__":
    main()
