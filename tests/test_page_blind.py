"""While a duel is open: no page and no file tells which answer is the challenger's before somebody has picked, and who only
rates is not told how the duel stands."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime

import httpx
import pytest
from sqlalchemy import Connection
from tests.server import POLICY, RunningServer
from tests.store_rows import a_dataset, a_group, a_pick, a_run, a_version, put_groups, put_picks

from pairloop.formats.writer import FORMATS
from pairloop.store import cycles, datasets, duels, keys, runs, samples, triggers, versions
from pairloop.store.keys import Scope
from pairloop.store.samples import Sample
from pairloop.types import Alias, Completion, Cycle, CycleState, CycleStep, Duel, Group, GroupKind, Label, Pool

CHALLENGER, CHAMPION = "it leaves today", "it left on Monday"
STYLE = "an answer of the offline report"
OPEN, PICKED = "g-open", "g-picked"
FIGURES = ("to go", "<progress value", "won · lost · tied", "win rate, 95 %", "evidence E", "@1 against @0", "ann is odd")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A duel of version 1 with two questions: one was skipped and commented on, from the other somebody picked."""
    with RunningServer(tmp_path_factory.mktemp("blind") / "server") as made:
        made.store.write(open_duel)
        put_groups(made.store, of_the_duel(OPEN), of_the_duel(PICKED))
        put_picks(
            made.store,
            a_pick(OPEN, "ann", Label.SKIP),
            a_pick(OPEN, "bob", None, metric="thumbs", value=True, choice_index=0),
            a_pick(PICKED, "ann", Label.A),
        )
        kept = [Sample(PICKED, 0, STYLE, "the champion's")]
        made.store.write(lambda c: samples.put(c, POLICY, 1, kept, datetime.now(UTC)))
        yield made


def open_duel(c: Connection) -> None:
    now = datetime.now(UTC)
    steps = [CycleStep(state, {}, now) for state in (CycleState.BUILDING, CycleState.TRAINING, CycleState.CHECKING)]
    steps.append(CycleStep(CycleState.DUELLING, {"duel_id": "duel_1"}, now))
    cycles.insert(c, Cycle("cycle_bot_1", POLICY, 1, 0, "test", now, tuple(steps)))
    datasets.insert(c, replace(a_dataset("data_1"), policy=POLICY), feedback_seq=0, cycle_id="cycle_bot_1", pairs=[])
    runs.insert(c, replace(a_run(), policy=POLICY))
    versions.insert(c, a_version(1, policy=POLICY, run_id="run_1"))
    duels.open(c, Duel("duel_1", "cycle_bot_1", POLICY, 0, 1, now))
    versions.set_alias(c, POLICY, Alias.CHALLENGER, 1)
    triggers.put(c, POLICY, "ann is odd", now)


def of_the_duel(name: str) -> Group:
    sides = (Completion(CHALLENGER, (1,), (-0.5,), version=1), Completion(CHAMPION, (1,), (-0.25,), version=0))
    return a_group(name, policy=POLICY, kind=GroupKind.DUEL, pool=Pool.GATE, completions=sides, duel_id="duel_1", user="ann")


def test_the_versions_page_shows_the_answers_only_where_somebody_picked(server: RunningServer) -> None:
    text = server.http.get("/versions/1").text
    assert text.count(CHALLENGER) == text.count(CHAMPION) == 1
    assert f"hello {PICKED}" in text
    assert f"hello {OPEN}" not in text
    assert STYLE not in text, "nobody who picks knows a side by its style"


@pytest.mark.parametrize(("name", "told"), [(OPEN, False), (PICKED, True)])
def test_lists_and_pages_of_one_comparison_name_no_version_before_a_pick(server: RunningServer, name: str, told: bool) -> None:
    assert ("version 1" in server.http.get(f"/preferences/{name}").text) == told
    request = server.http.get(f"/requests/{name}").text
    assert (f"{POLICY}@1</h3>" in request) == told
    assert ("log-prob a token, mean" in request) == told  # the challenger is the surer of the two
    for path in ("/preferences", "/requests"):
        (row,) = (row for row in server.http.get(path).text.split("<tr")[1:] if f"{path}/{name}" in row)
        assert ("@1" in row) == told, path


@pytest.mark.parametrize("number", [0, 1])
def test_no_filter_facet_or_file_sorts_the_sides(server: RunningServer, number: int) -> None:
    for path in ("/preferences", "/requests", "/v1/groups/export"):
        found = server.http.get(path, params={"version": number}).text
        assert f"hello {PICKED}" in found, path
        assert f"hello {OPEN}" not in found, path
    facets = re.findall(r"version=(\d+)\">@\d+ <span class=\"fine\">(\d+)<", server.http.get("/preferences").text)
    assert dict(facets) == {"0": "1", "1": "1"}


def test_the_exported_lines_carry_no_version(server: RunningServer) -> None:
    for form in FORMATS:
        lines = server.http.get("/v1/groups/export", params={"kind": "duel", "format": form}).text
        assert not re.search(rf"{POLICY}|version|logp", lines), form
        assert form != "comparisons" or lines.count("hello") == 2


def with_key(server: RunningServer, *scopes: Scope) -> dict[str, str]:
    """The headers of a new key."""
    made, token = keys.new("test", scopes)
    server.store.write(lambda c: keys.insert(c, made))
    server.app.state.context.keys.forget(made.key_id)
    return {"authorization": f"Bearer {token}"}


@pytest.mark.parametrize("scope", [Scope.RATE, Scope.OPERATE])
def test_how_the_duel_stands_is_told_to_operators_only(server: RunningServer, scope: Scope) -> None:
    headers = with_key(server, scope)
    for path in ("/", "/page/live"):
        reply = server.http.get(path, headers=headers)
        assert reply.status_code == 200
        assert "duelling" in reply.text
        assert [word for word in FIGURES if word in reply.text] == ([] if scope is Scope.RATE else list(FIGURES)), path
    closed = (
        "/home",
        "/versions/1",
        "/preferences",
        f"/preferences/{OPEN}",
        "/gates",
        "/v1/groups/export",
        "/v1/status",
        "/v1/duels",
    )
    statuses = {server.http.get(path, headers=headers).status_code for path in closed}
    assert statuses == ({403} if scope is Scope.RATE else {200})


def test_who_only_rates_asks_the_policy_and_no_version_of_it(serve: Callable[..., RunningServer]) -> None:
    """Its answer beside those of an open duel would say whose style is whose, and so would that there is none."""
    server = serve()
    server.policy.load(server.add_version(1))
    server.open_duel(1)
    rater, client = (with_key(server, *scopes) for scopes in ((Scope.RATE,), (Scope.RATE, Scope.INFERENCE)))

    def ask(model: str, headers: dict[str, str], **more: bool) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "hello"}], "model": model, **more}
        return server.http.post("/v1/chat/completions", json=body, headers=headers)

    pinned = [f"{POLICY}@{name}" for name in ("champion", "challenger", "base", "1")]
    for model in (*pinned, f"{POLICY}@canary", f"{POLICY}@99", "ft:x"):
        for refused in (ask(model, rater), ask(model, rater, stream=True)):
            error = refused.json()["error"]
            assert (refused.status_code, error["param"], error["code"]) == (403, "model", "insufficient_scope"), model
            assert f"'{POLICY}'" in error["message"]
    assert {ask(model, client).status_code for model in pinned} == {200}
    assert ask(POLICY, rater).status_code == 200
