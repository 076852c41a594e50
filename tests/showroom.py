"""A server as it looks after some days of use, furnished over HTTP: customers who ask and pick, cycles that train and duel.

For tests and screenshots of pages. Everything in it came about as it does for users: no row is written by hand.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.server import POLICY, RunningServer, fake_config

from pairloop.policy.fake import quality

QUESTIONS = (
    "Where is my order {}?",
    "Can I return the shoes of order {}?",
    "How do I change the address of order {}?",
    "The discount code SAVE{} does not work.",
    "Please cancel subscription {}.",
    "Invoice {} has the wrong name on it.",
)
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "policy": {"model": "fake", "method": "full", "name": POLICY},
    "schedule": {"min_pairs": 100_000, "poll": "1s"},
    "train": {"min_pairs": 4},
    "gate": {"min_picks": 20, "min_raters": 5, "max_picks": 400},
    "serve": {"gate_share": 0.4},
    "evaluate": {"prompts": 16},
}
PATIENCE = 2_000
"""Customers at most until a cycle has ended."""


def showroom(folder: Path, *, policy: Any = None) -> RunningServer:
    """A server to be furnished; ``with`` starts it."""
    return RunningServer(folder, config=fake_config(folder, **SETTINGS), policy=policy, turning=True)


def furnish(server: RunningServer, *, cycles: int = 3, customers: int = 120, seed: int = 0) -> None:
    """``cycles`` whole cycles, each after so many customers; some give thumbs, a few click blindly, nobody is perfect."""
    rng = random.Random(seed)
    for number in range(cycles):
        for _ in range(customers):
            customer(server, rng)
        reply = server.http.post("/v1/cycles", json={"reason": f"furnished {number}"})
        assert reply.status_code == 202, reply.text
        for _ in range(PATIENCE):
            customer(server, rng)
            status = server.http.get("/v1/status").json()
            if status["cycle"] is None and status["pending_trigger"] is None:
                break
        else:
            raise AssertionError("the cycle did not end")


def customer(server: RunningServer, rng: random.Random) -> None:
    """One request of one of eight hundred people, and what he or she says about it."""
    who = rng.randrange(12) if rng.random() < 0.3 else rng.randrange(800)  # regulars, and all the others
    user = f"customer-{who}"
    question = rng.choice(QUESTIONS).format(rng.randrange(100, 10_000))
    n = 1 if rng.random() < 0.15 else 2
    reply = server.chat(user=user, n=n, messages=[{"role": "user", "content": question}]).json()
    texts = [choice["message"]["content"] for choice in reply["choices"]]
    said: dict[str, Any] = {"inference_id": reply["id"]}
    if n == 1:
        value = {"metric_name": "thumbs", "value": quality(texts[0]) > rng.randrange(4), "choice_index": 0}
        given = server.http.post("/v1/feedback", json={**said, **value})
        assert given.status_code == 201, given.text
        return
    if rng.random() < 0.1:
        return  # looked, and said nothing
    if who < 2:
        chosen: dict[str, Any] = {"outcome": "chosen", "chosen_index": 0}  # always the left one
    elif quality(texts[0]) == quality(texts[1]):
        chosen = {"outcome": rng.choice(["tie", "both_bad", "skip"])}
    else:
        better = max((0, 1), key=lambda index: quality(texts[index]))
        chosen = {"outcome": "chosen", "chosen_index": better if rng.random() < 0.9 else 1 - better}
    pick = {**said, **chosen, "rater_id": user, "shown_order": [0, 1], "latency_ms": rng.randrange(1_200, 9_000)}
    given = server.http.post("/v1/preferences", json=pick)
    assert given.status_code == 201, given.text
