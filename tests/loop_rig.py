"""A whole loop on the fake policy, without HTTP: groups and picks are written as serving would write them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection
from tests.stores import lay_out

from pairloop.config import Config, parse_config
from pairloop.loop.cycle import Loop, ensure_base
from pairloop.policy.fake import FakePolicy, quality
from pairloop.policy.protocols import SampleRequest
from pairloop.store import Store, duels, feedback, groups, new_group_id, new_id, versions
from pairloop.store.database import parse_url
from pairloop.types import (
    PREFERENCE_METRIC,
    Alias,
    Completion,
    Duel,
    Feedback,
    Group,
    GroupKind,
    Label,
    Message,
    Pool,
    Source,
)

Picker = Callable[[random.Random, Completion, Completion], Label]


def better(_: random.Random, a: Completion, b: Completion) -> Label:
    """Someone who always sees which answer is better."""
    if quality(a.text) == quality(b.text):
        return Label.TIE
    return Label.A if quality(a.text) > quality(b.text) else Label.B


def worse(rng: random.Random, a: Completion, b: Completion) -> Label:
    label = better(rng, a, b)
    return {Label.A: Label.B, Label.B: Label.A}.get(label, label)


def coin(rng: random.Random, _a: Completion, _b: Completion) -> Label:
    return rng.choice([Label.A, Label.B])


def score(_messages: list[dict[str, str]], completion: str) -> float:
    """A verifier: ``tests.loop_rig:score``."""
    return float(quality(completion))


def settings(tmp_path: Path, **sections: dict[str, Any]) -> Config:
    data: dict[str, Any] = {
        "state_dir": tmp_path,
        "policy": {"model": "fake", "name": "bot"},
        "gate": {"max_picks": 300},
        "evaluate": {"prompts": 32},
        "schedule": {"min_pairs": 30, "poll": "1s"},
    }
    for name, values in sections.items():
        data[name] = {**data.get(name, {}), **values}
    return parse_config(data)


@contextmanager
def open_rig(config: Config, *, owner: str = "tester:0", seed: int = 0) -> Iterator[Rig]:
    lay_out(parse_url(config.database_url))
    with Store.open(config) as store:
        policy = FakePolicy(seed, fetch=store.artifacts.hold)
        try:
            ensure_base(store, policy, config)
            yield Rig(Loop(store, policy, config, owner), random.Random(seed))
        finally:
            policy.close()


class Rig:
    """A loop and the people around it; each pick is of a new rater about a new prompt."""

    def __init__(self, loop: Loop, rng: random.Random) -> None:
        self.loop = loop
        self.store = loop.store
        self.policy = loop.policy
        self._rng = rng

    @property
    def champion(self) -> int:
        with self.store.reading() as c:
            number = versions.alias(c, self.loop.name, Alias.CHAMPION)
        assert number is not None
        return number

    @property
    def duel(self) -> Duel:
        with self.store.reading() as c:
            duel = duels.current(c, self.loop.name)
        assert duel is not None
        return duel

    def serve(self, n: int, *, train: Picker | None = better, gate: Picker | None = better, gate_n: int | None = None) -> None:
        """``n`` comparisons of the champion with itself in the train pool, and a fifth as many in the gate pool, with picks."""
        self._compare(n, (self.champion, self.champion), GroupKind.TRAIN, Pool.TRAIN, train)
        self._compare(n // 5 if gate_n is None else gate_n, (self.champion, self.champion), GroupKind.HELDOUT, Pool.GATE, gate)

    def judge(self, n: int, picker: Picker = better, *, duel: Duel | None = None) -> list[str]:
        """``n`` comparisons of the open duel, or of one that was open just now, sides by coin; the ids of the picks."""
        duel, picks = duel or self.duel, list[str]()
        for _ in range(n):
            sides = (duel.champion, duel.challenger) if self._rng.random() < 0.5 else (duel.challenger, duel.champion)
            picks += self._compare(1, sides, GroupKind.DUEL, Pool.GATE, picker, duel_id=duel.duel_id)
        return picks

    def _compare(
        self,
        n: int,
        sides: tuple[int, int],
        kind: GroupKind,
        pool: Pool,
        picker: Picker | None,
        *,
        duel_id: str | None = None,
    ) -> list[str]:
        made = [self._group(sides, kind, pool, duel_id) for _ in range(n)]
        picks = [self._pick(group, picker) for group in made] if picker is not None else []

        def write(c: Connection) -> None:
            for group in made:
                groups.insert(c, group)
            for pick in picks:
                feedback.insert(c, pick)

        self.store.write(write)
        return [pick.feedback_id for pick in picks]

    def _group(self, sides: tuple[int, int], kind: GroupKind, pool: Pool, duel_id: str | None) -> Group:
        prompt = (Message("user", f"please help me with case {self._rng.randrange(10**9)}"),)
        ids = self.policy.tokens.encode_prompt(prompt)
        for number in set(sides) - self.policy.loaded():  # another process made it
            with self.store.reading() as c:
                version = versions.get(c, self.loop.name, number)
            assert version is not None
            self.policy.load(version)
        answers = tuple(self.policy.sample(SampleRequest(ids, side)).result()[0] for side in sides)
        return Group(
            group_id=new_group_id(),
            policy=self.loop.name,
            kind=kind,
            pool=pool,
            prompt=prompt,
            completions=answers,
            created_at=datetime.now(UTC),
            prompt_token_ids=ids,
            user=f"user-{self._rng.randrange(10**9)}",
            duel_id=duel_id,
        )

    def _pick(self, group: Group, picker: Picker) -> Feedback:
        return Feedback(
            feedback_id=new_id("feedback"),
            group_id=group.group_id,
            metric=PREFERENCE_METRIC,
            source=Source.HUMAN,
            rater_id=str(group.user),
            created_at=datetime.now(UTC),
            label=picker(self._rng, *group.completions),
            latency_ms=4_000,
        )
