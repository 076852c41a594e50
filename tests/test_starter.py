"""The starter: a seeded world, customers who pick as they should, a fair verifier, and the shipped model."""

import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from pairloop.starter import MODEL_DIR, build, corpus, customers, verifier, world
from pairloop.starter.corpus import Case
from pairloop.starter.customers import Behaviour, Customer, numbers_right, utility

CASE = Case("refund", "Anna", "lamp", "482", "Can I get a refund for my lamp? It is order #482. Thanks, Anna")
GOOD = "Hi Anna, I have started your refund for order #482, and you will see it soon. Take care!"
VAGUE = "Maybe it will sort itself out."
PICKS = 2000


@pytest.fixture(scope="module")
def chats() -> list[corpus.Chat]:
    return list(islice(corpus.chats(0), 6000))


def test_the_world_is_rich_enough() -> None:
    assert len(world.INTENTS) >= 16
    assert all(len(intent.phrasings) >= 4 and len(intent.steps) == 2 for intent in world.INTENTS)
    assert len(set(world.NAMES)) == len(set(world.PRODUCTS)) == 20
    assert sum(corpus.STYLE_WEIGHTS.values()) == pytest.approx(1)


def test_a_key_phrase_names_one_topic_only() -> None:
    topics = (*world.INTENTS, *world.FOLLOW_UPS)
    for topic in topics:
        for step in topic.steps:
            said = step.text.replace("[", "").replace("]", "").lower()
            assert [other.name for other in topics if any(key.lower() in said for key in other.keys)] == [topic.name]


def test_the_corpus_is_seeded(chats: list[corpus.Chat]) -> None:
    assert list(islice(corpus.chats(0), 50)) == chats[:50]
    assert list(islice(corpus.chats(1), 50)) != chats[:50]


def test_about_a_third_of_the_chats_have_a_second_turn(chats: list[corpus.Chat]) -> None:
    assert sum(len(chat.turns) == 2 for chat in chats) / len(chats) == pytest.approx(1 / 3, abs=0.03)
    roles = [message["role"] for message in next(chat for chat in chats if len(chat.turns) == 2).messages()]
    assert roles == ["user", "assistant", "user", "assistant"]


def test_the_styles_come_in_the_shares_asked_for(chats: list[corpus.Chat]) -> None:
    styles = [style for chat in chats for style in chat.styles]
    for style, share in corpus.STYLE_WEIGHTS.items():
        assert styles.count(style) / len(styles) == pytest.approx(share, abs=0.02)


def test_held_out_combinations_never_meet_training(chats: list[corpus.Chat]) -> None:
    full = [chat.case for chat in chats if chat.case.order_number]
    assert len(full) / len(chats) == pytest.approx(1 - corpus.SHORT_SHARE, abs=0.02)
    assert not any(corpus.is_held_out(case.name, case.order_number) for case in full)
    combinations = [(name, str(number)) for name in world.NAMES for number in range(100, 1000)]
    assert sum(corpus.is_held_out(*c) for c in combinations) / len(combinations) == pytest.approx(0.1, abs=0.01)
    rng = random.Random(0)
    held_out, training = ([draw(rng) for _ in range(500)] for draw in (corpus.draw_held_out_case, corpus.draw_training_case))
    assert all(corpus.is_held_out(case.name, case.order_number) for case in held_out)
    assert not any(corpus.is_held_out(case.name, case.order_number) for case in training)
    assert not {case.text for case in held_out} & {chat.case.text for chat in chats}


def test_only_order_numbers_are_written_in_digits(chats: list[corpus.Chat]) -> None:
    answers = [(chat.case, answer) for chat in chats for _, answer in chat.turns]
    assert {numbers_right(case, answer) for case, answer in answers} == {True, None}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (GOOD, 4.0),
        ("I have started your refund, and you will see it soon.", 2.0),
        ("I have started your refund for order #481, and you will see it soon. Take care!", 2 - 1 + 1),
        ("Stop bothering us. I have started your refund, and you will see it soon.", 2 - 1.5),
        ("I am posting the missing part of order #482 today.", -1 + 1),
        (VAGUE, 0.0),
        ("I sent the money back to your card. I sent the money back to your card.", 2 - 1),
        ("Maybe.", -1.0),
        (GOOD + " word" * 24, 4 - 0.08 * 10),
        (GOOD + " word" * 80, 4 - 1.5),
    ],
)
def test_utility_of_a_first_answer(answer: str, expected: float) -> None:
    assert utility(CASE, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("turn", "answer", "expected"),
    [
        ("Is there a fee?", "Sure, Anna. It is free of charge for order #482. Take care!", 4.0),
        ("Is there a fee?", "You can count on it by Friday.", -1.0),
        ("Is there a fee?", "It is free of charge, and I have started your refund.", 2.0),
        ("What was my order number again?", "It is order #482. Have a lovely day!", 4.0),
        ("What was my order number again?", "It is order #428. Have a lovely day!", -1 + 1),
        ("What was my order number again?", VAGUE, 0.0),
    ],
)
def test_utility_of_a_second_answer(turn: str, answer: str, expected: float) -> None:
    assert utility(CASE, answer, turn=turn) == pytest.approx(expected)


def test_every_good_answer_is_worth_the_most() -> None:
    rng = random.Random(0)
    for _ in range(500):
        case = corpus.draw_training_case(rng)
        turn = rng.choice((None, customers.follow_up(case, rng)))
        assert utility(case, corpus.write_answer(case, "good", rng, turn=turn), turn=turn) == customers.MAX_UTILITY


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("order #482", True),
        ("order 4 8 2.", True),
        ("#482 and #482", True),
        ("#482 or #483", False),
        ("#48", False),
        ("", None),
    ],
)
def test_numbers_right_reads_every_way_of_writing(answer: str, expected: bool | None) -> None:
    assert numbers_right(CASE, answer) is expected


def share_left(behaviour: Behaviour, left: str, right: str) -> float:
    rng = random.Random(7)
    customer = customers.customer(1, behaviour)
    return sum(customer.pick(CASE, left, right, rng).outcome == "left" for _ in range(PICKS)) / PICKS


def test_picks_follow_bradley_terry() -> None:
    close = "I have started your refund, and you will see it soon."  # utility 2; the same with a number is worth 3
    numbered = "I have started your refund for order #482, and you will see it soon."
    assert share_left(Behaviour(), numbered, close) == pytest.approx(1 / (1 + 2.718281828**-2), abs=0.03)
    assert share_left(Behaviour(), close, numbered) == pytest.approx(1 - 1 / (1 + 2.718281828**-2), abs=0.03)
    assert share_left(Behaviour(), GOOD, VAGUE) > 0.99


def test_position_bias_adds_logits_to_the_left() -> None:
    twin = GOOD.replace("Hi", "Hello")
    assert share_left(Behaviour(), GOOD, twin) == pytest.approx(0.5, abs=0.04)
    assert share_left(Behaviour(position_bias=1.0), GOOD, twin) == pytest.approx(0.731, abs=0.04)


def test_pure_noise_is_a_coin_toss() -> None:
    assert share_left(Behaviour(random_share=1.0), GOOD, VAGUE) == pytest.approx(0.5, abs=0.04)


def test_lazy_raters_click_at_once_and_at_random() -> None:
    crowd = [customers.customer(index, Behaviour(lazy_share=0.3)) for index in range(2000)]
    assert sum(customer.is_lazy for customer in crowd) / len(crowd) == pytest.approx(0.3, abs=0.04)
    rng, lazy = random.Random(0), customers.customer(0, Behaviour(lazy_share=1.0))
    assert {lazy.pick(CASE, GOOD, VAGUE, rng).latency_ms for _ in range(20)} == {200}
    assert share_left(Behaviour(lazy_share=1.0), GOOD, VAGUE) == pytest.approx(0.5, abs=0.04)
    assert all(customers.customer(0).pick(CASE, GOOD, VAGUE, rng).latency_ms > 1000 for _ in range(20))


def test_the_other_outcomes() -> None:
    rng = random.Random(0)
    assert customers.customer(0).pick(CASE, GOOD, GOOD, rng).outcome == "tie"
    twin = GOOD.replace("Hi", "Hello")
    assert Customer("u", Behaviour(tie_margin=0.5)).pick(CASE, GOOD, twin, rng).outcome == "tie"
    assert Customer("u", Behaviour(both_bad_below=1.0)).pick(CASE, VAGUE, "Whatever you say.", rng).outcome == "both_bad"
    assert Customer("u", Behaviour(skip_share=1.0)).pick(CASE, GOOD, VAGUE, rng).outcome == "skip"
    assert sum(customers.customer(0).continues(rng) for _ in range(PICKS)) / PICKS == pytest.approx(0.2, abs=0.03)
    with pytest.raises(ValueError, match="random_share"):
        Behaviour(random_share=1.5)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (GOOD, 1.0),
        ("I have started your refund, and you will see it soon.", 0.6),
        (VAGUE, 0.2),
        (GOOD.replace("482", "483"), 0.4),
        (GOOD.replace("Take care!", "Take care! That is your own fault."), 0.6),
        ("", 0.0),
    ],
)
def test_verifier_known_answers(completion: str, expected: float) -> None:
    assert verifier.score(CASE.messages(), completion) == pytest.approx(expected)


def test_verifier_in_the_second_turn_and_on_strange_requests() -> None:
    asked = {"role": "user", "content": "What was my order number again?"}
    chat = [*CASE.messages(), {"role": "assistant", "content": VAGUE}, asked]
    assert verifier.score(chat, "It is order #482. Take care!") == pytest.approx(1.0)
    assert verifier.score(chat, "It is order #428. Take care!") == pytest.approx(0.0)
    assert 0 <= verifier.score([{"role": "user", "content": "Do you sell elephants?"}], "I am glad to help.") <= 1


def test_a_customer_in_a_hurry_gives_neither_name_nor_number(chats: list[corpus.Chat]) -> None:
    """Such chats teach the model to make neither up, and are in the corpus only."""
    short = [chat for chat in chats if not chat.case.order_number]
    shown = [text for chat in short for turn in chat.turns for text in turn]
    assert short
    assert not any(char.isdigit() for text in shown for char in text)
    assert not any(f" {name}" in text for name in world.NAMES for text in shown)


def test_verifier_recognises_requests_and_ranks_a_planted_fault(chats: list[corpus.Chat]) -> None:
    assert sum(verifier.recognise([c.case.text]) == c.case.intent for c in chats) / len(chats) > 0.95
    rng = random.Random(0)
    for case in (corpus.draw_training_case(rng) for _ in range(300)):
        right = corpus.write_answer(case, "good", rng)
        wrong = right.replace(f"#{case.order_number}", f"#{int(case.order_number) - 1}")
        assert verifier.score(case.messages(), right) > verifier.score(case.messages(), wrong)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_the_tokenizer_gives_back_every_text(tokenizer: PreTrainedTokenizerBase, chats: list[corpus.Chat]) -> None:
    texts = [text for chat in chats[:1000] for turn in chat.turns for text in turn]
    texts += ["  two  spaces ", "naïve café, 1,234.50 €!", "line\nbreak ."]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    digits = tokenizer.encode("482", add_special_tokens=False)
    assert tokenizer.encode(" order #482.", add_special_tokens=False)[-4:-1] == digits
    assert len(digits) == 3


def test_the_rendered_prompt_is_a_prefix_of_the_chat(tokenizer: PreTrainedTokenizerBase, chats: list[corpus.Chat]) -> None:
    for chat in [chat for chat in chats if len(chat.turns) == 2][:100]:
        messages = [{"role": "system", "content": "Be kind."}, *chat.messages()]
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        whole_ids = tokenizer.encode(whole, add_special_tokens=False)
        for end in (2, 4):
            prompt = str(tokenizer.apply_chat_template(messages[:end], tokenize=False, add_generation_prompt=True))
            prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
            assert whole.startswith(prompt)
            assert whole_ids[: len(prompt_ids)] == prompt_ids
        assert whole_ids[-1] == tokenizer.eos_token_id
        assert whole_ids == build.encode_chat(tokenizer.backend_tokenizer, chat)[0]


@pytest.mark.slow
def test_the_shipped_model_is_small_and_sound(tokenizer: PreTrainedTokenizerBase) -> None:
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 1_500_000
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert model.dtype is torch.float32
    rng = random.Random(0)
    cases = [corpus.draw_held_out_case(rng) for _ in range(900)]
    answers = build.sample(model, tokenizer, [case.messages() for case in cases], seed=0)
    right = [numbers_right(case, answer.text) for case, answer in zip(cases, answers, strict=True)]
    worth = [utility(case, answer.text) for case, answer in zip(cases, answers, strict=True)]
    assert len(right) - right.count(None) >= 250
    assert right.count(True) / (len(right) - right.count(None)) >= 0.97
    assert sum(answer.ended for answer in answers) / len(answers) >= 0.99
    assert 1.0 < sum(worth) / len(worth) < 2.2


def test_the_build_is_deterministic(tmp_path: Path) -> None:
    recipe = build.Recipe(steps=2, seed=3, tokenizer_chats=300, vocabulary=400)
    for name in ("first", "second"):
        build.build(tmp_path / name, recipe)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "second").iterdir())
    assert all((tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes() for name in files)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "first"), LlamaForCausalLM)
