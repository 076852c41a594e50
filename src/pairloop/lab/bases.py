"""The base models of the lab's tasks: a tiny Llama per task, trained once from nothing, seeded and cached.

A base is a plain Hugging Face folder named by a hash of the task's recipe and source and of the training code: change any
of them and another base is trained. A folder is whole or absent; two processes that ask at once train it once.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from pairloop.lab.tasks import base as task_base
from pairloop.lab.tasks.base import BaseRecipe, ShippedBase, Task, training_problem
from pairloop.learner.files import exclusive, whole_folder
from pairloop.policy.scoring import load_causal_lm

Report = Callable[[int, int, float], None]
"""Called after each step of pre-training with (steps done, steps in all, loss in nats per token)."""

IGNORED = -100
POSITIONS = 256
EMBEDDING_RATE = 3e-3
WARM_UP_STEPS = 20
FINAL_RATE_SHARE = 0.05
WEIGHTS_FILE, DONE_FILE = "model.safetensors", "lab.json"


def silent(_done: int, _total: int, _loss: float) -> None:
    """The report that nobody reads."""


def base(task: Task, cache_dir: Path, report: Report = silent) -> Path:
    """The folder of the task's base model, trained and cached under `cache_dir` where it is not there yet."""
    if isinstance(task.recipe, ShippedBase):
        return task.recipe.folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / f"{task.name}-{key(task)}"
    with exclusive(cache_dir / f"{folder.name}.lock"):
        if not _is_whole(folder):
            model = train(task, task.recipe, report)
            with whole_folder(folder) as temporary:
                transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
                model.save_pretrained(temporary)
                content = {"recipe": asdict(task.recipe), "sha256": _sha256(temporary / WEIGHTS_FILE)}
                (temporary / DONE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def load(task: Task, cache_dir: Path, report: Report = silent) -> LlamaForCausalLM:
    """The task's base model, in float32 and evaluation mode."""
    model = load_causal_lm(base(task, cache_dir, report), trainable=True)
    assert isinstance(model, LlamaForCausalLM)
    return model


def key(task: Task) -> str:
    """Sixteen hex digits that change with the recipe, the task's source, what tasks share, and the training code here."""
    recipe = task.recipe
    if not isinstance(recipe, BaseRecipe):
        raise ValueError(f"the base of {task.name} is shipped, not trained here")
    # A task may vary another one: the sources of all its classes count.
    of_classes = [inspect.getsource(sys.modules[kind.__module__]) for kind in type(task).__mro__ if kind is not object]
    functions = (train, new_model, _batches, _optimizers, _rate_share)
    sources = [inspect.getsource(source) for source in (task_base, *functions)]
    return hashlib.sha256(json.dumps([asdict(recipe), *of_classes, *sources]).encode()).hexdigest()[:16]


def train(task: Task, recipe: BaseRecipe, report: Report = silent) -> LlamaForCausalLM:
    """Next-token training on the task's demonstrations, with the loss on the answers and their end token only."""
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = new_model(task, recipe)
        optimizers = _optimizers(model, recipe)
        for step, (input_ids_BT, labels_BT) in enumerate(_batches(task, recipe), start=1):
            # No attention mask: padding is on the right, where no answer token of a causal model sees it.
            logits_BTV = model(input_ids=input_ids_BT).logits
            loss = torch.nn.functional.cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED
            )
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer, schedule in optimizers:
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            report(step, recipe.steps, loss.item())
    model.eval()  # type: ignore[no-untyped-call]
    return model


def new_model(task: Task, recipe: BaseRecipe) -> LlamaForCausalLM:
    """A random Llama of the recipe's size with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(recipe.alphabet) + task_base.FIRST_CHARACTER_ID,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=recipe.mlp,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=task.tokens.eos_id,
        pad_token_id=task.tokens.pad_id,
    )
    return LlamaForCausalLM(config)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for models too small to share: two of them wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _is_whole(folder: Path) -> bool:
    """Whether the folder was finished and its weights are still those that were written."""
    try:
        done = json.loads((folder / DONE_FILE).read_text(encoding="utf-8"))
        return bool(done["sha256"] == _sha256(folder / WEIGHTS_FILE))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _batches(task: Task, recipe: BaseRecipe) -> Iterator[tuple[Tensor, Tensor]]:
    """(input_ids [B, T], labels [B, T]) of each step: fresh training problems, one demonstration each, padded on the right."""
    rng = random.Random(f"corpus-{task.name}-{recipe.seed}")
    tokens = task.tokens
    for _ in range(recipe.steps):
        rows = []
        for _ in range(recipe.batch_size):
            problem = training_problem(task, rng)
            answer = task.demonstration(problem, rng)
            rows.append((tokens.encode_prompt(problem.prompt), tokens.encode_completion(problem.prompt, answer)))
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        padding = [width - len(prompt) - len(answer) for prompt, answer in rows]
        yield (
            torch.tensor([p + a + [tokens.pad_id] * n for (p, a), n in zip(rows, padding, strict=True)]),
            torch.tensor([[IGNORED] * len(p) + a + [IGNORED] * n for (p, a), n in zip(rows, padding, strict=True)]),
        )


def _optimizers(model: LlamaForCausalLM, recipe: BaseRecipe) -> list[tuple[Optimizer, LambdaLR]]:
    """Muon on the matrices, which learns to copy in half of AdamW's steps here, and AdamW on the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.learning_rate, weight_decay=0.0),
        torch.optim.AdamW(others, lr=EMBEDDING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    return [(optimizer, LambdaLR(optimizer, lambda step: _rate_share(step, recipe.steps))) for optimizer in optimizers]


def _rate_share(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to the final share."""
    progress = min(1.0, max(0, step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS))
    cosine = FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * (1 + math.cos(math.pi * progress)) / 2
    return min(1.0, (step + 1) / WARM_UP_STEPS) * cosine
