"""The bases of the lab: trained once, found again, named by what made them, whole or absent."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from pairloop.lab import bases
from pairloop.lab.tasks import TASKS
from pairloop.lab.tasks.base import BaseRecipe, Problem, Task, heldout_problem, is_heldout
from pairloop.lab.tasks.sort import Sort
from pairloop.starter import MODEL_DIR

TINY = replace(Sort.recipe, hidden=16, layers=1, heads=2, mlp=16, steps=4, batch_size=4)
BASE_SCORES = {
    "sort": (0.3, 0.95),
    "addition": (0.3, 0.93),
    "brackets": (0.3, 0.93),
    "countdown": (0.44, 0.8),
    "caesar": (0.65, 0.93),
    "reverse": (0.62, 0.9),
    "style": (0.48, 0.93),
}
"""Score at temperature 1, and the least that greedy decoding scores."""


class TinySort(Sort):
    recipe = TINY


class LongerSort(Sort):
    recipe = replace(TINY, steps=5)


@dataclass
class Watcher:
    """Counts the steps of pre-training and keeps the prompts that were drawn for it."""

    steps: int = 0
    loss: float = float("nan")

    def __call__(self, done: int, total: int, loss: float) -> None:
        assert done <= total
        self.steps, self.loss = self.steps + 1, loss


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_base_is_trained_once(tmp_path: Path) -> None:
    first, second = Watcher(), Watcher()
    folder = bases.base(TinySort(), tmp_path, first)
    before = weights(folder)
    assert bases.base(TinySort(), tmp_path, second) == folder
    assert (first.steps, second.steps) == (TINY.steps, 0)
    assert weights(folder) == before


def test_another_recipe_is_another_base(tmp_path: Path) -> None:
    watcher = Watcher()
    folders = {bases.base(task, tmp_path, watcher) for task in (TinySort(), LongerSort())}
    assert len(folders) == 2
    assert watcher.steps == TINY.steps + LongerSort.recipe.steps


def test_every_field_of_the_recipe_is_in_the_key() -> None:
    others = {"alphabet": "ab", "learning_rate": 0.5} | {
        name: value + 1 for name, value in asdict(TINY).items() if isinstance(value, int)
    }
    assert others.keys() == asdict(TINY).keys()
    task = TinySort()
    keys = {bases.key(task)}
    for name, value in others.items():
        changed: Any = {name: value}
        task.recipe = replace(TINY, **changed)
        keys.add(bases.key(task))
    assert len(keys) == 1 + len(others)


def test_the_seed_makes_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = weights(bases.base(TinySort(), tmp_path / "first"))
    torch.manual_seed(2)
    assert weights(bases.base(TinySort(), tmp_path / "second")) == first
    other = TinySort()
    other.recipe = replace(TINY, seed=1)
    assert weights(bases.base(other, tmp_path)) != first


def test_training_leaves_the_callers_dice_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    bases.train(TinySort(), TINY)
    assert torch.equal(torch.rand(1), expected)


def without_the_mark(folder: Path) -> None:
    (folder / bases.DONE_FILE).unlink()


def with_half_the_weights(folder: Path) -> None:
    whole = weights(folder)
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def with_one_bit_turned(folder: Path) -> None:
    whole = bytearray(weights(folder))
    whole[-1] ^= 1
    (folder / "model.safetensors").write_bytes(whole)


def with_a_torn_mark(folder: Path) -> None:
    (folder / bases.DONE_FILE).write_text('{"sha256": ')


@pytest.mark.parametrize("harm", [without_the_mark, with_half_the_weights, with_one_bit_turned, with_a_torn_mark])
def test_a_harmed_folder_counts_as_absent(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    folder = bases.base(TinySort(), tmp_path)
    before = weights(folder)
    harm(folder)
    watcher = Watcher()
    assert bases.base(TinySort(), tmp_path, watcher) == folder
    assert watcher.steps == TINY.steps
    assert weights(folder) == before


def test_a_training_cut_short_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, _total: int, _loss: float) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bases.base(TinySort(), tmp_path, stop)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert bases.base(TinySort(), tmp_path).is_dir()


def steps_of_a_process(cache_dir: str) -> tuple[int, bytes]:
    watcher = Watcher()
    folder = bases.base(TinySort(), Path(cache_dir), watcher)
    return watcher.steps, weights(folder)


@pytest.mark.slow
def test_two_processes_at_once_train_it_once(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        (steps, first), (more_steps, second) = pool.map(steps_of_a_process, [str(tmp_path)] * 2)
    assert sorted((steps, more_steps)) == [0, TINY.steps]
    assert first == second


class Recording(Sort):
    """Keeps what the corpus was made of."""

    recipe = TINY

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Problem] = []

    def demonstration(self, problem: Problem, rng: random.Random) -> str:
        self.shown.append(problem)
        return super().demonstration(problem, rng)


def test_the_corpus_holds_no_held_out_prompt() -> None:
    task = Recording()
    bases.train(task, replace(TINY, batch_size=64))
    assert len(task.shown) == TINY.steps * 64
    assert not any(is_heldout(problem.prompt) for problem in task.shown)


class Ragged(Sort):
    """Answers of one to six digits, each prompt of its own length."""

    recipe = TINY

    def problem(self, rng: random.Random) -> Problem:
        digits = "".join(rng.choices("0123456789", k=rng.randint(1, 6)))
        return Problem(digits + ">", "".join(sorted(digits)))

    def demonstration(self, problem: Problem, rng: random.Random) -> str:
        return problem.target[: rng.randint(1, 6)]


def test_labels_cover_answers_and_end_tokens_only() -> None:
    task = Ragged()
    input_ids_BT: Tensor
    for input_ids_BT, labels_BT in bases._batches(task, TINY):
        for ids, labels in zip(input_ids_BT.tolist(), labels_BT.tolist(), strict=True):
            answer = [label for label in labels if label != bases.IGNORED]
            start = labels.index(answer[0])
            prompt = ids[:start]
            assert prompt == task.tokens.encode_prompt("".join(task.tokens.decode(prompt[1:])))
            assert task.tokens.decode(prompt[1:]).endswith(">")
            assert answer == ids[start : start + len(answer)]
            assert answer.index(task.tokens.eos_id) == len(answer) - 1
            assert set(ids[start + len(answer) :]) <= {task.tokens.pad_id}


def test_the_base_of_support_is_the_starter(tmp_path: Path) -> None:
    support = TASKS["support"]
    assert bases.base(support, tmp_path) == MODEL_DIR
    assert not list(tmp_path.iterdir())
    model = bases.load(support, tmp_path)
    assert model.config.eos_token_id == support.tokens.eos_id
    assert model.config.pad_token_id == support.tokens.pad_id
    with pytest.raises(ValueError, match="shipped"):
        bases.key(support)


def test_a_loaded_base_is_the_one_trained(tmp_path: Path) -> None:
    model = bases.load(TinySort(), tmp_path)
    trained = bases.train(TinySort(), TINY)
    assert model.num_parameters() == trained.num_parameters()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def mean_score(task: Task, model: Any, problems: list[Problem], *, greedy: bool) -> float:
    prompts = [task.tokens.encode_prompt(problem.prompt) for problem in problems]
    width = max(map(len, prompts))
    ids_BT = torch.tensor([[task.tokens.pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    drawn = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=not greedy,
        max_new_tokens=task.recipe.max_tokens,
        eos_token_id=task.tokens.eos_id,
        pad_token_id=task.tokens.pad_id,
        **drawn,
    )
    with torch.inference_mode():
        found_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=settings)
    answers = [task.tokens.decode(ids) for ids in found_BT[:, width:].tolist()]
    return sum(task.score(problem, answer) for problem, answer in zip(problems, answers, strict=True)) / len(problems)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", BASE_SCORES)
def test_bases_are_sound_and_of_mixed_quality(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    assert isinstance(task.recipe, BaseRecipe)
    model = bases.load(task, tmp_path)
    rng = random.Random(11)
    problems = [heldout_problem(task, rng) for _ in range(600)]
    sampled, least_greedy = BASE_SCORES[name]
    torch.manual_seed(0)
    assert mean_score(task, model, problems, greedy=False) == pytest.approx(sampled, abs=0.07)
    assert mean_score(task, model, problems, greedy=True) >= least_greedy
