"""DPO training beside TRL's DPOTrainer, cell by cell: preference pairs per second, and peak memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pairloop.bench import trl
from pairloop.bench.cells import TRAIN_CELLS, TrainCell, chosen
from pairloop.bench.models import write_model
from pairloop.bench.race import Outcome, Spec, figures, race, ratios
from pairloop.bench.settings import Mode, Settings
from pairloop.errors import SystemFailure

OURS, DEFAULT, BEST = "pairloop", "trl_default", "trl_best"
SEARCH_STEPS = 2

Search = tuple[trl.Settings, list[dict[str, Any]]]
"""The settings found, and what each change did."""


def bench(settings: Settings, modes: Sequence[Mode]) -> list[dict[str, Any]]:
    """One row per cell and mode; TRL's best settings are searched once per model and mode, on the first cell that has them."""
    cells = chosen(TRAIN_CELLS, settings.cells, settings.device)
    searched: dict[tuple[str, Mode], Search] = {}
    rows = []
    for cell in cells:
        for mode in modes:
            key = (cell.shape.name, mode)
            if key not in searched:
                searched[key] = (trl.KNOWN_BEST, []) if settings.quick else _search(settings, cell, mode)
            rows.append(_row(settings, cell, mode, *searched[key]))
    return rows


def _row(settings: Settings, cell: TrainCell, mode: Mode, best: trl.Settings, tried: list[dict[str, Any]]) -> dict[str, Any]:
    ours = _spec(settings, cell, mode, steps=cell.steps * settings.rounds + 1)
    peer: dict[str, Any] = {**ours, "contestant": "trl"}
    outcomes = race(
        {OURS: ours, DEFAULT: peer | {"settings": trl.DEFAULT}, BEST: peer | {"settings": best}},
        settings.folder / "logs" / f"{cell.name}-{mode}",
        rounds=settings.rounds,
        steps=cell.steps,
        threads=settings.threads,
        on_step=settings.on_step,
        title=f"{cell.name} {mode}",
    )
    _refuse_other_data(outcomes)
    mine = outcomes[OURS]
    return {
        "cell": cell.name,
        "mode": mode,
        "batch_size": cell.batch_size,
        "tokens_per_pair": mine.facts["tokens_per_pair"],
        OURS: _figures(mine, settings.device) | _use(mine),
        "peers": {
            DEFAULT: _against(mine, outcomes[DEFAULT], settings.device),
            BEST: _against(mine, outcomes[BEST], settings.device)
            | {"settings": dict(best), "searched": not settings.quick, "tried": tried},
        },
    }


def _spec(settings: Settings, cell: TrainCell, mode: Mode, *, steps: int) -> dict[str, Any]:
    return {
        "contestant": "pairloop_train",
        "cell": cell.name,
        "mode": mode,
        "dtype": "bfloat16",
        "device": settings.device,
        "threads": settings.threads,
        "model": str(write_model(settings.folder / cell.shape.name, cell.shape)),
        "pairs": cell.batch_size * steps,
        "folder": str(settings.folder),
    }


def _search(settings: Settings, cell: TrainCell, mode: Mode) -> Search:
    """TRL's fastest settings, found change by change from its defaults, and what each change did.

    Fastest per step: the reference's pass over the data is counted in the ratio, not in the search.
    """
    best, cost = dict(trl.DEFAULT), _cost(settings, cell, mode, trl.DEFAULT)
    tried: list[dict[str, Any]] = [{"change": "as installed", "pairs_per_s": 1 / cost}]
    changes = {
        name: change
        for name, change in trl.CHANGES.items()
        if (mode == "lora" or name not in trl.LORA_ONLY) and (settings.device == "cuda" or name not in trl.CUDA_ONLY)
    }
    for done, (name, change) in enumerate(changes.items()):
        settings.on_step(f"{cell.name} {mode}: TRL's best settings", done, len(changes))
        candidate = {**best, **change}
        try:
            found = _cost(settings, cell, mode, candidate)
        except SystemFailure as error:
            tried.append({"change": name, "refused": str(error).splitlines()[0]})
            continue
        tried.append({"change": name, "pairs_per_s": 1 / found, "kept": found < cost})
        if found < cost:
            best, cost = candidate, found
    return best, tried


def _cost(settings: Settings, cell: TrainCell, mode: Mode, options: Mapping[str, Any]) -> float:
    spec: Spec = {
        **_spec(settings, cell, mode, steps=SEARCH_STEPS + 1),
        "contestant": "trl",
        "settings": dict(options),
    }
    outcomes = race(
        {"trl": spec},
        settings.folder / "logs" / f"{cell.name}-{mode}-search",
        rounds=1,
        steps=SEARCH_STEPS,
        threads=settings.threads,
        on_step=lambda *_: None,
        title="",
    )
    return outcomes["trl"].median_cost(settings.device)


def _figures(outcome: Outcome, device: str) -> dict[str, Any]:
    found = figures(outcome, device, "pairs")
    return found | {"tokens_per_wall_s": found["pairs_per_wall_s"] * outcome.facts["tokens_per_pair"]}


def _against(ours: Outcome, peer: Outcome, device: str) -> dict[str, Any]:
    """The peer's figures and how many times its cost ours is, its pass of the reference over the data counted."""
    pass_s = peer.facts["pass_s_per_pair"]
    found = _figures(peer, device)
    net = max(turn.net_mb for turn in ours.turns)
    return found | {
        "ratio": ratios(ours, peer, device, pass_s),
        "ratio_without_reference_pass": ratios(ours, peer, device),
        "reference_pass_s_per_pair": pass_s,
        "memory_ratio": net / found["net_mb"],
    }


def _use(ours: Outcome) -> dict[str, float]:
    """Operations done per second, and as a share of what a large matrix product reaches here."""
    rate = max(turn.units / turn.wall_s for turn in ours.turns) * ours.facts["flops_per_pair"]
    return {"flops": rate, "ceiling_flops": ours.facts["ceiling_flops"], "flop_use": rate / ours.facts["ceiling_flops"]}


def _refuse_other_data(outcomes: Mapping[str, Outcome]) -> None:
    """SystemFailure where the contestants did not read the same tokens: the ratio would say nothing."""
    read = {name: outcome.facts["tokens_per_pair"] for name, outcome in outcomes.items()}
    if len(set(read.values())) > 1:
        raise SystemFailure(f"the contestants read different data, in tokens per pair: {read}")
