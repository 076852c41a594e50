"""What is taken out of texts before they are stored: by the patterns, and by everything that writes a text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.loop_rig import open_rig
from tests.loop_rig import settings as loop_settings
from tests.server import POLICY, RunningServer, chat_body, fake_config
from tests.test_real_data import DATA

from pairloop.config import Config, PrivacySection, parse_config
from pairloop.errors import ConfigError, SystemFailure
from pairloop.loop import pairs
from pairloop.redaction import Redactor, hook_of, presidio_hook
from pairloop.redaction.hooks import Hook
from pairloop.store import feedback, groups, new_group_id, new_id
from pairloop.types import Completion, Message, ToolCall

PATTERNS = cast(Hook, hook_of(PrivacySection()))

WORDS = ["please", "my order", "is late,", "thanks.", "(see above)", "and", "it's", "number 3", "for 20.50", "on 2024-05-17"]


def _luhn(digits: str) -> str:
    """``digits`` with the check digit that makes it a card's number."""
    total = sum(d * 2 - 9 * (d > 4) if i % 2 == 0 else d for i, d in enumerate(map(int, reversed(digits))))
    return f"{digits}{-total % 10}"


def _in_fours(number: str, separator: str) -> str:
    return separator.join(number[i : i + 4] for i in range(0, len(number), 4))


def _iban(country: str, bban: str) -> str:
    number = int("".join(str(int(c, 36)) for c in f"{bban}{country}00"))
    return f"{country}{98 - number % 97:02d}{bban}"


def _digits(n: int) -> st.SearchStrategy[str]:
    return st.text("0123456789", min_size=n, max_size=n)


_names = st.from_regex(r"[a-z0-9]([a-z0-9._+-]{0,12}[a-z0-9])?", fullmatch=True)
_separator = st.sampled_from(["", " ", "-"])
_phones = st.one_of(
    st.builds("+{} {} {}".format, st.sampled_from(["49", "44", "1", "351"]), _digits(3), _digits(7)),
    st.builds("({}{}) {}{}-{}".format, st.sampled_from("2345"), _digits(2), st.sampled_from("2345"), _digits(2), _digits(4)),
    st.builds("01{}/{}".format, _digits(2), _digits(7)),
    st.builds("0{} {} {} {} {}".format, st.sampled_from("12345679"), *[_digits(2)] * 4),
)
PLANTED = st.one_of(
    st.tuples(st.just("EMAIL"), st.builds("{}@{}.example.org".format, _names, st.from_regex(r"[a-z]{1,9}", fullmatch=True))),
    st.tuples(st.just("PHONE"), _phones),
    st.tuples(st.just("CREDIT_CARD"), st.builds(lambda d, s: _in_fours(_luhn(f"4{d}"), s), _digits(14), _separator)),
    st.tuples(st.just("CREDIT_CARD"), st.builds(lambda d, s: _in_fours(_luhn(f"51{d}"), s), _digits(13), _separator)),
    st.tuples(st.just("IBAN"), st.builds(lambda d, s: _in_fours(_iban("DE", d), s), _digits(18), _separator)),
    st.tuples(st.just("IBAN"), st.builds(lambda d, s: _in_fours(_iban("GB", f"WEST{d}"), s), _digits(14), _separator)),
    st.tuples(st.just("IP_ADDRESS"), st.integers(1 << 24, (1 << 32) - 1).map(IPv4Address).filter(lambda a: not a.is_loopback)),
    st.tuples(st.just("IP_ADDRESS"), st.integers(1 << 125, (1 << 126) - 1).map(IPv6Address)),
    st.tuples(st.just("CREDENTIALS"), st.builds("https://{}:{}@shop.example/x".format, _names, _names)),
    st.tuples(st.just("API_KEY"), st.from_regex(r"sk-[A-Za-z0-9]{24,48}|ghp_[A-Za-z0-9]{36}|AKIA[A-Z0-9]{16}", fullmatch=True)),
    st.tuples(st.just("SECRET"), st.builds("password: {}7".format, st.from_regex(r"[A-Za-z!]{7,12}", fullmatch=True))),
).map(lambda pair: (pair[0], str(pair[1])))


PARTS = st.lists(st.one_of(st.sampled_from(WORDS), PLANTED), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(PARTS)
def test_no_planted_datum_survives_and_a_second_pass_changes_nothing(parts: list[str | tuple[str, str]]) -> None:
    _nothing_survives(parts)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(PARTS)
def test_no_planted_datum_survives_in_a_thousand_texts(parts: list[str | tuple[str, str]]) -> None:
    _nothing_survives(parts)


def _nothing_survives(parts: list[str | tuple[str, str]]) -> None:
    text = " ; ".join(part if isinstance(part, str) else part[1] for part in parts)
    redacted = PATTERNS(text)
    for part in parts:
        if not isinstance(part, str):
            secret = part[1].removeprefix("https://").removesuffix("@shop.example/x").removeprefix("password: ")
            assume(secret not in " ".join(p for p in parts if isinstance(p, str)))
            assert secret not in redacted, part
    assert PATTERNS(redacted) == redacted
    if all(isinstance(part, str) for part in parts):
        assert redacted == text


def test_each_kind_becomes_its_own_placeholder() -> None:
    text = "mail a@b.example, call +49 171 2345678, pay DE89 3704 0044 0532 0130 00 or 4111 1111 1111 1111 from 192.0.2.7"
    assert PATTERNS(text) == "mail [EMAIL], call [PHONE], pay [IBAN] or [CREDIT_CARD] from [IP_ADDRESS]"


@pytest.mark.parametrize(
    "text",
    [
        "order 1234567890 of 2024-01-02 10:30, 03/04/2023 10:30 or 03.04.2023 14.30",
        "order 112-4567890-1234567, invoice 0815-4711, parcel 1Z999AA10123456784, $1,234,567.89",
        "12:30:45, std::vector, v1.2.3, 127.0.0.1, https://shop.example/a:b@c, chapter 10.2.1",
        "card 4111 1111 1111 1112 and IBAN DE88370400440532013000 have the wrong check digits",
        "the password is forgotten; [EMAIL] and [CREDIT_CARD] were taken out",
        "For your phone, order 20261127 was shipped. Your fax order from 2026-11-27; Handy bestellt am 27.11.2026",
        "I bought a mobile, invoice 4500123456; mobile plan 2026-2027; Galaxy phone S21 1234567890; phone nobody 1234567890",
        "chatcmpl-01a21d9b-94e7-7405-be41-ffbe72963f42 has the end of a Belgian IBAN",
        "call me on 27.11.2026, or call me on 2026-11-27",
    ],
)
def test_ordinary_texts_stay(text: str) -> None:
    assert PATTERNS(text) == text


@pytest.mark.parametrize(
    "text",
    ["my phone number is 5551234567", "Tel.: 5551234567", "mobile (5551234567)", "Handy Nr. 55 51 23 45 67",
     "Telefon: 5551234567", "call me at 5551234567", '"phone": "5551234567"', "fax no. 5551234567",
     "My cell is: 555.123.4567", "WhatsApp #5551234567"],
)  # fmt: skip
def test_a_bare_number_behind_a_word_for_it_is_a_phone(text: str) -> None:
    assert "[PHONE]" in PATTERNS(text)
    assert not any(character.isdigit() for character in PATTERNS(text))


def test_our_own_ids_stay() -> None:
    for name in (name for _ in range(500) for name in (new_group_id(), new_id("feedback"), new_id("cycle"))):
        assert PATTERNS(name) == name


UNLUCKY = "chatcmpl-01a21d91-86a3-778e-be45-fd26ff6f5460"
"""A group's id that ends like a Belgian account, with its checksum."""


def test_an_id_of_ours_that_looks_like_an_account_stays() -> None:
    account = UNLUCKY.removeprefix("chatcmpl-01a21d91-86a3-778e-")
    assert PATTERNS(account) == "[IBAN]", "the premise"
    assert PATTERNS(f"about {UNLUCKY}, pay to {account}") == f"about {UNLUCKY}, pay to [IBAN]"
    assert PATTERNS(f"{UNLUCKY}x {account}") == "chatcmpl-01a21d91-86a3-778e-be45-fd26ff6f5460x [IBAN]"
    assert "[IBAN]" in PATTERNS(f"x-01a21d91-86a3-478e-{account}"), "no id of ours: another version of UUIDs"


def test_no_text_takes_longer_than_it_is_long() -> None:
    """Texts built to be slow: each finder is linear."""
    import time

    for bad in (
        "@",
        "1",
        "4 ",
        "ab:",
        "a@a.",
        "+1",
        "://a:",
        "eyJaaaaaaaa",
        "password: ",
        "DE12 ",
        "0171 ",
        "1.1.",
        f"{UNLUCKY} ",
        "phone ",
        "phone:" + " " * 99,
    ):
        text = bad * (50_000 // len(bad))
        begun = time.process_time()
        PATTERNS(text)
        assert time.process_time() - begun < 0.5, bad


@pytest.mark.skipif(not (DATA / "gsm8k/train.jsonl").exists(), reason=f"no test data in {DATA}")
def test_real_texts_are_hardly_ever_changed() -> None:
    """Questions of arithmetic and bookings of tickets, full of numbers: at most one in two thousand is touched."""
    texts = []
    for name, keys in (
        ("gsm8k/test.jsonl", ("question", "answer")),
        ("taskmaster/tm3_thumbs.jsonl", ("context", "generation")),
    ):
        lines = (DATA / name).read_text(encoding="utf-8").splitlines()[:800]
        texts += [str(json.loads(line)[key]) for line in lines for key in keys]
    changed = [text for text in texts if PATTERNS(text) != text]
    assert len(changed) <= len(texts) / 2000, changed


def test_own_patterns_and_what_is_kept() -> None:
    section = PrivacySection(redact="off", patterns=("CUSTOMER=K-[0-9]{6}",))
    own = hook_of(section)
    assert own is not None
    assert own("K-123456 wrote from a@b.example") == "[CUSTOMER] wrote from a@b.example"
    kept = hook_of(PrivacySection(keep=("help@shop.example", "@team.example")))
    assert kept is not None
    assert kept("help@shop.example Bo@Team.example x@shop.example") == "help@shop.example Bo@Team.example [EMAIL]"
    assert hook_of(PrivacySection(redact="off")) is None


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("redact", "everything", "module:function"),
        ("patterns", ["k-[0-9]"], "NAME="),
        ("patterns", ["K=("], "not a regular expression"),
        ("patterns", ["K=x*"], "empty text"),
        ("keep_days", 0, "keep_days"),
    ],
)
def test_bad_settings_are_refused_by_name(key: str, value: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=f"privacy.{key}") as refused:
        parse_config({"privacy": {key: value}})
    assert word in str(refused.value)


def shout(text: str) -> str:
    """A hook of one's own: ``tests.test_redaction:shout``."""
    if "explode" in text:
        raise ValueError(text)
    return text.replace("Jane", "[NAME]")


def test_a_function_of_ones_own_and_what_it_raises_is_not_told() -> None:
    hook = hook_of(PrivacySection(redact="tests.test_redaction:shout", patterns=("CODE=[0-9]{4}",)))
    assert hook is not None
    assert hook("Jane has 1234") == "[NAME] has [CODE]"
    with pytest.raises(SystemFailure) as failed:
        hook("explode my secret")
    assert "ValueError" in str(failed.value)
    assert "secret" not in str(failed.value)
    with pytest.raises(ConfigError, match="cannot be imported"):
        hook_of(PrivacySection(redact="tests.test_redaction:nothing"))


@pytest.mark.slow
def test_presidio_finds_what_its_recognizers_do() -> None:
    """The adapter on a real engine with recognizers of patterns alone; names need a spaCy model, which no index has."""
    analyzer = pytest.importorskip("presidio_analyzer", reason="the extra presidio is not installed")
    spacy = pytest.importorskip("spacy")
    from presidio_analyzer.nlp_engine import SpacyNlpEngine
    from presidio_analyzer.predefined_recognizers import EmailRecognizer, IbanRecognizer

    nlp = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": "blank"}])
    nlp.nlp = {"en": spacy.blank("en")}
    registry = analyzer.RecognizerRegistry([EmailRecognizer(), IbanRecognizer()])
    engine = analyzer.AnalyzerEngine(registry=registry, nlp_engine=nlp, supported_languages=["en"])
    hook = presidio_hook(engine, PrivacySection(keep=("@shop.com",)))
    text = "jane@mail.com pays by DE89370400440532013000 to help@shop.com"
    assert hook(text) == "[EMAIL_ADDRESS] pays by [IBAN_CODE] to help@shop.com"


# --- what is stored


@pytest.fixture
def redactor(tmp_path: Path) -> Redactor:
    made = Redactor.of(Config(state_dir=tmp_path))
    assert made is not None
    return made


def test_a_pseudonym_is_the_same_for_ever_and_only_here(redactor: Redactor, tmp_path: Path) -> None:
    name = redactor.identifier("jane@mail.example")
    assert name.startswith("person-")
    assert redactor.identifier("user-17") == "user-17"
    again = Redactor.of(Config(state_dir=tmp_path))
    elsewhere = Redactor.of(Config(state_dir=tmp_path / "other"))
    assert again is not None
    assert elsewhere is not None
    assert again.identifier("jane@mail.example") == name == again.identifier(name)
    assert elsewhere.identifier("jane@mail.example") != name
    assert (tmp_path / "pseudonyms.key").stat().st_mode & 0o077 == 0


def test_ids_of_ours_stay_whatever_the_hook_finds_in_them(tmp_path: Path) -> None:
    strict = Redactor(lambda _: "[GONE]", tmp_path)
    assert strict.values({"parent": UNLUCKY, "note": "x"}) == {"parent": UNLUCKY, "note": "[GONE]"}
    assert strict.identifier(UNLUCKY) == UNLUCKY
    assert UNLUCKY.encode() in strict.reply(json.dumps({"id": UNLUCKY}).encode())


def test_arguments_of_calls_stay_json(redactor: Redactor) -> None:
    call = ToolCall("call_1", "pay", '{"card": 4111111111111111, "to": ["a@b.example", 3], "text": "hi"}')
    prompt = (Message("assistant", "", (call,)), Message("tool", "paid by a@b.example", tool_call_id="call_1"))
    kept = redactor.prompt(prompt)
    assert json.loads(kept[0].tool_calls[0].arguments) == {"card": "[CREDIT_CARD]", "to": ["[EMAIL]", 3], "text": "hi"}  # type: ignore[union-attr]
    assert kept[1].content == "paid by [EMAIL]"  # type: ignore[union-attr]
    untouched = (Message("assistant", "", (ToolCall("c", "f", '{ "a":1 }'),)),)
    assert redactor.prompt(untouched) == untouched


def test_tokens_and_log_probs_go_where_they_are_no_longer_what_was_sampled(redactor: Redactor) -> None:
    said = Completion("hello", (1, 2), (-0.5, -0.25), 3)
    assert redactor.completion(said, other_prompt=False) == said
    assert redactor.completion(said, other_prompt=True) == replace(said, logps=())
    told = redactor.completion(replace(said, text="write to a@b.example"), other_prompt=False)
    assert told == replace(said, text="write to [EMAIL]", token_ids=(), logps=(), is_redacted=True)


SECRETS = {
    "prompt": "prompt.sentinel@mail.example",
    "metadata": "metadata.sentinel@mail.example",
    "user": "user.sentinel@mail.example",
    "rater": "rater.sentinel@mail.example",
    "conversation": "talk.sentinel@mail.example",
    "reason": "reason.sentinel@mail.example",
    "edit": "edit.sentinel@mail.example",
    "tag": "tag.sentinel@mail.example",
    "comment": "comment.sentinel@mail.example",
    "outcome": "outcome.sentinel@mail.example",
    "tool": "tool.sentinel@mail.example",
    "file": "file.sentinel@mail.example",
    "stop": "stop.sentinel@mail.example",
}


def bytes_of(folder: Path) -> bytes:
    return b"\0".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    config = fake_config(tmp_path / "state", privacy={"redact_files": True})
    with RunningServer(tmp_path / "state", config=config) as running:
        running.store.redactor = Redactor.of(config)
        yield running


def test_no_raw_value_is_anywhere_in_the_state_directory(server: RunningServer) -> None:
    s = SECRETS
    headers = {"idempotency-key": "one"}
    body: dict[str, Any] = {
        "model": "support-bot",
        "n": 2,
        "user": s["user"],
        "stop": [s["stop"]],
        "messages": [{"role": "user", "content": f"I am {s['prompt']}, where is my order?"}],
        "metadata": {"email": s["metadata"], "conversation_id": s["conversation"]},
    }
    first = server.http.post("/v1/chat/completions", json=body, headers=headers).json()
    streamed = server.http.post("/v1/chat/completions", json=body | {"stream": True, "n": 1}).text
    assert streamed.endswith("data: [DONE]\n\n")
    pick = {
        "id": "pick-1",
        "inference_id": first["id"],
        "chosen_index": 0,
        "reason": f"because {s['reason']}",
        "edited_text": f"ask {s['edit']}",
        "rater_id": s["rater"],
        "tags": {"who": s["tag"]},
    }
    assert server.http.post("/v1/preferences", json=pick).status_code == 201
    assert server.http.post("/v1/preferences", json=pick).json()["duplicate"], "the same again is the same"
    comment = {"inference_id": first["id"], "metric_name": "comment", "value": f"call {s['comment']}", "comment": s["comment"]}
    assert server.http.post("/v1/feedback", json=comment).status_code == 201
    outcome = {
        "id": "o",
        "conversation_id": s["conversation"],
        "metric_name": "resolved",
        "value": True,
        "comment": s["outcome"],
    }
    assert server.http.post("/v1/feedback", json=outcome, headers={"idempotency-key": "two"}).status_code == 201
    assert server.http.post("/v1/feedback", json=outcome).json()["duplicate"]
    path = f"/v1/chat/completions/{first['id']}"
    server.http.post(path, json={"metadata": {"again": s["metadata"]}}).raise_for_status()
    upload = json.dumps({"messages": [{"role": "user", "content": s["file"]}, {"role": "assistant", "content": "ok"}]})
    files = {"file": ("rows.jsonl", upload.encode())}
    server.http.post("/v1/files", files=files, data={"purpose": "fine-tune"}).raise_for_status()

    found = bytes_of(server.folder)
    assert [name for name, secret in s.items() if secret.encode() in found] == []
    assert b"[EMAIL]" in found
    group = server.group(first["id"])
    assert group.user == server.store.redactor.identifier(s["user"])  # type: ignore[union-attr]
    assert group.prompt_token_ids == server.policy.tokens.encode_prompt(group.prompt)
    assert all(not completion.logps for completion in group.completions), "they were of another prompt"


def test_an_answer_that_would_be_kept_with_placeholders_is_not_told_again(tmp_path: Path) -> None:
    with RunningServer(tmp_path) as server:
        server.store.redactor = Redactor(lambda text: text.replace("answer", "[IBAN]"), b"key")

        def ask(**body: Any) -> httpx.Response:
            return server.http.post("/v1/chat/completions", json=chat_body(**body), headers={"idempotency-key": "one"})

        first, again, other = ask(n=2), ask(n=2), ask(n=1)
        name = first.json()["id"]
        assert "answer" in first.json()["choices"][0]["message"]["content"], "the client gets what was sampled"
        assert (again.status_code, again.json()["error"]["code"]) == (409, "reply_not_kept")
        assert name in again.json()["error"]["message"]
        assert (again.headers["x-should-retry"], again.headers["idempotent-replayed"]) == ("false", "true")
        assert other.json()["error"]["code"] == "idempotency_key_reused"
        with server.store.reading() as c:
            assert groups.count(c, POLICY) == 1
        pick = {"inference_id": name, "chosen_index": 0, "reason": "the answer is right"}
        picked = [server.http.post("/v1/preferences", json=pick, headers={"idempotency-key": "two"}) for _ in range(2)]
        assert [reply.status_code for reply in picked] == [201, 201], "nothing in it that anybody acts on"


def test_a_conversation_goes_on_from_an_answer_that_was_redacted(tmp_path: Path) -> None:
    """The client sends back what it was told; the predecessor is found by what became of it."""

    def hide(text: str) -> str:
        return text.replace("help", "[HELP]").replace("order", "[ORDER]")

    with RunningServer(tmp_path) as server:
        server.store.redactor = Redactor(hide, b"key")
        asked = [{"role": "user", "content": "please help"}]
        first = server.chat(messages=asked, user="jane").json()
        text = first["choices"][0]["message"]["content"]
        stored = server.group(first["id"])
        assert stored.completions[0].text == hide(text)
        turns = [*asked, {"role": "assistant", "content": text}, {"role": "user", "content": "and now?"}]
        second = server.group(server.chat(messages=turns, user="jane").json()["id"])
        assert (second.parent_group_id, second.parent_index) == (first["id"], 0)


def test_a_hook_that_fails_stores_nothing_and_says_nothing(tmp_path: Path) -> None:
    with RunningServer(tmp_path) as server:
        hook = hook_of(PrivacySection(redact="tests.test_redaction:shout"))
        assert hook is not None
        server.store.redactor = Redactor(hook, b"key", is_quick=False)
        reply = server.chat(messages=[{"role": "user", "content": "explode, sentinel"}])
        assert reply.status_code == 500
        assert "sentinel" not in reply.text
        assert b"sentinel" not in bytes_of(server.folder)


def test_a_redacted_answer_is_set_aside_and_a_redacted_prompt_trains_without_log_probs(tmp_path: Path) -> None:
    config = loop_settings(tmp_path)
    with open_rig(config) as rig:
        rig.serve(4, gate_n=0)
        rig.store.redactor = Redactor(lambda text: text.replace("case", "[CASE]"), b"key")
        with rig.store.reading() as c:
            groups_now, _ = feedback.labelled_since(c, "bot", after_seq=0, kinds=list(pairs.fresh.KINDS))
        prompted, answered = (rig.store.redactor.group(groups_now[i].group) for i in (0, 1))
        answered = replace(
            answered, completions=tuple(replace(c, token_ids=(), is_redacted=True) for c in answered.completions)
        )
        labelled = [replace(groups_now[0], group=prompted), replace(groups_now[1], group=answered), *groups_now[2:]]
    compiled = pairs.compile_pairs(labelled, pairs.PairRules())
    by_prompt = {row.group_ids[0]: row for row in compiled.train}
    assert compiled.dropped.get("redacted", 0) == 1
    assert answered.group_id not in by_prompt
    if prompted.group_id in by_prompt:
        row = by_prompt[prompted.group_id]
        assert (row.chosen.logps, row.prompt_token_ids) == ((), ())
        assert row.chosen.token_ids
