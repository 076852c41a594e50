"""Stored completions over HTTP, by the official client: listing, filters, pages, metadata, deletion; a duel stays blind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection
from tests.openai_schema import validate
from tests.server import POLICY, RunningServer, sse_chunks, user_of
from tests.store_rows import BOT, a_group, put_groups
from tests.stores import open_store

from pairloop.config import Config, StoreSection
from pairloop.loop.gate import votes
from pairloop.loop.pairs import PairRules, compile_pairs
from pairloop.store import Store, duels, feedback, groups, stored
from pairloop.store.database import alembic_config, parse_url, writer_engine
from pairloop.store.schema import metadata as schema
from pairloop.types import Completion, FinishReason, GroupKind, Pool

ASK: Any = [{"role": "user", "content": "Where is my order?"}]
Serve = Callable[..., RunningServer]


@pytest.fixture
def server(serve: Serve) -> RunningServer:
    return serve()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for all tests that change nothing which another would see."""
    with RunningServer(tmp_path_factory.mktemp("shared") / "server") as server:
        yield server


def listed(server: RunningServer, **query: Any) -> list[str]:
    return [one.id for one in server.openai.chat.completions.list(**query)]


def test_all_that_was_answered_is_listed_but_what_says_store_false(server: RunningServer) -> None:
    create = server.openai.chat.completions.create
    one, two, hidden = (create(model=POLICY, messages=ASK, n=2, store=store) for store in (None, True, False))
    streamed = sse_chunks(server.chat(stream=True).text)[0]["id"]
    assert listed(server) == [one.id, two.id, streamed]
    assert listed(server, order="desc") == [streamed, two.id, one.id]
    assert server.openai.chat.completions.retrieve(hidden.id).choices == hidden.choices
    picked = server.http.post("/v1/preferences", json={"inference_id": hidden.id, "chosen_index": 0})
    assert picked.status_code == 201, "out of the listing is not out of the loop"


def test_pages_follow_one_another_also_behind_a_deleted_one(server: RunningServer) -> None:
    ids = [server.chat().json()["id"] for _ in range(7)]
    assert listed(server, limit=2) == ids
    assert listed(server, limit=3, order="desc") == ids[::-1]
    first = server.openai.chat.completions.list(limit=3)
    assert (first.has_more, [one.id for one in first.data]) == (True, ids[:3])
    server.openai.chat.completions.delete(ids[2])
    assert listed(server, after=ids[2]) == ids[3:]
    assert listed(server, after=ids[-1]) == []


def test_metadata_filters_and_is_replaced_by_the_client(server: RunningServer) -> None:
    create = server.openai.chat.completions.create
    shop, both = (create(model=POLICY, messages=ASK, metadata=pairs) for pairs in ({"shop": "a"}, {"shop": "a", "lang": "de"}))
    create(model=POLICY, messages=ASK, metadata={"shop": "b", "lang": "de"})
    assert listed(server, metadata={"shop": "a"}) == [shop.id, both.id]
    assert listed(server, metadata={"shop": "a", "lang": "de"}) == [both.id]
    assert listed(server, metadata={"shop": "c"}) == []
    updated = server.openai.chat.completions.update(shop.id, metadata={"shop": "c"})
    assert updated.metadata == {"shop": "c"}
    assert server.openai.chat.completions.retrieve(shop.id).metadata == {"shop": "c"}
    assert listed(server, metadata={"shop": "c"}) == [shop.id]
    assert listed(server, metadata={"shop": "a"}) == [both.id]
    assert server.group(shop.id).metadata == {"shop": "a"}, "the evidence stays as it was"
    assert server.openai.chat.completions.update(shop.id, metadata=None).metadata == {}
    assert listed(server, metadata={"shop": "c"}) == []


def test_a_hidden_completions_metadata_never_lists_it(server: RunningServer) -> None:
    hidden = server.chat(store=False, metadata={"a": "b"}).json()["id"]
    server.openai.chat.completions.update(hidden, metadata={"a": "c"})
    assert listed(server, metadata={"a": "b"}) == listed(server, metadata={"a": "c"}) == []


def test_the_messages_of_a_completion_are_paged(server: RunningServer) -> None:
    messages: Any = [{"role": "system", "content": "be kind"}, *ASK, {"role": "assistant", "content": "which?"}, *ASK]
    reply = server.openai.chat.completions.create(model=POLICY, messages=messages)
    pages = server.openai.chat.completions.messages.list(reply.id, limit=3)
    assert pages.has_more
    shown = list(pages)
    assert [(one.role, one.content) for one in shown] == [(one["role"], one["content"]) for one in messages]
    assert [one.id for one in shown] == [f"{reply.id}-{place}" for place in range(4)]
    assert [one.id for one in server.openai.chat.completions.messages.list(reply.id, order="desc")] == [
        one.id for one in shown[::-1]
    ]
    for after in ("nobody", f"{reply.id}-9"):
        with pytest.raises(openai.NotFoundError) as unknown:
            server.openai.chat.completions.messages.list(reply.id, after=after)
        assert unknown.value.param == "after"


def test_deleted_is_gone_from_the_wire_and_its_texts_from_the_store(server: RunningServer) -> None:
    secret: Any = [{"role": "user", "content": "my card is 1234-5678"}]
    reply = server.openai.chat.completions.create(model=POLICY, messages=secret, n=2, metadata={"card": "5678"}, user="rita")
    server.http.post("/v1/preferences", json={"inference_id": reply.id, "chosen_index": 0}).raise_for_status()
    answers = [choice.message.content for choice in reply.choices]
    deleted = server.openai.chat.completions.delete(reply.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (reply.id, True, "chat.completion.deleted")
    completions = server.openai.chat.completions
    for gone in (
        lambda: completions.retrieve(reply.id),
        lambda: completions.delete(reply.id),
        lambda: completions.update(reply.id, metadata={}),
        lambda: completions.messages.list(reply.id),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            gone()
        assert refused.value.param == "completion_id"
    assert listed(server) == listed(server, metadata={"card": "5678"}) == []
    for path, body, param in (
        ("/v1/preferences", {"inference_id": reply.id, "chosen_index": 1}, "inference_id"),
        ("/v1/chat/completions", {"model": POLICY, "messages": ASK, "metadata": {"parent": reply.id}}, "metadata.parent"),
    ):
        refusal = server.http.post(path, json=body)
        assert refusal.status_code in (400, 404)
        assert refusal.json()["error"]["param"] == param

    def dumped(c: Any) -> str:
        return repr([row for table in schema.sorted_tables for row in c.execute(sa.select(table))])

    with server.store.reading() as c:
        everything = dumped(c)
        labelled, _ = feedback.labelled_since(c, POLICY, after_seq=0, kinds=[GroupKind.TRAIN, GroupKind.HELDOUT])
    assert "1234-5678" not in everything
    assert "5678" not in everything
    assert all(str(answer) not in everything for answer in answers)
    compiled = compile_pairs(labelled, PairRules())
    assert (compiled.pairs, compiled.dropped) == ([], {"deleted": 1}), "the pick is kept, with its reason"


def test_an_erased_group_is_neither_labelled_nor_asked_again(tmp_path: Path) -> None:
    with open_store(tmp_path / "artifacts") as store:
        put_groups(store, a_group("gone"), a_group("kept", at=1))
        for name in ("gone", "kept"):
            store.write(partial(stored.insert, group=a_group(name)))
        assert store.write(lambda c: stored.delete(c, "gone", a_group().created_at))
        with store.reading() as c:
            assert groups.get(c, "gone").is_erased  # type: ignore[union-attr]
            assert [one.group_id for one in groups.recent_prompts(c, BOT, pool=Pool.TRAIN, limit=9)] == ["kept"]
            found = groups.unlabelled(
                c, BOT, pool=None, before=a_group(at=9).created_at, limit=9, kinds=[GroupKind.TRAIN], min_completions=2
            )
        assert [one.group_id for one in found] == ["kept"]


def test_a_duels_vote_outlives_the_texts(server: RunningServer) -> None:
    server.add_version(1)
    duel = server.open_duel(1)
    body = server.chat(n=2, user=user_of(Pool.GATE)).json()
    server.http.post("/v1/preferences", json={"inference_id": body["id"], "chosen_index": 0}).raise_for_status()

    def outcomes() -> list[int]:
        with server.store.reading() as c:
            return [vote.outcome for vote in votes(duel, duels.picks(c, duel.duel_id))]

    before = outcomes()
    server.openai.chat.completions.delete(body["id"])
    assert outcomes() == before
    assert before in ([1], [-1])


def test_no_listing_unblinds_a_duel(server: RunningServer) -> None:
    server.add_version(1)
    server.open_duel(1)
    judge = user_of(Pool.GATE)
    blind = server.chat(n=2, user=judge).json()["id"]
    pinned = server.openai.chat.completions.create(model=f"{POLICY}@challenger", messages=ASK).id
    plain = server.chat(n=2, user=user_of(Pool.TRAIN)).json()["id"]
    for picked in (False, True):
        if picked:
            server.http.post("/v1/preferences", json={"inference_id": blind, "chosen_index": 1}).raise_for_status()
        assert listed(server, model=POLICY) == [blind, pinned, plain]
        for name in ("challenger", "1"):
            assert listed(server, model=f"{POLICY}@{name}") == [pinned]
        for name in ("champion", "base", "0"):
            assert listed(server, model=f"{POLICY}@{name}") == [plain]
        page = server.http.get("/v1/chat/completions").json()
        shown = page["data"][0]
        assert (shown["id"], shown["model"]) == (blind, POLICY)
        assert ("versions" in shown) is picked
        if not picked:
            assert "@" not in repr(shown)
    assert listed(server, model="gpt-4") == []


def test_bodies_follow_the_published_schema(server: RunningServer) -> None:
    validate("ChatCompletionList", server.http.get("/v1/chat/completions").json())
    reply = server.chat(n=2, metadata={"a": "b"}, seed=3, user="rita").json()
    validate("ChatCompletionList", server.http.get("/v1/chat/completions").json())
    path = f"/v1/chat/completions/{reply['id']}"
    validate("CreateChatCompletionResponse", server.http.post(path, json={"metadata": {"c": "d"}}).json())
    # Their schema of a listed message knows the assistant's role alone; the rest of it holds.
    messages = server.http.get(f"{path}/messages").json()
    validate("ChatCompletionMessageList", {**messages, "data": [{**one, "role": "assistant"} for one in messages["data"]]})
    validate("ChatCompletionDeleted", server.http.delete(path).json())


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=many", "limit"),
        ("order=up", "order"),
        ("colour=red", "colour"),
        ("metadata=red", "metadata"),
        ("metadata[a]=1&metadata[a]=2", "metadata[a]"),
        ("&".join(f"metadata[k{i}]=v" for i in range(17)), "metadata"),
        (f"after={'x' * 129}", "after"),
        ("after=%00", "after"),
        ("model=%00", "model"),
        ("metadata[a]=%00", "metadata[a]"),
        (f"metadata[a]={'x' * 513}", "metadata[a]"),
    ],
)
def test_bad_queries_are_refused_by_name(shared_server: RunningServer, query: str, param: str) -> None:
    response = shared_server.http.get(f"/v1/chat/completions?{query}")
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert shared_server.http.get("/v1/chat/completions").status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {f"k{i}": "v" for i in range(17)}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {"k": "a\x00b"}}, "metadata.k"),
        ({"metadata": {}, "store": True}, "store"),
        ([], "body"),
    ],
)
def test_bad_metadata_is_refused_by_name(shared_server: RunningServer, body: Any, param: str | None) -> None:
    reply = shared_server.chat(metadata={"a": "b"}).json()["id"]
    response = shared_server.http.post(f"/v1/chat/completions/{reply}", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert shared_server.openai.chat.completions.retrieve(reply).metadata == {"a": "b"}


PAIRS = st.dictionaries(st.sampled_from("abc"), st.sampled_from("xy"))
DRAWN = st.lists(st.tuples(PAIRS, st.sampled_from([0, 1]), st.booleans(), st.booleans()), max_size=8)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with open_store(tmp_path_factory.mktemp("many") / "artifacts") as opened:
        yield opened


NUMBERS = count()


@settings(max_examples=40, deadline=None)
@given(drawn=DRAWN, wanted=PAIRS, version=st.sampled_from([None, 0, 1]), newest_first=st.booleans(), limit=st.integers(1, 4))
def test_pages_hold_exactly_what_was_asked_for(
    many: Store,
    drawn: list[tuple[dict[str, str], int, bool, bool]],
    wanted: dict[str, str],
    version: int | None,
    newest_first: bool,
    limit: int,
) -> None:
    """Against the plain filter of a list, page after page; each example is a policy of its own."""
    bot = f"bot-{next(NUMBERS)}"
    asked: dict[str, Any] = {"model": None if version is None else f"{bot}@{version}", "metadata": wanted, "limit": limit}
    expected: list[str] = []

    def write(c: Connection) -> None:
        for place, (metadata, number, is_listed, is_deleted) in enumerate(drawn):
            answers = (Completion("a", version=number),)
            group = a_group(f"{bot}-{place}", policy=bot, metadata=metadata, completions=answers)
            groups.insert(c, group)
            stored.insert(c, group, is_listed=is_listed)
            if is_deleted:
                stored.delete(c, group.group_id, group.created_at)
            elif is_listed and wanted.items() <= metadata.items() and version in (None, number):
                expected.append(group.group_id)

    many.write(write)
    found: list[str] = []
    with many.reading() as c:
        while page := stored.page(c, bot, after=found[-1] if found else None, newest_first=newest_first, **asked):
            assert len(page) <= limit
            found += [one.group.group_id for one in page]
    assert found == (expected[::-1] if newest_first else expected)


def test_what_was_answered_before_the_migration_is_listed(tmp_path: Path, blank_url: str) -> None:
    from alembic import command

    duel_sides = (Completion("a", version=0), Completion("b", version=1))
    asked = (
        a_group("plain", metadata={"shop": "a"}),
        a_group("imported", kind=GroupKind.IMPORTED),
        a_group("streaming", answers=()),
        a_group("left", completions=(Completion("a", finish_reason=FinishReason.ABANDONED),)),
        a_group("fought", kind=GroupKind.DUEL, completions=duel_sides),
    )
    engine = writer_engine(parse_url(blank_url), "off")
    with open_store(tmp_path / "now" / "artifacts") as today, engine.begin() as c:
        command.upgrade(alembic_config(c), "0001")
        put_groups(today, *asked)
        for name in ("groups", "completions"):
            table = sa.Table(name, sa.MetaData(), autoload_with=c)  # with the columns of that time
            with today.reading() as now:
                c.execute(sa.insert(table), [dict(row) for row in now.execute(sa.select(table)).mappings()])
    engine.dispose()
    config = Config(state_dir=tmp_path, store=StoreSection(database=blank_url))
    with Store.open(config) as store, store.reading() as c:
        assert [one.group.group_id for one in stored.page(c, BOT, limit=9)] == ["fought", "plain"]
        assert [one.group.group_id for one in stored.page(c, BOT, model=f"{BOT}@0", limit=9)] == ["plain"]
        (kept,) = stored.page(c, BOT, metadata={"shop": "a"}, limit=9)
        assert kept.metadata == {"shop": "a"}
