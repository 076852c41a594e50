"""What operators write goes through the same hook as everybody's texts, at every route that takes words of theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from tests.server import POLICY, RunningServer, user_of

from pairloop.redaction import Redactor
from pairloop.store.schema import metadata
from pairloop.types import Pool

JANE = "jane.doe@example.org"
WORDS = f"{JANE} asked us to"


@pytest.fixture
def server(serve: Callable[..., RunningServer]) -> RunningServer:
    started = serve()
    started.store.redactor = Redactor.of(started.config)
    return started


@pytest.mark.slow
def test_no_word_of_an_operator_is_stored_as_it_was_typed(server: RunningServer) -> None:
    for number in (1, 2, 3):
        server.add_version(number)
    asked = dict.fromkeys(routes_with_words(server), 0)

    def send(route: str, body: dict[str, Any], **place: str) -> Any:
        asked[route] += 1
        words = {} if route == "/v1/views" else {"reason": WORDS}
        reply = server.http.post(route.format(**place), json={**words, **body})
        assert reply.status_code < 300, (route, reply.text)
        return reply.json()

    first, second = (comparison(server, number) for number in (0, 1))
    pick = {"chosen_index": 0, "latency_ms": 4_000}
    for rater in ("ann", "bob"):
        send("/v1/preferences", {**pick, "inference_id": first, "rater_id": rater, "edited_text": f"write to {JANE}"})
    send("/v1/queue/gold/unanimous", {"min_raters": 2, "limit": 5})
    send("/v1/queue/gold", {"inference_id": second, "chosen_index": 0})
    send("/v1/queue/gold/{inference_id}/take_back", {}, inference_id=second)
    for verb in ("exclude", "include", "enqueue", "dequeue"):
        send(f"/v1/groups/{verb}", {"ids": [second]})
    send("/v1/groups/relabel", {"ids": [first, second], "label": "B"})
    send("/v1/raters/{rater_id}/quarantine", {}, rater_id="ann")
    send("/v1/raters/{rater_id}/release", {}, rater_id="ann")
    send("/v1/raters/quarantine", {"rater_id": "ann"})
    send("/v1/raters/release", {"rater_id": "ann"})
    send("/v1/views", {"name": WORDS, "filters": {"rater": JANE, "q": JANE}})
    send("/v1/cycles", {})
    server.open_duel(3)
    send("/v1/cycles/{cycle_id}/cancel", {}, cycle_id="cycle_3")
    send("/v1/versions/{version_id}/promote", {}, version_id=f"{POLICY}@1")
    send("/v1/versions/{version_id}/promote", {"canary_share": 0.1}, version_id=f"{POLICY}@2")
    send("/v1/policies/{name}/canary/stop", {}, name=POLICY)
    send("/v1/policies/{name}/rollback", {}, name=POLICY)
    send("/v1/schedules/{name}", {"min_pairs": 7}, name=POLICY)
    send("/v1/schedules/{name}/reset", {}, name=POLICY)
    send("/v1/erasures", {"user": "bob"})

    assert [route for route, times in asked.items() if not times] == []
    with server.store.reading() as c:
        for table in metadata.sorted_tables:
            for row in c.execute(sa.select(table)):
                assert JANE not in repr(tuple(row)), table.name
        reasons = c.execute(sa.select(metadata.tables["audit"].c.reason)).scalars().all()
    assert "[EMAIL] asked us to" in reasons
    assert JANE not in (server.config.state_dir / "erasures.jsonl").read_text()


def comparison(server: RunningServer, number: int) -> str:
    """The id of one whose answers differ."""
    messages = [{"role": "user", "content": f"case {number}"}]
    while True:
        reply = server.chat(n=2, user=user_of(Pool.TRAIN, number), messages=messages).json()
        if reply["choices"][0]["message"]["content"] != reply["choices"][1]["message"]["content"]:
            return str(reply["id"])


def routes_with_words(server: RunningServer) -> list[str]:
    """Every route that takes a reason, as the server itself describes them, and the one that takes a view's name."""
    document = server.http.get("/openapi.json").json()
    found = ["/v1/views"]
    for path, verbs in document["paths"].items():
        content = verbs.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        names = [part["$ref"].rpartition("/")[2] for part in parts_of(content.get("schema", {})) if "$ref" in part]
        if any("reason" in document["components"]["schemas"][name].get("properties", {}) for name in names):
            found.append(path)
    return found


def parts_of(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [schema, *schema.get("anyOf", [])]
