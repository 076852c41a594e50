"""The stream of a search: who may go on hearing it, and how many are made at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from fastapi import Request, Response
from tests.server import RunningServer
from tests.test_access import bearer, make_key

from pairloop.errors import UnavailableError
from pairloop.store import keys
from pairloop.store.keys import Scope
from pairloop.web.context import SEARCHES_AT_ONCE, Here
from pairloop.web.pages.searching import Found, going_on

WAIT_S = 20.0


def offer(server: RunningServer, path: str, steps: Iterator[Found]) -> None:
    """A page of this server whose search takes these steps."""

    async def search(request: Request, context: Here) -> Response:
        return going_on(request, context, steps)

    server.app.add_api_route(path, search)


def test_a_search_ends_with_the_key_it_was_asked_with(serve: Callable[..., RunningServer]) -> None:
    server = serve()
    admin, key = make_key(server), keys.new("looks", [Scope.OPERATE])
    server.store.write(lambda c: keys.insert(c, key[0]))

    def steps() -> Iterator[Found]:
        yield Found("before", {})
        server.http.delete(f"/v1/keys/{key[0].key_id}", headers=bearer(admin)).raise_for_status()
        yield Found("after", {})

    offer(server, "/page/ended", steps())
    heard = server.http.get("/page/ended", headers=bearer(key[1])).raise_for_status().text
    assert "before" in heard
    assert "after" not in heard
    assert "event: end" not in heard  # the page says that it broke off


def test_a_search_that_the_store_ends_does_not_say_that_it_went_through_all(serve: Callable[..., RunningServer]) -> None:
    server = serve()

    def steps() -> Iterator[Found]:
        yield Found("before", {})
        raise UnavailableError("the store is away")

    offer(server, "/page/away", steps())
    heard = server.http.get("/page/away").raise_for_status().text
    assert "before" in heard
    assert "event: end" not in heard


def test_many_searches_leave_threads_to_everybody_else(serve: Callable[..., RunningServer]) -> None:
    server = serve()
    begun, go_on = SimpleQueue[int](), threading.Event()

    def steps(number: int) -> Iterator[Found]:
        begun.put(number)
        assert go_on.wait(WAIT_S)
        yield Found("", {})

    many = SEARCHES_AT_ONCE + 30
    with ThreadPoolExecutor(many) as askers:
        try:
            for number in range(many):
                offer(server, f"/page/many/{number}", steps(number))
            asked = [askers.submit(server.http.get, f"/page/many/{number}") for number in range(many)]
            for _ in range(SEARCHES_AT_ONCE):
                begun.get(timeout=WAIT_S)
            assert server.http.get("/requests", timeout=5.0).status_code == 200  # is read in such a thread
            assert begun.empty()
        finally:
            go_on.set()
        assert {one.result(WAIT_S).status_code for one in asked} == {200}
