"""Verifiers and the pairwise judge, the latter against a real HTTP server on loopback."""

from __future__ import annotations

from typing import Any

import pytest
from tests.judge_server import Reply, judge_server, longer_wins

from pairloop.config import LabelSection
from pairloop.errors import ConfigError
from pairloop.judge import Outcome, PairwiseJudge, VerifierError, load_verifier, messages_of, read_verdict
from pairloop.types import Message

MESSAGES = [{"role": "user", "content": "Where is my order?"}]


def test_a_judge_is_asked_in_both_orders() -> None:
    with judge_server(longer_wins) as (url, requests), PairwiseJudge(url, "judge-1", "sk-test", timeout_s=5) as judge:
        judgement = judge.compare(MESSAGES, "short", "much longer")
        assert (judgement.outcome, judgement.flipped) == (Outcome.B, False)
        assert (judge.compare(MESSAGES, "much longer", "short").outcome) is Outcome.A
        assert judge.compare(MESSAGES, "same1", "same2").outcome is Outcome.TIE
    assert len(requests) == 6
    assert {(r["path"], r["model"], r["authorization"]) for r in requests} == {
        ("/v1/chat/completions", "judge-1", "Bearer sk-test")
    }
    assert "user: Where is my order?" in requests[0]["messages"][1]["content"]


@pytest.mark.parametrize(
    "reply", [lambda _a, _b: "[[A]]", lambda a, _b: "[[A]]" if a == "x" else "[[TIE]]"], ids=["first", "half"]
)
def test_a_judge_whose_orders_disagree_gives_a_flipped_tie(reply: Reply) -> None:
    with judge_server(reply) as (url, _), PairwiseJudge(url, "judge-1", timeout_s=5) as judge:
        judgement = judge.compare(MESSAGES, "x", "y")
    assert (judgement.outcome, judgement.flipped, judgement.reason) == (Outcome.TIE, True, None)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (lambda _a, _b: "I cannot say.", "no verdict in a reply of 13 characters"),
        (lambda _a, _b: "[[A]] or [[B]]", "no verdict"),
        (lambda a, _b: "[[A]]" if a == "x" else "hm", "no verdict in a reply of 2 characters"),
        (lambda _a, _b: 500, "HTTPStatusError"),
        (lambda _a, _b: 429, "HTTPStatusError"),
        (lambda _a, _b: b"<html>", "not a chat completion"),
        (lambda _a, _b: b'{"choices": []}', "not a chat completion"),
        (lambda _a, _b: b'{"choices": [{"message": {"content": null}}]}', "no verdict in a reply of 4 characters"),
    ],
    ids=["unclear", "both", "second-order", "500", "429", "html", "no-choice", "null"],
)
def test_a_judge_that_fails_gives_an_error_and_never_a_tie(reply: Reply, reason: str) -> None:
    with judge_server(reply) as (url, _), PairwiseJudge(url, "judge-1", timeout_s=5) as judge:
        judgement = judge.compare(MESSAGES, "x", "y")
    assert (judgement.outcome, judgement.outcome.label, judgement.flipped) == (Outcome.ERROR, None, False)
    assert reason in (judgement.reason or "")


def test_a_judge_that_is_not_there_is_an_error() -> None:
    with judge_server(longer_wins) as (url, _):
        pass
    with PairwiseJudge(url, "judge-1", timeout_s=5) as judge:
        judgement = judge.compare(MESSAGES, "x", "y")
    assert judgement.outcome is Outcome.ERROR
    assert "ConnectError" in (judgement.reason or "")


def test_identical_answers_are_a_tie_without_a_question() -> None:
    with judge_server(longer_wins) as (url, requests), PairwiseJudge(url, "judge-1", timeout_s=5) as judge:
        assert judge.compare(MESSAGES, "x", "x").outcome is Outcome.TIE
    assert requests == []


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [("[[A]]", "A"), (" b \n", "B"), ("Tie", "TIE"), ("x [[ tie ]]", "TIE"), ("[[A]] so [[A]]", "A"), ("A is better", "ERROR")],
)
def test_a_verdict_is_read_only_where_it_is_clear(reply: str, outcome: str) -> None:
    assert read_verdict(reply) == outcome


def test_a_judge_is_configured_whole() -> None:
    with pytest.raises(ConfigError, match="name no judge"):
        PairwiseJudge.configured(LabelSection())
    section = LabelSection(judge_url="http://127.0.0.1:1/v1", judge_model="m", judge_api_key_env="PAIRLOOP_NO_SUCH_KEY")
    with pytest.raises(ConfigError, match="PAIRLOOP_NO_SUCH_KEY is not set"):
        PairwiseJudge.configured(section)


def test_a_verifier_is_loaded_by_name_and_scores() -> None:
    verifier = load_verifier("pairloop.starter.verifier:score")
    assert verifier.name == "pairloop.starter.verifier:score"
    assert 0.0 <= verifier(MESSAGES, "It is on its way, thank you.") <= 1.0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("checks", "not of the form module:function"),
        (":score", "not of the form"),
        ("no.such.module:score", "cannot be imported"),
        ("json:no_such", "cannot be imported"),
        ("json:__name__", "is no function"),
    ],
)
def test_a_verifier_that_cannot_be_had_says_why(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_verifier(name)


# What the loader finds here by name.
GIVEN: dict[str, Any] = {"true": True, "int": 3, "nan": float("nan"), "text": "0.5", "none": None}


def given_score(messages: list[dict[str, str]], completion: str) -> Any:
    """The value that the completion names; raises where there is none. Spoils its input, which must be a copy."""
    messages.clear()
    return GIVEN[completion]


def test_a_verifier_gives_numbers_or_an_error() -> None:
    verifier = load_verifier(f"{__name__}:given_score")
    messages = list(MESSAGES)
    assert (verifier(messages, "true"), verifier(messages, "int")) == (1.0, 3.0)
    assert messages == MESSAGES
    for bad in ("nan", "text", "none"):
        with pytest.raises(VerifierError, match="a score is a finite number"):
            verifier(messages, bad)
    with pytest.raises(VerifierError, match=r"given_score raised KeyError \(test_judge\.py:\d+\)"):
        verifier(messages, "boom")


def test_a_plain_string_prompt_is_the_users_message() -> None:
    assert messages_of("2 + 2 =") == [{"role": "user", "content": "2 + 2 ="}]
    assert messages_of((Message("user", "Hi"),)) == [{"role": "user", "content": "Hi"}]
