"""What the configured trackers hear of a cycle: one run each, with its training, its offline report and its verdict."""

from __future__ import annotations

from collections.abc import Callable

from pairloop.loop import train as stage
from pairloop.loop.cycle.context import Loop
from pairloop.store import verdicts
from pairloop.track import RunInfo, reporting, training_info
from pairloop.types import Cycle, CycleState, Dataset, Verdict, Version


def train(loop: Loop, cycle: Cycle, dataset: Dataset, *, parent: Version, should_stop: Callable[[], bool]) -> stage.TrainRecord:
    """The training stage (`train.run`), reported step by step; of a run that is taken up again the report goes on."""
    with reporting(loop.config, _run_of(loop, cycle, dataset=dataset.dataset_id, rows=dataset.n_train)) as report:
        done = stage.run(
            loop.store,
            loop.config,
            dataset=dataset,
            parent=parent,
            cycle_id=cycle.cycle_id,
            owner=loop.owner,
            on_progress=report.row,
            should_stop=should_stop,
        )
        made = done.version.name if done.version is not None else None
        report.trained(done.result, status=str(done.status), version=made, number=cycle.number)
    return done


def moved(loop: Loop, cycle: Cycle) -> None:
    """Tell what the cycle's last step says about its version: the report before a duel, the verdict after it."""
    record = cycle.steps[-1].record
    if not loop.config.track.to or cycle.record(CycleState.CHECKING) is None:
        return
    values: dict[str, float] = {}
    for name, value in record.get("report", {}).get("metrics", {}).items():
        values |= {f"evaluate/{name}": value["mean"], f"evaluate/{name}_lo": value["lo"], f"evaluate/{name}_hi": value["hi"]}
    if cycle.state.is_terminal:
        with loop.store.reading() as c:
            given = verdicts.for_cycle(c, cycle.cycle_id)
        values |= _verdict(given[-1][1]) if given else {}
    if values or cycle.state.is_terminal:
        with reporting(loop.config, _run_of(loop, cycle)) as report:
            report.figures(values, number=cycle.number)
            report.notes({"cycle_state": str(cycle.state)})


def _run_of(loop: Loop, cycle: Cycle, **facts: str | int) -> RunInfo:
    """The same key at every call, whatever is known by then."""
    parent = f"{loop.name}@{cycle.parent}"
    name = f"{loop.name} cycle {cycle.number}"
    return training_info(loop.config, key=cycle.cycle_id, name=name, cycle=cycle.number, parent=parent, **facts)


def _verdict(verdict: Verdict) -> dict[str, float]:
    decisive = verdict.wins + verdict.losses
    found = {"e_value": verdict.e_value, "wins": verdict.wins, "losses": verdict.losses, "raters": verdict.raters}
    if decisive:
        found["win_rate"] = verdict.wins / decisive
    return {f"gate/{name}": float(value) for name, value in found.items()}
