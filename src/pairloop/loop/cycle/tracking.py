"""What the configured trackers hear of a cycle: one run each, with its training, its offline report and its verdict."""

from __future__ import annotations

from contextlib import AbstractContextManager

from pairloop.loop.cycle.context import Loop
from pairloop.store import verdicts
from pairloop.track import Report, RunInfo, reporting, training_info
from pairloop.types import Cycle, CycleState, Dataset, Verdict


def training(loop: Loop, cycle: Cycle, dataset: Dataset) -> AbstractContextManager[Report]:
    """The report of the cycle's training; of a run that is taken up again it goes on."""
    return reporting(loop.config, _run_of(loop, cycle, dataset=dataset.dataset_id, pairs=dataset.n_train))


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
