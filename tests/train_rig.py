"""A store in the middle of a cycle that trains."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pairloop.config import Config, parse_config
from pairloop.formats import snapshot
from pairloop.loop.train import run
from pairloop.store import Store, cycles, datasets, runs, versions
from pairloop.types import Cycle, CycleState, CycleStep, Dataset, Message, PairSide, PreferencePair, Version, VersionKind

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POLICY = "bot"


def some_pairs(count: int) -> list[PreferencePair]:
    return [
        PreferencePair(
            f"pair_{i}", (Message("user", f"what is {i}?"),), PairSide(f"answer 8{i % 10}"), PairSide(f"answer 1{i % 10}")
        )
        for i in range(count)
    ]


def config_of(tmp_path: Path, *, model: str = "fake", **sections: Mapping[str, Any]) -> Config:
    policy = {"name": POLICY, "model": model, **sections.pop("policy", {})}
    return parse_config({"state_dir": tmp_path, "policy": policy, **sections})


class World:
    """A store with a base version, a dataset, and a cycle that is training."""

    def __init__(self, store: Store, config: Config, pairs: list[PreferencePair]) -> None:
        self.store, self.config = store, config
        with store.artifacts.stage() as folder:
            snapshot.write(folder / "train.jsonl", pairs)
            snapshot.write(folder / "heldout.jsonl", pairs[:4])
            path = str(store.artifacts.publish(folder, {}).path)
        self.base = Version(POLICY, 0, VersionKind.BASE, config.policy.model, "", None, None, None, NOW)
        self.dataset = Dataset("dataset_1", POLICY, path, len(pairs), 4, {}, {}, NOW)
        steps = (CycleStep(CycleState.TRAINING, {}, NOW),)
        store.write(lambda c: versions.insert(c, self.base))
        store.write(lambda c: cycles.insert(c, Cycle("cycle_1", POLICY, 1, 0, "test", NOW, steps)))
        store.write(lambda c: datasets.insert(c, self.dataset, feedback_seq=0, cycle_id="cycle_1", pairs=[]))

    @classmethod
    def found(cls, store: Store, config: Config) -> World:
        """What another machine has put into the store."""
        world = cls.__new__(cls)
        world.store, world.config = store, config
        with store.reading() as c:
            base, dataset = versions.get(c, POLICY, 0), datasets.get(c, "dataset_1")
        assert base is not None
        assert dataset is not None
        world.base, world.dataset = base, dataset
        return world

    def train(self, **settings: Any) -> Any:
        defaults = {"dataset": self.dataset, "parent": self.base, "cycle_id": "cycle_1", "owner": "one"}
        return run(self.store, self.config, **{**defaults, **settings})

    def runs(self) -> list[Any]:
        with self.store.reading() as c:
            return runs.list_(c, POLICY)

    def versions(self) -> list[Version]:
        with self.store.reading() as c:
            return versions.list_(c, POLICY)
