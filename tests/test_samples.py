"""The sample answers of an offline report: kept to be read, gone with the requests that their prompts came from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from tests.loop_rig import Rig, open_rig, settings
from tests.server import RunningServer
from tests.test_deploy import add_version, version

from pairloop.loop import evaluate, privacy
from pairloop.store import groups, samples, stored
from pairloop.store.samples import Sample
from pairloop.types import GroupKind, Pool

failing = False


def hide(text: str) -> str:
    """A redaction hook of one's own: what ends in 7 is nobody's business."""
    if failing:
        raise ValueError("planned")
    return re.sub(r"\d7\b", "[hidden]", text)


EVIL = "<script>alert(1)</script></textarea>\u202e"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("samples")
    with open_rig(
        settings(folder, evaluate={"prompts": 8, "keep_samples": 5}, privacy={"redact": "tests.test_samples:hide"})
    ) as opened:
        opened.serve(0, gate_n=12)
        yield opened


def report(rig: Rig, number: int) -> evaluate.Report:
    return evaluate.run(
        rig.store, rig.policy, rig.loop.config, challenger=version(rig, number), champion=version(rig, 0), dataset=None
    )


def kept(rig: Rig, number: int) -> list[Sample]:
    with rig.store.reading() as c:
        return [one for _, one in samples.of_version(c, rig.loop.name, number)]


def test_some_prompts_of_a_report_are_kept_with_both_answers_and_the_same_when_it_is_made_again(rig: Rig) -> None:
    number = add_version(rig, 3).number
    report(rig, number)
    with rig.store.reading() as c:
        newest = groups.recent_prompts(c, rig.loop.name, pool=Pool.GATE, limit=8)
        told = samples.of_version(c, rig.loop.name, number)
    assert [prompt for prompt, _ in told] == [group.prompt for group in newest[:5]]
    assert [one.group_id for _, one in told] == [group.group_id for group in newest[:5]]
    assert {one.against for _, one in told} == {0}
    assert len({one.ours for _, one in told} | {one.theirs for _, one in told}) > 5
    assert all(re.fullmatch(r"answer (\d\d|\[hidden\])", text) for _, one in told for text in (one.ours, one.theirs))
    report(rig, number)
    assert kept(rig, number) == [one for _, one in told]


def test_what_is_taken_out_of_texts_is_taken_out_of_samples(rig: Rig) -> None:
    found: list[Sample] = []
    while not any("[hidden]" in one.ours for one in found):  # a tenth of the answers
        number = add_version(rig, 0).number
        report(rig, number)
        found += kept(rig, number)
    assert not any(re.search(r"\d7\b", text) for one in found for text in (one.ours, one.theirs))


def test_a_sample_goes_with_the_request_that_its_prompt_came_from(rig: Rig) -> None:
    number, store, config = add_version(rig, 3).number, rig.store, rig.loop.config
    report(rig, number)
    before = kept(rig, number)
    with store.reading() as c:
        users = {one.group_id: group.user for one in before if (group := groups.get(c, one.group_id)) is not None}
        first = groups.get(c, before[0].group_id)
    assert first is not None
    store.write(lambda c: stored.insert(c, first))
    assert privacy.delete_completion(store, config, before[0].group_id)  # by its client
    assert kept(rig, number) == before[1:]
    assert privacy.erase(store, config, str(users[before[1].group_id]), reason="asked for").counts["groups"] == 1
    assert kept(rig, number) == before[2:]
    # Erased between the sampling and the end of the report, it must not come back.
    store.write(lambda c: samples.put(c, rig.loop.name, number, before, datetime.now(UTC)))
    assert kept(rig, number) == before[2:]
    old = config.model_copy(update={"privacy": config.privacy.model_copy(update={"keep_days": 30.0})})
    privacy.sweep(store, old, now=datetime.now(UTC) + timedelta(days=31))
    assert kept(rig, number) == []


def test_a_sample_whose_prompt_was_read_off_an_answer_in_the_shadow_goes_with_the_request(rig: Rig) -> None:
    number, store = add_version(rig, 3).number, rig.store
    rig.serve(0, gate_n=8)
    with store.reading() as c:
        asked = groups.recent_prompts(c, rig.loop.name, pool=Pool.GATE, limit=1)[0]
    asked = replace(asked, group_id="chatcmpl-asked", duel_id=None, created_at=datetime.now(UTC))
    unseen = replace(asked, group_id=groups.shadow_id(asked.group_id), kind=GroupKind.SHADOW, completions=asked.completions[:1])
    for one in (asked, unseen):
        store.write(partial(groups.insert, group=one))
    store.write(lambda c: stored.insert(c, asked))
    report(rig, number)
    assert unseen.group_id in {one.group_id for one in kept(rig, number)}
    assert privacy.delete_completion(store, rig.loop.config, asked.group_id)
    assert unseen.group_id not in {one.group_id for one in kept(rig, number)}


def test_none_are_kept_where_none_are_wanted_and_a_failing_hook_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_rig(
        settings(tmp_path, evaluate={"prompts": 8, "keep_samples": 0}, privacy={"redact": "tests.test_samples:hide"})
    ) as rig:
        rig.serve(0, gate_n=8)
        number = add_version(rig, 1).number
        found = report(rig, number)
        assert kept(rig, number) == []
        wanted = rig.loop.config.model_copy(
            update={"evaluate": rig.loop.config.evaluate.model_copy(update={"keep_samples": 3})}
        )
        rig.loop = replace(rig.loop, config=wanted)
        monkeypatch.setattr("tests.test_samples.failing", True)
        told = report(rig, number)
        assert kept(rig, number) == []
        assert told.metrics == found.metrics
        assert any("no sample answers were kept" in note for note in told.notes)


def test_the_page_shows_them_as_text_also_of_a_version_that_never_duelled(serve: Callable[..., RunningServer]) -> None:
    server = serve()
    asked = server.chat(n=2, messages=[{"role": "user", "content": f"{EVIL} why?"}]).json()["id"]
    server.add_version(1)
    assert "No answers to show." in server.http.get("/versions/1").text
    rows = [Sample(asked, 0, f"{EVIL} ours", f"{EVIL} theirs")]
    server.store.write(lambda c: samples.put(c, "support-bot", 1, rows, datetime.now(UTC)))
    page = server.http.get("/versions/1").text
    assert "<script>alert" not in page
    assert "Before anybody saw it" in page
    assert "In the duel" not in page
    assert page.index("theirs</p>") < page.index("ours</p>", page.index("theirs</p>") + 9)
    assert f'href="/requests/{asked}"' in page
    assert "data-words" in page
    assert "wordDiff" in server.http.get("/static/words.js").text
