"""What `pairloop cycle status` says of the last training round."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.loop_rig import Rig, open_rig, settings

from pairloop.config import Config
from pairloop.loop import cycle
from pairloop.loop.cycle.rounds import round_of
from pairloop.store import cycles
from pairloop.types import Cycle, CycleState, CycleStep


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return settings(tmp_path)


@pytest.fixture
def rig(config: Config) -> Iterator[Rig]:
    with open_rig(config) as opened:
        yield opened


def newest(rig: Rig) -> Cycle:
    with rig.store.reading() as c:
        return cycles.list_(c, "bot")[0]


def test_status_says_why_the_round_stopped_and_how_far_it_moved(rig: Rig) -> None:
    assert cycle.status(rig.store, rig.loop.config).last_round is None
    rig.serve(60)
    cycle.run(rig.loop, trigger="test")
    found = cycle.status(rig.store, rig.loop.config).last_round
    assert found is not None
    assert (found.cycle, found.version, found.stopped_because) == (1, 1, "completed")
    assert found.stop_message == f"all passes done, {found.steps} steps"
    assert found.steps == found.steps_planned
    assert found.ess_mean is not None
    assert found.ess_min is not None
    assert 0 < found.ess_min < found.ess_mean <= 1
    done = newest(rig)
    report = (done.record(CycleState.DUELLING) or {})["report"]["metrics"]
    assert found.kl_parent is not None
    assert found.kl_parent._asdict() == report["kl_parent"]
    # The parent of the first cycle is the base.
    assert found.kl_base == found.kl_parent
    assert f"ESS {found.ess_mean:.2f} on average, {found.ess_min:.2f} at least" in found.text
    assert f"KL to parent {found.kl_parent.mean:.2f}" in found.text


def test_the_round_in_json_and_after_its_cycle_ended(rig: Rig) -> None:
    rig.serve(60)
    cycle.run(rig.loop, trigger="test")
    while newest(rig).state is CycleState.DUELLING:
        rig.judge(40)
        cycle.run(rig.loop, trigger="test")
    cycle.run(rig.loop, trigger="test")
    assert newest(rig).state is CycleState.NOTHING_TO_TRAIN
    status = cycle.status(rig.store, rig.loop.config)
    assert (status.last_cycle, status.staleness) == (2, 1)
    plain = json.loads(json.dumps(status.as_json(), allow_nan=False))["last_round"]
    assert (plain["cycle"], plain["version"], plain["warnings"]) == (
        1,
        1,
        list(status.last_round.warnings if status.last_round else ()),
    )
    assert set(plain["kl_base"]) == {"mean", "lo", "hi", "n"}
    assert plain["text"].startswith("cycle 1, version 1: all passes done")


@pytest.mark.parametrize("stop_ess", [0.999])
def test_a_round_that_ran_out_of_its_ess_budget(tmp_path: Path, stop_ess: float) -> None:
    with open_rig(settings(tmp_path, train={"stop_ess": stop_ess, "batch_size": 4})) as rig:
        rig.serve(60)
        cycle.run(rig.loop, trigger="test")
        found = cycle.status(rig.store, rig.loop.config).last_round
    assert found is not None
    assert found.stopped_because == "ess"
    assert found.steps < found.steps_planned
    assert "below train.stop_ess = 0.999" in found.text


def test_a_cycle_that_trained_nothing_has_no_round(rig: Rig) -> None:
    rig.serve(60)
    cycle.run(rig.loop, trigger="test")
    trained = newest(rig)
    assert round_of(trained) is not None
    assert round_of(replace(trained, steps=trained.steps[:2])) is None
    rejected = CycleStep(
        CycleState.REJECTED, {"reason": "", "report": (trained.record(CycleState.DUELLING) or {})["report"]}, datetime.now(UTC)
    )
    found = round_of(replace(trained, steps=(*trained.steps[:3], rejected)))
    assert found is not None
    assert found.kl_base is not None
    unchecked = round_of(replace(trained, steps=trained.steps[:3]))
    assert unchecked is not None
    assert unchecked.kl_base is None
    assert "KL" not in unchecked.text
