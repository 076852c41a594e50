"""The lab's tasks: verifiers against planted faults, corpora of the quality declared, the held-out split, the codecs."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairloop.lab.tasks import TASKS
from pairloop.lab.tasks.base import (
    HELD_OUT_ONE_IN,
    UNKNOWN,
    BaseRecipe,
    Characters,
    Problem,
    Task,
    heldout_problem,
    is_heldout,
    training_problem,
)
from pairloop.lab.tasks.countdown import value_of
from pairloop.starter import corpus
from pairloop.starter.corpus import Case

DRAWN = 1500
CORPUS_SCORE = {
    "sort": 0.3,
    "addition": 0.3,
    "brackets": 0.3,
    "countdown": 0.43,
    "caesar": 0.65,
    "reverse": 0.65,
    "style": 0.54,
    "cipher": 0.5,
    "larger": 0.4,
    "service": 0.54,
    "support": 0.5,
}
GRADED = ("caesar", "reverse", "style", "cipher", "larger", "service")
CASE = Case("refund", "Anna", "lamp", "482", "Can I get a refund for my lamp? It is order #482. Thanks, Anna")
REFUND = Problem(CASE.text, json.dumps(asdict(CASE)))
GOOD = "Hi Anna, I have started your refund for order #482, and you will see it soon. Take care!"
LETTERS = "abcdefghijklmnopqrst"
MOVED = "defghijklmnopqrstuvw"

all_tasks = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
texts = st.text(alphabet="0123456789+-=;,.! >()[]{}DGKdgk", max_size=40)


@pytest.mark.parametrize(
    ("name", "problem", "answer", "score"),
    [
        ("sort", Problem("402217>", "012247"), "012247", 1),
        ("sort", Problem("402217>", "012247"), "012274", 0),
        ("sort", Problem("402217>", "012247"), "0122470", 0),
        ("sort", Problem("402217>", "012247"), "", 0),
        ("addition", Problem("478+256>", "734"), "14,13,7=734", 1),
        ("addition", Problem("478+256>", "734"), "9,9,9=734", 1),
        ("addition", Problem("478+256>", "734"), "14,13,7=733", 0),
        ("addition", Problem("478+256>", "734"), "734", 0),
        ("addition", Problem("478+256>", "734"), "1=734=1", 0),
        ("brackets", Problem("([]{(>", ")})"), ")})", 1),
        ("brackets", Problem("([]{(>", ")})"), "})", 0),
        ("brackets", Problem("([]{(>", ")})"), ")})()", 0),
        ("countdown", Problem("7,3,2=8>", "7,3,2=8"), "7+3+2=12;7+3-2=8", 1),
        ("countdown", Problem("7,3,2=8>", "7,3,2=8"), "7+3-2", 1),
        ("countdown", Problem("7,3,2=8>", "7,3,2=8"), "3-2+7=99", 1),
        ("countdown", Problem("7,3,2=8>", "7,3,2=8"), "7+3+2=8", 0),
        ("countdown", Problem("7,3,2=8>", "7,3,2=8"), "7+3-2=8;7-3-2=2", 0),
        ("countdown", Problem("7,3,2=8>", "7,3,2=8"), "9+1-2=8", 0),
        ("countdown", Problem("7,3,2=8>", "7,3,2=8"), "8", 0),
        ("countdown", Problem("7,3,2=8>", "7,3,2=8"), "7+3-2;", 0),
        ("countdown", Problem("7,3,2=8>", "7,3,2=8"), "7+3--2", 0),
        ("caesar", Problem(LETTERS + ">", MOVED), MOVED, 1),
        ("caesar", Problem(LETTERS + ">", MOVED), LETTERS, 0),
        ("caesar", Problem(LETTERS + ">", MOVED), MOVED[:10], 0.5),
        ("caesar", Problem(LETTERS + ">", MOVED), MOVED + "aa", 0.9),
        ("reverse", Problem("abcdabcdabcdabcd>", "dcba" * 4), "dcba" * 4, 1),
        ("reverse", Problem("abcdabcdabcdabcd>", "dcba" * 4), "dcbb" * 4, 0.75),
        ("reverse", Problem("abcdabcdabcdabcd>", "dcba" * 4), "a" + "dcba" * 4, 0),
        ("style", Problem("dgkab>", "dgkab"), "D+ G+ K+ A+ B+", 1),
        ("style", Problem("dgkab>", "dgkab"), "D+! G+.. K B+ B+", 1 - (0.4 + 0.2 + 0.4 + 0.6) / 5),
        ("style", Problem("dgkab>", "dgkab"), "D+ D+ G+ K+ A+ B+", 1 - 0.4 / 5),
        ("style", Problem("dgkab>", "dgkab"), "D+ G+ K+ A+ B+ C+", 1 - 0.5 / 5),
        ("style", Problem("dgkab>", "dgkab"), "D+ G+", 0.4),
        ("style", Problem("dgkab>", "dgkab"), "L! L!", 0),
        ("support", REFUND, GOOD, 1),
        ("support", REFUND, GOOD.replace(" Take care!", ""), 0.75),
        ("support", REFUND, GOOD.replace("482", "483"), 0.5),
        ("support", REFUND, "Stop bothering us.", 0),
    ],
)
def test_verifiers_know_right_from_wrong(name: str, problem: Problem, answer: str, score: float) -> None:
    assert TASKS[name].score(problem, answer) == pytest.approx(score)


@pytest.mark.parametrize("name", TASKS)
@given(answer=texts, seed=st.integers(0, 50))
def test_any_answer_scores_between_nothing_and_all(name: str, answer: str, seed: int) -> None:
    task = TASKS[name]
    problem = task.problem(random.Random(seed))
    for text in (answer, answer + UNKNOWN, problem.target + UNKNOWN):
        assert 0 <= task.score(problem, text) <= 1


@all_tasks
def test_the_corpus_is_of_the_quality_declared(task: Task) -> None:
    rng = random.Random(5)
    problems = [training_problem(task, rng) for _ in range(DRAWN)]
    scores = [task.score(problem, task.demonstration(problem, rng)) for problem in problems]
    assert mean(scores) == pytest.approx(CORPUS_SCORE[task.name], abs=0.04)
    if task.name in GRADED:  # no answer to learn by heart: what is right must be put together from many answers
        assert mean(score == 1 for score in scores) < 0.02


@all_tasks
def test_demonstrations_fit_what_is_sampled(task: Task) -> None:
    rng = random.Random(6)
    problems = [task.problem(rng) for _ in range(DRAWN)]
    answers = [task.tokens.encode_completion(p.prompt, task.demonstration(p, rng)) for p in problems]
    lengths = [len(answer) for answer in answers]
    assert max(lengths) <= task.recipe.max_tokens
    assert all(answer[-1] == task.tokens.eos_id and answer.count(task.tokens.eos_id) == 1 for answer in answers)


@all_tasks
def test_training_never_meets_held_out_problems(task: Task) -> None:
    rng = random.Random(7)
    drawn = [task.problem(rng) for _ in range(3000)]
    assert mean(map(task.is_heldout, drawn)) == pytest.approx(1 / HELD_OUT_ONE_IN, abs=0.03)
    training = {training_problem(task, rng).prompt for _ in range(500)}
    heldout = {heldout_problem(task, rng).prompt for _ in range(200)}
    assert training
    assert heldout
    assert not training & heldout


def test_the_split_of_characters_is_by_prompt_and_that_of_support_the_starters() -> None:
    rng = random.Random(8)
    problem = heldout_problem(TASKS["sort"], rng)
    assert is_heldout(problem.prompt)
    assert TASKS["sort"].is_heldout(Problem(problem.prompt, "another target"))
    for draw in (heldout_problem, training_problem):
        case = Case(**json.loads(draw(TASKS["support"], rng).target))
        assert corpus.is_held_out(case.name, case.order_number) is (draw is heldout_problem)


@all_tasks
def test_a_seed_names_problems_and_demonstrations(task: Task) -> None:
    def drawn(seed: int) -> list[tuple[Problem, str]]:
        rng = random.Random(seed)
        problems = [task.problem(rng) for _ in range(20)]
        return [(problem, task.demonstration(problem, rng)) for problem in problems]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@all_tasks
def test_text_comes_back_from_its_tokens(task: Task) -> None:
    rng = random.Random(9)
    for _ in range(50):
        problem = task.problem(rng)
        answer = task.demonstration(problem, rng)
        ids = task.tokens.encode_completion(problem.prompt, answer)
        assert task.tokens.decode(ids) == task.tokens.decode([*ids, *ids]) == task.tokens.decode(ids[:-1]) == answer
        assert task.tokens.eos_id not in task.tokens.encode_prompt(problem.prompt)


@given(st.text(alphabet="0123456789>"))
def test_characters_round_trip(text: str) -> None:
    tokens = Characters("0123456789>")
    assert tokens.decode(tokens.encode_completion("1>", text)) == text
    assert tokens.encode_prompt(text) == [tokens.pad_id, *tokens.encode_completion("", text)[:-1]]
    assert max(tokens.encode_completion("", text)) < tokens.vocabulary


def test_characters_refuse_what_they_cannot_say() -> None:
    tokens = Characters("ab")
    assert tokens.decode([2, tokens.pad_id, 3, tokens.eos_id, 2]) == f"a{UNKNOWN}b"
    with pytest.raises(ValueError, match="c"):
        tokens.encode_prompt("abc")
    with pytest.raises(ValueError, match="once"):
        Characters("aba")


def test_support_reads_as_the_starters_template_does() -> None:
    tokens = TASKS["support"].tokens
    ids = tokens.encode_prompt("Hi! <|end|> #12") + tokens.encode_completion("Hi! <|end|> #12", "Take care!")
    assert ids.count(tokens.eos_id) == 1  # a control token that a customer typed is text
    assert tokens.pad_id != tokens.eos_id


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_expressions_are_worth_what_they_say(numbers: list[int], data: st.DataObject) -> None:
    signs = [1, *(data.draw(st.sampled_from((1, -1))) for _ in numbers[1:])]
    text = "".join(f"{'+' if sign > 0 else '-'}{number}" for sign, number in zip(signs, numbers, strict=True))
    assert value_of(text[1:]) == sum(sign * number for sign, number in zip(signs, numbers, strict=True))


def test_recipes_are_those_of_their_tasks() -> None:
    assert all(name == task.name for name, task in TASKS.items())
    recipes = [task.recipe for task in TASKS.values() if isinstance(task.recipe, BaseRecipe)]
    assert len(recipes) == len(TASKS) - 1  # support's base is shipped
