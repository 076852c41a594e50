"""The client of a server's own resources. For chat and fine-tuning jobs the official ``openai`` client serves as it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from pairloop.client.shapes import (
    CycleResource,
    DatasetResource,
    DuelResource,
    FeedbackLineage,
    FeedbackReceipt,
    GateResource,
    Lineage,
    Moved,
    Page,
    PolicyResource,
    RaterResource,
    ScheduleResource,
    StepResource,
    Triggered,
    VersionResource,
)
from pairloop.client.transport import Transport

Item = TypeVar("Item", bound=BaseModel)

ENDED = frozenset({"promoted", "held", "rejected", "nothing_to_train", "failed"})
"""The states that a cycle does not leave."""
JOB_ENDED = frozenset({"succeeded", "failed", "cancelled"})
PAGE = 100


class Resource(Generic[Item]):
    """One kind of resource: ``get`` one, or iterate over all of them, read page by page."""

    def __init__(self, transport: Transport, path: str, shape: type[Item]) -> None:
        self._transport = transport
        self._path = path
        self._shape = shape

    def get(self, id: str) -> Item:
        """NotFound where there is none of that id."""
        return self._shape.model_validate(self._transport.call("GET", f"{self._path}/{quote(id, safe='')}").json())

    def page(self, *, after: str | None = None, limit: int = 20) -> Page[Item]:
        """Those that follow ``after``, at most ``limit`` (100)."""
        reply = self._transport.call("GET", self._path, params={"after": after, "limit": limit})
        return Page[self._shape].model_validate(reply.json())  # type: ignore[name-defined]

    def __iter__(self) -> Iterator[Item]:
        after: str | None = None
        while True:
            page = self.page(after=after, limit=PAGE)
            yield from page.data
            if not page.has_more:
                return
            after = page.last_id


class Client:
    """``with Client("http://127.0.0.1:8000", api_key="sk-pairloop-…") as client: …``

    Raises ApiError (BadRequest, AccessDenied, NotFound, Conflict, RateLimited, ServerError) and Unreachable. 408, 429 and 503
    are tried again ``retries`` times, after the time that the server asks for; a POST keeps its Idempotency-Key meanwhile, so
    that it is done once. ``poll_s``: how often ``run_cycle`` and ``follow_job`` look.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 4,
        poll_s: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
        http: httpx.Client | None = None,
    ) -> None:
        self._transport = Transport(base_url, api_key, timeout_s=timeout_s, retries=retries, sleep=sleep, http=http)
        self._poll_s = poll_s
        self._sleep = sleep
        self.policies = Resource(self._transport, "/v1/policies", PolicyResource)
        self.versions = Resource(self._transport, "/v1/versions", VersionResource)
        self.cycles = Resource(self._transport, "/v1/cycles", CycleResource)
        self.datasets = Resource(self._transport, "/v1/datasets", DatasetResource)
        self.duels = Resource(self._transport, "/v1/duels", DuelResource)
        self.gates = Resource(self._transport, "/v1/gates", GateResource)
        self.raters = Resource(self._transport, "/v1/raters", RaterResource)
        self.schedules = Resource(self._transport, "/v1/schedules", ScheduleResource)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._transport.close()

    # -- feedback

    def prefer(
        self,
        inference_id: str,
        chosen_index: int | None = None,
        *,
        outcome: Literal["chosen", "tie", "both_bad", "skip"] = "chosen",
        **fields: Any,
    ) -> FeedbackReceipt:
        """Record a pick between two answers; ``fields``: what else POST /v1/preferences takes (rater_id, reason, …)."""
        picked = {} if chosen_index is None else {"chosen_index": chosen_index}
        body = {"inference_id": inference_id, "outcome": outcome, **picked, **fields}
        return FeedbackReceipt.model_validate(self._transport.call("POST", "/v1/preferences", json=body).json())

    def value(self, inference_id: str, metric_name: str, value: bool | float | str, **fields: Any) -> FeedbackReceipt:
        """Record a value about one answer: thumbs, score, comment, demonstration, or a metric of your own."""
        body = {"inference_id": inference_id, "metric_name": metric_name, "value": value, **fields}
        return FeedbackReceipt.model_validate(self._transport.call("POST", "/v1/feedback", json=body).json())

    def lineage(self, *feedback_ids: str) -> list[FeedbackLineage]:
        """What became of feedback, by the ids of its receipts: waiting, in which version, left out and why. 50 ids at most."""
        params = {"feedback_id": list(feedback_ids)}
        return Lineage.model_validate(self._transport.call("GET", "/v1/lineage", params=params).json()).data

    # -- the loop

    def trigger_cycle(self, *, reason: str | None = None) -> Triggered:
        """Ask for a cycle now; returns at once."""
        return Triggered.model_validate(self._transport.call("POST", "/v1/cycles", json=_body(reason=reason)).json())

    def set_schedule(self, policy: str, **settings: Any) -> ScheduleResource:
        """Set when cycles begin: ``enabled``, ``every``, ``cron``, ``min_pairs``; ``reason`` is kept, ``dryrun`` only looks."""
        return ScheduleResource.model_validate(
            self._transport.call("POST", f"/v1/schedules/{quote(policy, safe='')}", json=settings).json()
        )

    def reset_schedule(self, policy: str, *settings: str, reason: str | None = None) -> ScheduleResource:
        """Let the file's values hold again; of all settings where none is named."""
        body = {"settings": list(settings), "reason": reason}
        path = f"/v1/schedules/{quote(policy, safe='')}/reset"
        return ScheduleResource.model_validate(self._transport.call("POST", path, json=body).json())

    def run_cycle(self, *, reason: str | None = None) -> Iterator[StepResource]:
        """Ask for a cycle, and yield its steps as they come, until one ends it. Where a cycle is open, that one is followed.

        A duel goes on for as long as it takes; stop iterating to stop looking.
        """
        before = {cycle.id for cycle in self.cycles.page(limit=1).data}
        running = self.trigger_cycle(reason=reason).running
        while running is None:
            running = next((cycle for cycle in self.cycles.page(limit=1).data if cycle.id not in before), None)
            if running is None:
                self._sleep(self._poll_s)
        yield from self.follow_cycle(running.id)

    def follow_cycle(self, cycle_id: str) -> Iterator[StepResource]:
        """The steps of a cycle, those that it has and those that come, until one ends it."""
        seen = 0
        while True:
            cycle = self.cycles.get(cycle_id)
            yield from cycle.steps[seen:]
            seen = len(cycle.steps)
            if cycle.state in ENDED:
                return
            self._sleep(self._poll_s)

    def cancel_cycle(self, cycle_id: str, *, reason: str | None = None) -> CycleResource:
        """End a cycle as held: its training or its duel stops, the champion stays."""
        path = f"/v1/cycles/{quote(cycle_id, safe='')}/cancel"
        return CycleResource.model_validate(self._transport.call("POST", path, json=_body(reason=reason)).json())

    def promote(self, version_id: str, *, reason: str | None = None) -> Moved:
        """Make a version the champion, past the gate."""
        path = f"/v1/versions/{quote(version_id, safe='')}/promote"
        return Moved.model_validate(self._transport.call("POST", path, json=_body(reason=reason)).json())

    def rollback(self, policy: str, *, to: int | None = None, reason: str | None = None) -> Moved:
        """Make an earlier champion the champion again: the one before the present one, or version ``to``."""
        path = f"/v1/policies/{quote(policy, safe='')}/rollback"
        return Moved.model_validate(self._transport.call("POST", path, json=_body(to=to, reason=reason)).json())

    def export_dataset(self, dataset_id: str, *, format: str = "openai") -> bytes:
        """The dataset's training pairs as JSONL rows of a family."""
        path = f"/v1/datasets/{quote(dataset_id, safe='')}/export"
        return self._transport.call("POST", path, params={"format": format}, keyed=False).content

    def status(self) -> dict[str, Any]:
        """Where the loop stands."""
        told: dict[str, Any] = self._transport.call("GET", "/v1/status").json()
        return told

    # -- fine-tuning jobs

    def follow_job(self, job_id: str) -> Iterator[Mapping[str, Any]]:
        """The events of a fine-tuning job in order, those that it has and those that come, until it has ended."""
        path, seen = f"/v1/fine_tuning/jobs/{quote(job_id, safe='')}", set[str]()
        while True:
            ended = self._transport.call("GET", path).json()["status"] in JOB_ENDED  # asked first: no event follows its end
            for event in reversed(self._new_events(path, seen)):
                seen.add(event["id"])
                yield event
            if ended:
                return
            self._sleep(self._poll_s)

    def _new_events(self, path: str, seen: set[str]) -> list[Mapping[str, Any]]:
        """Events newest first, back to one that was seen."""
        found: list[Mapping[str, Any]] = []
        after: str | None = None
        while True:
            page = self._transport.call("GET", f"{path}/events", params={"limit": PAGE, "after": after}).json()
            for event in page["data"]:
                if event["id"] in seen:
                    return found
                found.append(event)
            if not page["has_more"] or not page["data"]:
                return found
            after = page["data"][-1]["id"]


def _body(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
