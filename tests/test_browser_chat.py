"""The chat page in a real browser: hostile answers stay text, all by keyboard, errors keep the question, thumbs, tabs."""

from __future__ import annotations

import random
import socket
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect
from tests.browsing import PHONE, Visit
from tests.server import POLICY, RunningServer, fake_config
from tests.test_browser import browser, pytestmark, visit_as_trainer

from pairloop.errors import EngineError
from pairloop.loop import pairs
from pairloop.policy.fake import FakePolicy
from pairloop.policy.protocols import SampleRequest, TokenEvent
from pairloop.store import feedback, groups, versions
from pairloop.types import Alias, Completion, Feedback, FinishReason, Group, Version, VersionKind

__all__ = ["browser", "pytestmark"]

HOSTILE = {
    "script": "<script>window.ran = 1</script> and\n\n<script>\nwindow.ran = 1\n</script>",
    "textarea": "</textarea></div></article><h1>mine</h1><form action=/login><input name=key></form>",
    "link": (
        "[x](javascript:window.ran=1) [y](JaVaScRiPt&#58;window.ran=1) [z](data:text/html,<script>window.ran=1</script>) "
        "<a href='javascript:window.ran=1'>w</a>"
    ),
    "image": "<img src=x onerror='window.ran=1'> ![a](https://evil.example/a.png) <svg onload=window.ran=1> ![b](/v1/status)",
    "style": (
        "<style>body { display: none }</style><b style='position:fixed;inset:0'>over</b> "
        "<iframe srcdoc='<script>parent.ran=1</script>'></iframe>"
    ),
    "html": '**<u onclick="window.ran=1" id="prompt" name="prompt">u</u>** `<b>` \n\n    <i>\n',
    "deep": ">" * 9_000,
    "right to left": "\u202egnp.exe \u0645\u0631\u062d\u0628\u0627 \u2067back\u2069",
    "broken": "caf\ufffd \ufffd\ufffd \x07 \U0001f600",
}
LONG = "word and word " * 75_000


class SayingPolicy(FakePolicy):
    """Says what it is told to, in pieces, all answers together; an error instead of a text is raised.

    With ``pause`` it waits for that event after five pieces of each.
    """

    def __init__(self) -> None:
        super().__init__(max_context=100_000)
        self.to_say: deque[str | Exception] = deque()
        self.pause: threading.Event | None = None

    def sample(self, request: SampleRequest) -> Future[tuple[Completion, ...]]:
        said: Future[tuple[Completion, ...]] = Future()
        texts = [self.to_say.popleft() if self.to_say else f"answer {random.randrange(10**6)}" for _ in range(request.n)]
        errors = [text for text in texts if isinstance(text, Exception)]
        if errors:
            said.set_exception(errors[0])
        elif self.pause is None:
            said.set_result(self._say(request, [str(text) for text in texts]))
        else:
            threading.Thread(target=lambda: said.set_result(self._say(request, [str(text) for text in texts]))).start()
        return said

    def _say(self, request: SampleRequest, texts: list[str]) -> tuple[Completion, ...]:
        pieces = [[text[at : at + 1 + len(text) // 100] for at in range(0, len(text), 1 + len(text) // 100)] for text in texts]
        for place in range(max(map(len, pieces))):
            if self.pause is not None and place == 5:
                assert self.pause.wait(20)
            for index, of_one in enumerate(pieces):
                if request.on_token is not None and place < len(of_one):
                    request.on_token(TokenEvent(index, 97, -1.0, of_one[place]))
        sizes = [(97,) * len(of_one) for of_one in pieces]
        return tuple(
            Completion(text, ids, (-1.0,) * len(ids), request.version, FinishReason.STOP)
            for text, ids in zip(texts, sizes, strict=True)
        )


@pytest.fixture
def policy() -> Iterator[SayingPolicy]:
    policy = SayingPolicy()
    yield policy
    if policy.pause is not None:
        policy.pause.set()


@pytest.fixture
def server(tmp_path: Path, policy: SayingPolicy) -> Iterator[RunningServer]:
    config = fake_config(tmp_path, feedback={"repeat_share": 0.0, "min_latency_ms": 0}, serve={"queue_limit": 1})
    with RunningServer(tmp_path / "state", config=config, policy=policy) as running:
        yield running


@pytest.fixture
def seen(server: RunningServer, browser: Browser) -> Iterator[Visit]:
    """The page of a visitor of the train pool; dialogs are problems, too. It asks nobody but the server."""
    seen = visit_as_trainer(browser, server.url)
    seen.page.on("dialog", lambda dialog: seen.problems.append(dialog.message))
    yield seen
    assert seen.outside == []
    seen.page.context.close()


@pytest.fixture
def page(seen: Visit) -> Page:
    return seen.page


def ask(page: Page, question: str) -> None:
    page.locator("#prompt").fill(question)
    page.locator("#prompt").press("Enter")
    expect(page.locator("#note")).to_contain_text("Pick with a button")


def in_focus(page: Page) -> str:
    """What has the focus; the body has it where it was lost."""
    found: str = page.evaluate(
        "document.activeElement.id || document.activeElement.textContent.trim() || document.activeElement.tagName"
    )
    assert found not in ("BODY", "HTML")
    assert page.evaluate("document.activeElement !== document.body")
    return found


def stored(server: RunningServer) -> list[tuple[Group, list[Feedback]]]:
    """Every group with all that was said about it, the oldest first."""
    with server.store.reading() as c:
        rows = feedback.recent(c, POLICY, 100)
        ids = sorted({row.group_id for row in rows})
        found = [groups.get(c, group_id) for group_id in ids]
    return [(group, [row for row in reversed(rows) if row.group_id == group.group_id]) for group in found if group is not None]


def test_hostile_answers_stay_text(page: Page, policy: SayingPolicy, seen: Visit) -> None:
    asked_for: list[str] = []
    page.on("request", lambda request: asked_for.append(request.url))
    for name, text in HOSTILE.items():
        policy.to_say.extend([text, "a plain answer"])
        ask(page, f"{text[:2_000]} <b>{name}</b>")  # the question is as hostile
        shown = page.locator(".answer").filter(has_not_text="a plain answer")
        body = shown.locator(".text").inner_text()
        for word in ("window.ran", "onerror", "onclick", "</textarea>", "evil.example", "<style>", "srcdoc", "javascript"):
            assert (word in body) == (word in text), (name, word, body)
        made = page.locator(".answer .text, #question, #conversation").locator(
            "script, img, svg, form, input, iframe, style, b[style], u, h1, [onclick]"
        )
        assert made.count() == 0, name
        assert (
            page.locator(".answer .text a, #conversation a").evaluate_all("links => links.map((link) => link.protocol)") == []
        ), name
        page.keyboard.press("1")
        expect(page.locator("#note")).to_contain_text("Recorded")
    assert page.evaluate("window.ran") is None
    assert not [url for url in asked_for if url.endswith("/v1/status")]
    assert seen.problems == []


def test_both_stream_together_and_nothing_can_be_picked_before_both_are_done(
    page: Page, server: RunningServer, policy: SayingPolicy
) -> None:
    policy.pause = threading.Event()
    policy.to_say.extend(["a" * 10, "b" * 20])
    page.locator("#prompt").fill("Slowly, please")
    page.locator("#prompt").press("Enter")
    for text in ("aaaaa", "bbbbb"):
        expect(page.locator(".answer.busy .text").filter(has_text=text)).to_have_text(text)
    left, right = (page.locator(f"#answer-{place}").bounding_box() for place in (0, 1))
    assert left is not None
    assert right is not None
    assert (left["width"], left["y"]) == pytest.approx((right["width"], right["y"]), abs=0.1)
    assert page.locator("[data-pick=a]").is_disabled()
    page.keyboard.press("1")
    page.locator("#prompt").fill("Too early")
    page.locator("#prompt").press("Enter")
    expect(page.locator("#note")).to_contain_text("still being written")
    policy.pause.set()
    expect(page.locator("#note")).to_contain_text("Pick with a button")
    expect(page.locator("#prompt")).to_have_value("Too early")
    assert stored(server) == []
    page.locator("[data-pick=a]").click()
    expect(page.locator("#note")).to_contain_text("Recorded")


def test_a_megabyte_is_shown_and_can_be_picked(page: Page, policy: SayingPolicy, seen: Visit) -> None:
    policy.to_say.extend([LONG, LONG.replace("and", "or")])
    ask(page, "Tell me everything")
    sizes = "boxes => boxes.map((box) => box.textContent.length)"
    assert all(size < 51_000 for size in page.locator(".answer .text").evaluate_all(sizes))
    page.get_by_role("button", name="Show all 1,050,000 characters").press("Enter")
    assert in_focus(page) in ("text-0", "text-1")
    assert max(page.locator(".answer .text").evaluate_all(sizes)) == len(LONG)
    assert page.locator(".answer .text").first.bounding_box()["height"] < 700  # type: ignore[index]
    page.locator("#differ").check()
    expect(page.locator("#note")).to_contain_text("too long to be compared")
    page.locator("#comparison").press("2")
    expect(page.locator("#note")).to_contain_text("Recorded")
    page.locator("#prompt").fill("And now briefly")
    page.locator("#prompt").press("Enter")
    expect(page.locator("#note")).to_contain_text("Start a new conversation; your question is kept.")
    page.locator("#restart").click()
    assert in_focus(page) == "prompt"
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_contain_text("Pick with a button")
    (refusal,) = seen.problems
    assert "400" in refusal


def test_markdown_is_read_and_can_be_turned_off(page: Page, policy: SayingPolicy, seen: Visit) -> None:
    text = (
        "# Title\n\n**bold** [site](https://shop.example/a?b=1&c=2)\n\n1. one\n2. two\n\n"
        "```python\nprint('<b>')\n```\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    )
    policy.to_say.extend([text, text.replace("bold", "brave")])
    ask(page, "Show me")
    answer = page.locator("#text-0")
    for name, n in {"strong": 2, "ol li": 2, "pre code": 1, "td": 2, "h1": 0, "button.copy": 1}.items():
        expect(answer.locator(name)).to_have_count(n)
    link = answer.locator("a")
    assert link.get_attribute("href") == "https://shop.example/a?b=1&c=2"
    assert (link.get_attribute("rel"), link.get_attribute("target")) == ("noopener noreferrer", "_blank")
    page.locator("#differ").check()
    assert sorted(page.locator(".answer mark").all_inner_texts()) == ["bold", "brave"]
    assert seen.serious() == []
    page.locator("#differ").uncheck()
    page.locator("#plain").check()
    assert page.locator(".answer .text *").count() == 0
    expect(answer).to_contain_text("# Title")
    page.reload()
    expect(page.locator("#plain")).to_be_checked()


def test_the_whole_page_by_keyboard_and_the_focus_is_never_lost(page: Page, server: RunningServer, seen: Visit) -> None:
    assert in_focus(page) == "prompt"
    page.keyboard.type("First?")
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_contain_text("Pick with a button")
    assert in_focus(page) == "comparison"
    first = page.locator("#text-0").inner_text()
    page.keyboard.press("r")  # asks the same again; what was shown stays unpicked
    expect(page.locator("#text-0")).not_to_have_text(first)
    expect(page.locator("#note")).to_contain_text("Pick with a button")
    assert in_focus(page) == "comparison"
    expect(page.locator("#question")).to_have_text("First?")
    chosen = page.locator("#text-0").inner_text()
    page.keyboard.press("1")
    expect(page.locator("#note")).to_contain_text("Go on with the chosen answer")
    expect(page.locator("#answer-0 .version")).to_contain_text("tokens")
    assert in_focus(page) == "prompt"

    for key in ("Shift+Tab", "Shift+Tab", "Shift+Tab", "Shift+Tab"):  # Edit, Save, comment, the last chip
        page.keyboard.press(key)
    assert in_focus(page) == "safer"
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.type("no 1 2 3 4 0 r picks here")
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_contain_text("Noted")
    assert in_focus(page) == "comment"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#ideal-text")).to_be_focused()
    expect(page.locator("#ideal-text")).to_have_value(chosen)
    assert seen.serious() == []
    page.keyboard.press("Control+End")
    page.keyboard.type(", as I would say")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_contain_text("kept as an example")
    assert in_focus(page) == "prompt"

    page.keyboard.type("Second?")
    page.keyboard.press("Enter")
    expect(page.locator("#conversation .assistant")).to_contain_text(f"{chosen}, as I would say")
    expect(page.locator("#note")).to_contain_text("Pick with a button")
    page.keyboard.press("0")
    expect(page.locator("#note")).to_contain_text("Ask again, or something else")
    assert in_focus(page) == "prompt"
    page.keyboard.type("Third?")
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_contain_text("Pick with a button")
    page.keyboard.press("4")
    expect(page.locator("#note")).to_contain_text("Recorded")
    page.locator("#restart").press("Enter")
    assert in_focus(page) == "prompt"
    expect(page.locator("#conversation li")).to_have_count(0)
    assert seen.problems == []

    (group, said), (second, skip), (_, bad) = stored(server)
    pick, comment, ideal = said
    left = (pick.shown_order or (0, 1))[0]
    assert group.completions[left].text == chosen
    assert (pick.label, pick.choice_index) == ("AB"[left], None)
    assert (comment.metric, comment.value) == ("comment", "no 1 2 3 4 0 r picks here")
    assert comment.tags["reasons"] == "safer"
    assert (ideal.metric, ideal.choice_index, ideal.value) == ("demonstration", left, f"{chosen}, as I would say")
    assert (second.parent_group_id, second.prompt[-2].content) == (group.group_id, ideal.value)  # type: ignore[union-attr]
    assert [skip[0].label, bad[0].label] == ["SKIP", "BOTH_BAD"]


def test_the_conversation_is_there_again_on_the_way_back(page: Page, server: RunningServer) -> None:
    """A look at another page, a reload: the tab goes on where it was. Another tab begins anew, and so does another person."""
    turns = page.locator("#conversation .turn")
    for question in ("First?", "Second?"):
        ask(page, question)
        page.keyboard.press("1")
        expect(page.locator("#note")).to_contain_text("Recorded.")
    chosen = page.locator("#text-0").inner_text()
    page.goto(f"{server.url}/versions")
    page.go_back()
    expect(turns).to_have_count(4)
    expect(turns.nth(3)).to_contain_text(chosen)
    expect(page.locator("#empty")).to_be_hidden()
    page.reload()
    expect(turns).to_have_count(4)
    ask(page, "Third?")
    page.keyboard.press("2")
    expect(page.locator("#note")).to_contain_text("Recorded.")
    prompt = str(stored(server)[-1][0].prompt)
    assert prompt.index("First?") < prompt.index("Second?") < prompt.index(chosen) < prompt.index("Third?")
    other = page.context.new_page()
    other.goto(server.url)
    expect(other.locator("#empty")).to_be_visible()
    page.context.clear_cookies()
    page.reload()
    expect(page.locator("#empty")).to_be_visible()
    expect(turns).to_have_count(0)


def test_which_side_an_answer_stands_on_is_random_and_told(page: Page, server: RunningServer, policy: SayingPolicy) -> None:
    orders = set()
    for number in range(40):
        policy.to_say.extend([f"zero {number}", f"one {number}"])
        ask(page, f"Question {number}")
        left = page.locator("#text-0").inner_text()
        page.keyboard.press("1")
        expect(page.locator("#note")).to_contain_text("Recorded")
        group, (pick,) = stored(server)[-1]
        orders.add(pick.shown_order)
        assert group.completions[pick.shown_order[0]].text == left
        assert pick.label == "AB"[pick.shown_order[0]]
        if len(orders) == 2:
            break
    assert orders == {(0, 1), (1, 0)}  # 40 alike come once in 5e11


def test_an_error_is_told_in_words_and_the_question_is_kept(page: Page, policy: SayingPolicy) -> None:
    policy.to_say.append(EngineError("the kernel died"))
    page.locator("#prompt").fill("Are you there?")
    page.locator("#prompt").press("Enter")
    expect(page.locator("#note")).to_contain_text("No answer:")
    expect(page.locator("#note")).to_contain_text("Your question is kept")
    expect(page.locator("#prompt")).to_have_value("Are you there?")
    assert in_focus(page) == "prompt"
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_contain_text("Pick with a button")
    policy.to_say.append(EngineError("the kernel died"))
    page.keyboard.press("r")
    expect(page.locator("#prompt")).to_have_value("Are you there?")
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_contain_text("Pick with a button")

    page.context.set_offline(True)
    page.keyboard.press("1")
    expect(page.locator("#note")).to_contain_text("The pick was not recorded: the server cannot be reached.")
    assert in_focus(page) == "comparison"
    page.context.set_offline(False)
    page.keyboard.press("1")
    expect(page.locator("#note")).to_contain_text("Recorded")


def test_a_server_that_is_full_says_so_and_when_to_come_again(page: Page, server: RunningServer) -> None:
    url = httpx.URL(server.url)
    head = ("POST /v1/chat/completions HTTP/1.1", f"host: {url.host}", "content-length: 99", "expect: 100-continue", "", "")
    with socket.create_connection((url.host, url.port or 80), timeout=10) as slow:
        slow.sendall("\r\n".join(head).encode())
        assert b" 100 " in slow.recv(100)  # the one place is taken, by a body that does not come
        page.locator("#prompt").fill("Any room?")
        page.locator("#prompt").press("Enter")
        expect(page.locator("#note")).to_contain_text("1 answers are under way")
        expect(page.locator("#note")).to_contain_text("Try again in")
        expect(page.locator("#prompt")).to_have_value("Any room?")
    assert any(server.chat().status_code == 200 for _ in range(1_000))
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_contain_text("Pick with a button")


def test_one_answer_and_thumbs(page: Page, server: RunningServer, policy: SayingPolicy) -> None:
    policy.to_say.extend(["the first", "the second"])
    page.locator("#single").check()
    page.locator("#prompt").fill("One, please")
    page.locator("#prompt").press("Enter")
    expect(page.locator("#note")).to_contain_text("Rate it")
    expect(page.locator("#answer-1")).to_be_hidden()
    expect(page.locator("#answer-0 .version")).to_contain_text(f"{POLICY}@0")
    assert in_focus(page) == "prompt"
    page.get_by_role("button", name="Not good").press("Enter")
    expect(page.locator("#note")).to_contain_text("Recorded")
    page.get_by_role("button", name="Good", exact=False).first.click()
    expect(page.get_by_role("button", name="Not good")).to_have_attribute("aria-pressed", "false")
    page.locator("#prompt").fill("Another")
    page.locator("#prompt").press("Enter")
    expect(page.locator("#text-0")).to_have_text("the second")
    expect(page.locator("#conversation .assistant")).to_contain_text("the first")
    ((group, said),) = stored(server)
    assert [(row.metric, row.value, row.choice_index) for row in said] == [("thumbs", False, 0), ("thumbs", True, 0)]
    assert len(group.completions) == 1


def test_a_phone_has_tabs_and_everything_in_reach(page: Page, seen: Visit) -> None:
    page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
    ask(page, "On the way?")
    expect(page.locator("#answer-0")).to_be_visible()
    expect(page.locator("#answer-1")).to_be_hidden()
    page.get_by_role("button", name="Answer B").click()
    expect(page.locator("#answer-1")).to_be_visible()
    expect(page.locator("#answer-0")).to_be_hidden()
    assert (seen.overflow() <= 0, seen.serious()) == (True, [])
    page.get_by_role("button", name="B is better").click()
    expect(page.locator("#note")).to_contain_text("Recorded")
    for name in ("clearer", "Save"):
        page.get_by_role("button", name=name, exact=True).click()
    expect(page.locator("#note")).to_contain_text("Noted")
    assert (seen.overflow() <= 0, seen.serious()) == (True, [])


def test_a_pick_is_in_version_1_once_it_is(page: Page, server: RunningServer) -> None:
    ask(page, "Will you learn?")
    page.keyboard.press("1")
    line = page.locator("#mine-list li")
    expect(line).to_contain_text("Will you learn?")
    expect(line).to_contain_text("A: waits for the next cycle")
    dataset = pairs.run(server.store, None, server.config, cycle_id=None, parent=0)
    assert dataset is not None
    made = Version(POLICY, 1, VersionKind.FULL, "x", "hash-1", 0, dataset.dataset_id, None, datetime.now(UTC))
    server.store.write(lambda c: versions.insert(c, made))
    server.alias(Alias.CHAMPION, 1)
    expect(line).to_contain_text("A: is in version 1")  # the page hears of the champion and looks again
    page.reload()
    expect(line).to_contain_text("A: is in version 1")
    page.get_by_role("button", name="Forget").click()
    expect(page.locator("#mine")).to_be_hidden()
    assert in_focus(page) == "prompt"


def longest_common(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        before = row[:]
        for place, other in enumerate(b, 1):
            row[place] = before[place - 1] + 1 if word == other else max(row[place - 1], before[place])
    return row[-1]


def test_the_word_diff_is_a_longest_common_one(page: Page) -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choice(["a", "b", "c", "é", "d."]) for _ in range(rng.randrange(12))) for _ in range(60)]

    def compare(a: str, b: str) -> Any:
        return page.evaluate("([a, b]) => [differences(a, b), wordsOf(a), wordsOf(b)]", [a, b])

    for a, b in pairwise(texts):
        (ours, theirs), words_a, words_b = compare(a, b)
        assert ("".join(text for text, _ in ours), "".join(text for text, _ in theirs)) == (a, b)
        common = ["".join(text for text, own in runs if not own) for runs in (ours, theirs)]
        assert common[0] == common[1]
        assert len(page.evaluate("wordsOf", common[0])) <= longest_common(words_a, words_b)
        kept = sum(len(page.evaluate("wordsOf", text)) for text, own in ours if not own)
        assert kept == longest_common(words_a, words_b)
