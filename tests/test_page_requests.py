"""Requests: the list with its filters, a request's page, and what another version would have said."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from threading import Event, Timer

import pytest
from sqlalchemy import Connection
from tests.server import POLICY, RunningServer, World, sse_chunks, user_of

from pairloop.policy.fake import FakePolicy, quality
from pairloop.policy.protocols import SampleRequest
from pairloop.store import feedback, groups, requests, stored
from pairloop.store.keys import Scope
from pairloop.store.requests import RequestFilter
from pairloop.types import Completion, Feedback, Group, GroupKind, Label, Message, Pool, Source
from pairloop.web.scopes import scopes_of

EVIL = "<script>alert('x')</script></textarea>\u202egnp"
NOON = datetime(2026, 5, 31, 12, tzinfo=UTC)


def asked(group_id: str, *, version: int = 0, kind: GroupKind = GroupKind.TRAIN, **more: object) -> Group:
    answers = (Completion(EVIL, (1, 2), (-0.5, -1.5), version), Completion("other", (3,), (-2.0,), version))
    values = {"pool": Pool.TRAIN, "created_at": NOON, "user": None, **more}
    return Group(group_id, POLICY, kind, prompt=(Message("user", EVIL),), completions=answers, **values)  # type: ignore[arg-type]


def said(number: int, group_id: str, rater: str, label: Label = Label.A) -> Feedback:
    return Feedback(f"f{number}", group_id, "preference", Source.HUMAN, rater, NOON, label=label, shown_order=(0, 1))


def test_pages_hold_what_fits_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for, page after page: the requests that fit, newest first, each once; also where chunks are small."""
    monkeypatch.setattr(requests, "CHUNK", 7)
    rng = random.Random(3)
    kinds = [GroupKind.TRAIN, GroupKind.HELDOUT, GroupKind.DUEL, GroupKind.SHADOW]
    with World(tmp_path / "w") as world:
        for number in (1, 2):
            world.add_version(number)
        made = [
            asked(
                f"g{n:03}",
                version=rng.randrange(3),
                kind=rng.choice(kinds),
                pool=rng.choice(list(Pool)),
                user=rng.choice([None, "ann", "bob"]),
                created_at=NOON + timedelta(days=n // 10),
            )
            for n in range(40)
        ]
        rows = [said(n, one.group_id, rng.choice(["ann", "cy"])) for n, one in enumerate(made) if rng.random() < 0.4]

        def write(c: Connection) -> None:
            for one in made:
                groups.insert(c, one)
            for row in rows:
                feedback.insert(c, row)

        world.store.write(write)
        by = {row.group_id: row.rater_id for row in rows}

        def fits(one: Group, wanted: RequestFilter) -> bool:
            is_told = one.kind is not GroupKind.DUEL or one.group_id in by
            return (
                (one.kind is wanted.kind if wanted.kind else one.kind is not GroupKind.SHADOW)
                and (wanted.version is None or (is_told and one.completions[0].version == wanted.version))
                and wanted.pool in (None, one.pool)
                and wanted.user in (None, one.user)
                and (wanted.rater is None or by.get(one.group_id) == wanted.rater)
                and (wanted.has_feedback is None or (one.group_id in by) == wanted.has_feedback)
                and (wanted.since is None or one.created_at >= wanted.since)
                and (wanted.until is None or one.created_at < wanted.until)
            )

        filters = [
            RequestFilter(version, pool, kind, user, None, has_feedback)
            for version, pool, kind, user, has_feedback in product(
                (None, 1), (None, Pool.GATE), (None, GroupKind.DUEL), (None, "ann"), (None, True, False)
            )
            if (user is None) or (pool is None)
        ][::2]
        filters += [RequestFilter(rater="cy"), RequestFilter(since=NOON + timedelta(days=2), until=NOON + timedelta(days=4))]
        newest = sorted(made, key=lambda one: (one.created_at, one.group_id), reverse=True)
        with world.store.reading() as c:
            for number, wanted in enumerate(filters):
                found: list[str] = []
                after: str | None = None
                while True:
                    page = requests.page(c, POLICY, wanted, after=after, limit=4, most=20)
                    found += [one.group.group_id for one in page.requests]
                    after = page.after
                    if after is None:
                        break
                fitting = [one.group_id for one in newest if fits(one, wanted)]
                assert found == fitting, wanted
                if number % 3 == 0:
                    goes_on(world, wanted, fitting, after=newest[0].group_id)


def goes_on(world: World, wanted: RequestFilter, fitting: list[str], *, after: str) -> None:
    """A page that goes on by itself, by small looks, holds what fits there."""
    steps = list(requests.through_all(world.store, POLICY, wanted, after=after, room=4, most=7))
    behind = [group_id for group_id in fitting if group_id != after]
    assert [one.group.group_id for step in steps for one in step.new] == behind[:4], wanted
    assert steps[-1].is_cut is False
    if len(behind) < 4:
        assert steps[-1].after is None
        assert steps[-1].looked == steps[-1].there_are


def test_a_request_is_shown_as_text_and_can_be_replayed(serve: Callable[..., RunningServer]) -> None:
    server = serve()
    assert "No request yet" in server.http.get("/requests").text
    server.add_version(1, skill=40)
    reply = server.chat(user=EVIL, n=2, messages=[{"role": "user", "content": EVIL}]).json()
    pick = {"inference_id": reply["id"], "outcome": "chosen", "chosen_index": 0, "reason": EVIL, "rater_id": EVIL}
    assert server.http.post("/v1/preferences", json={**pick, "latency_ms": 5_000}).status_code == 201
    for path in ("/requests", f"/requests/{reply['id']}"):
        page = server.http.get(path)
        assert page.status_code == 200
        assert "<script>alert" not in page.text
        assert "&lt;script&gt;alert" in page.text
    assert "form-action 'self'" in server.http.get("/requests").headers["content-security-policy"]
    before = count(server)
    said = server.http.post("/v1/replays", json={"inference_id": reply["id"], "model": f"{POLICY}@1"}).json()
    assert said["model"] == f"{POLICY}@1"
    assert quality(said["text"]) >= 90
    assert -0.3 < said["logp_mean"] < 0 < said["tokens"]  # the base has -0.46
    assert count(server) == before  # nothing was recorded
    for body, param in (({"model": f"{POLICY}@7"}, "model"), ({"inference_id": "nope"}, "inference_id")):
        refused = server.http.post("/v1/replays", json={"inference_id": reply["id"], "model": f"{POLICY}@1", **body})
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, param)
    assert scopes_of("POST", "/v1/replays") == scopes_of("GET", "/requests/x") == {Scope.OPERATE}


def count(server: RunningServer) -> int:
    with server.store.reading() as c:
        return groups.count(c, POLICY)


def test_a_duel_is_not_unblinded_and_what_was_erased_is_said(serve: Callable[..., RunningServer]) -> None:
    server = serve()
    server.add_version(1)
    server.open_duel(1)
    user = user_of(Pool.GATE)
    reply = server.chat(user=user, n=2).json()
    assert server.group(reply["id"]).kind is GroupKind.DUEL
    page = server.http.get(f"/requests/{reply['id']}").text
    answers = page.split('id="answers"')[1].split('id="replay"')[0]
    assert f"{POLICY}@" not in answers
    assert "log-prob" not in answers
    assert reply["id"] not in server.http.get("/requests?version=1").text
    assert "hidden</span>" in server.http.get("/requests?kind=duel").text
    pick = {"inference_id": reply["id"], "outcome": "chosen", "chosen_index": 0, "latency_ms": 5_000}
    assert server.http.post("/v1/preferences", json=pick).status_code == 201
    assert f"{POLICY}@1" in server.http.get(f"/requests/{reply['id']}").text.split('id="replay"')[0]
    assert reply["id"] in server.http.get("/requests?version=1").text
    assert server.http.delete(f"/v1/chat/completions/{reply['id']}").status_code == 200
    page = server.http.get(f"/requests/{reply['id']}").text
    assert "was erased, for good" in page
    assert 'id="replay"' not in page
    refused = server.http.post("/v1/replays", json={"inference_id": reply["id"], "model": f"{POLICY}@0"})
    assert refused.status_code == 400
    assert "erased" in refused.json()["error"]["message"]


def test_bad_parameters_are_named_and_a_redaction_is_said(serve: Callable[..., RunningServer]) -> None:
    server = serve()
    bad = {"version": "x", "since": "yesterday", "until": "2026-13-01", "pool": "both", "kind": "x", "feedback": "x"}
    for name, value in bad.items():
        refused = server.http.get("/requests", params={name: value})
        assert refused.status_code == 400, name
        assert name in refused.text
    assert server.http.get("/requests?after=nope").status_code == 404
    assert server.http.get("/requests/nope").status_code == 404
    assert "Nothing fits" in server.http.get("/requests?until=9999-12-31&kind=duel").text
    one = asked("chatcmpl-redacted")
    redacted = Group(
        one.group_id, POLICY, one.kind, one.pool, one.prompt, (Completion("a [name]", version=0, is_redacted=True),), NOON
    )

    def write(c: Connection) -> None:
        groups.insert(c, redacted)
        stored.insert(c, redacted)

    server.store.write(write)
    assert "Something was taken out of it" in server.http.get("/requests/chatcmpl-redacted").text


class Slow(FakePolicy):
    """Samples 30 ms after it was asked."""

    def __init__(self) -> None:
        self._begin = Event()
        super().__init__(release=self._begin)

    def sample(self, request: SampleRequest) -> Future[tuple[Completion, ...]]:
        self._begin.clear()
        Timer(0.03, self._begin.set).start()
        return super().sample(request)


def test_how_long_an_answer_took_is_kept_and_can_be_asked_for(serve: Callable[..., RunningServer]) -> None:
    server = serve(policy=Slow())
    whole = server.chat(n=2, user=user_of(Pool.TRAIN)).json()["id"]
    streamed = sse_chunks(server.chat(n=2, user=user_of(Pool.TRAIN), stream=True).text)[0]["id"]
    server.add_version(1)
    server.open_duel(1)
    duel = server.chat(n=2, user=user_of(Pool.GATE)).json()["id"]
    old = asked("chatcmpl-old")
    server.store.write(lambda c: groups.insert(c, old))
    for group_id, is_streamed in ((whole, False), (streamed, True), (duel, False)):
        for answer in server.group(group_id).completions:
            assert answer.total_ms is not None
            assert 29 <= answer.total_ms < 30_000
            assert (answer.first_token_ms is not None) is is_streamed
            assert 29 <= (answer.first_token_ms or 29) <= answer.total_ms
    assert {answer.total_ms for answer in server.group("chatcmpl-old").completions} == {None}
    slow = server.http.get("/requests?slower=28").text
    assert all(group_id in slow for group_id in (whole, streamed, duel))
    assert "chatcmpl-old" not in slow
    assert 'value="28"' in slow
    assert "Nothing fits" in server.http.get("/requests?slower=999999999").text
    assert "answered before times were kept" in server.http.get("/requests").text
    pages = {one: server.http.get(f"/requests/{one}").text for one in (whole, streamed, duel, "chatcmpl-old")}
    assert "first token after" in pages[streamed]
    assert "not streamed" in pages[whole]
    assert pages[whole].count("<dt>whole answer</dt>") == 2
    assert "<dt>whole answer</dt>" not in pages[duel]  # the slower side would tell who gave it
    assert "the slower side" in pages[duel]
    refused = server.http.get("/requests?slower=fast")
    assert refused.status_code == 400
    assert "slower" in refused.text
