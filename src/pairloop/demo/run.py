"""The demo itself: start a server, send customers, watch a cycle, measure its challenger; again; report.

Left out on purpose: anything the product could not do for a real team. The server, its store, the training child, the duel
and the schedule are the product's own; the demo is a crowd of HTTP clients and a ruler. Run it alone with ``pairloop demo``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from pairloop.config import Config, load_config
from pairloop.demo import measure as ruler
from pairloop.demo.control import train_control
from pairloop.demo.report import DemoResult, Round, Score, examples, write_report
from pairloop.demo.server import ServerProcess, start_server
from pairloop.demo.traffic import Crowd, Shop, Tally, open_shop, send
from pairloop.errors import ConflictError, SystemFailure
from pairloop.policy.engine import open_policy
from pairloop.policy.protocols import Policy
from pairloop.scaffold import starter_recipe, write_config
from pairloop.starter.customers import Behaviour
from pairloop.store import Artifacts
from pairloop.types import BASE_VERSION, CycleState, Pool, VerdictKind, Version, VersionKind

CONTROL_NUMBER = -1
"""The number under which the ruler's engine holds the control, which is no version of the policy."""
DUEL_CUSTOMERS = 600
DUEL_WAVE = 32
CYCLE_TIMEOUT_S = 600.0
POLL_S = 0.1
VERIFIER = "pairloop.starter.verifier:score"


@dataclass(frozen=True)
class DemoOptions:
    out: Path
    seed: int = 0
    rounds: int = 4
    customers: int = 512
    gate_customers: int = 64
    """Customers of the gate pool per round outside the duel: their picks are the held-out set."""
    noise: float = 0.0
    position_bias: float = 0.0
    verifier: bool = False
    control: bool = False

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("seed", "customers", "noise", "position_bias", "verifier")}


class Watcher(Protocol):
    """Who is told how the demo goes: the terminal, or nobody."""

    def stage(self, text: str) -> None:
        """One line for something that is done."""
        ...

    def bar(self, text: str, done: int, of: int) -> None:
        """How far the present phase is."""
        ...


def run_demo(options: DemoOptions, watcher: Watcher) -> DemoResult:
    """Runs the demo into ``options.out`` and writes its report there.

    Refuses a folder that holds an earlier run, so that two runs never mix.
    """
    config_path = _write_demo_config(options)
    started = time.monotonic()
    config = load_config(config_path, env={})
    with ThreadPoolExecutor(1) as aside:  # both spend seconds on imports
        opening = aside.submit(open_policy, config)
        server = start_server(config_path, log=options.out / "server.log")
    try:
        watcher.stage(f"serving {config.policy.name} on {server.url}")
        bench = _Bench(opening.result(), Artifacts(config.artifacts_dir), options.seed)
        rounds, datasets, champion = asyncio.run(_rounds(options, config, server, bench, watcher))
        cpu_s = server.cpu_s()
    finally:
        server.stop()
    control = bench.control(train_control(config, datasets, options.out, watcher)) if options.control else None
    final, base = bench.scores[champion], bench.scores[BASE_VERSION]
    before, after = bench.measured[BASE_VERSION], bench.measured[champion]
    result = DemoResult(
        rounds=tuple(rounds),
        base=base,
        final=final,
        promotions=sum(round_.verdict == "PROMOTE" for round_ in rounds),
        wall_s=time.monotonic() - started,
        cpu_s=cpu_s + time.process_time(),
        settings=options.settings(),
        examples=examples([case.text for case in bench.cases], before.answers, after.answers),
        control=control,
        open_command=f"pairloop serve --config {config_path}",
    )
    write_report(result, options.out)
    bench.policy.close()
    return result


def _write_demo_config(options: DemoOptions) -> Path:
    if (options.out / "pairloop.toml").exists():
        raise ConflictError(f"{options.out} holds an earlier demo; name another folder with --out, or delete it")
    settings: dict[str, dict[str, Any]] = starter_recipe()
    settings["gate"] = {"max_picks": DUEL_CUSTOMERS}
    settings["train"]["seed"] = options.seed
    # The demo starts each cycle when its customers are through; a count would start it in the middle of the crowd.
    settings["schedule"] = {"min_pairs": 0}
    if options.verifier:
        settings["label"] = {"verifier": VERIFIER}
        settings["gate"]["offline"] = True
    return write_config(options.out, settings)


@dataclass
class _Bench:
    """Measures versions once each, with the same prompts."""

    policy: Policy
    artifacts: Artifacts
    seed: int
    cases: list[Any] = field(default_factory=ruler.held_out_cases)
    measured: dict[int, ruler.Measured] = field(default_factory=dict)
    scores: dict[int, Score] = field(default_factory=dict)

    def score(self, version: Mapping[str, Any]) -> Score:
        number = int(version["number"])
        if number not in self.scores:
            path = None if number == BASE_VERSION else self.artifacts.path(str(version["artifact_hash"]))
            self.scores[number] = self._sample(number, path)
        return self.scores[number]

    def control(self, path: Path | None) -> Score:
        """The control's score; where nothing was promoted it was never trained and is the base."""
        score = self.scores[BASE_VERSION] if path is None else self._sample(CONTROL_NUMBER, path)
        return replace(score, version=None)

    def _sample(self, loaded: int, path: Path | None) -> Score:
        """Samples the model in ``path`` (None: the base) and compares it with the base."""
        self.policy.load(_as_version(loaded, path))
        measured = ruler.measure(self.policy, loaded, self.cases, seed=self.seed)
        self.measured[loaded] = measured
        if loaded != BASE_VERSION:
            self.policy.unload(loaded)
        rate = ruler.win_rate(measured, self.measured[BASE_VERSION])
        return Score(loaded, rate, measured.utility, measured.fidelity)


def _as_version(number: int, path: Path | None) -> Version:
    """A version as the engine loads it; the base needs no path."""
    kind = VersionKind.BASE if path is None else VersionKind.FULL
    return Version("demo", number, kind, str(path or ""), "", BASE_VERSION, None, None, datetime.now(UTC))


async def _rounds(
    options: DemoOptions, config: Config, server: ServerProcess, bench: _Bench, watcher: Watcher
) -> tuple[list[Round], list[Path], int]:
    """All rounds; the folders of the datasets whose cycles were promoted, in order; the champion at the end."""
    crowd = Crowd(
        options.seed,
        Behaviour(random_share=options.noise, position_bias=options.position_bias),
        config.serve.gate_share,
        picks=not options.verifier,
    )
    train_pool, gate_pool = crowd.members(Pool.TRAIN), crowd.members(Pool.GATE)
    rounds, datasets = [], []
    async with open_shop(config.policy.name, lambda: server.url) as shop:
        bench.score(await _version(shop, config.policy.name, BASE_VERSION))
        for number in range(1, options.rounds + 1):
            round_, cycle = await _round(number, options, shop, crowd, train_pool, gate_pool, bench, watcher)
            rounds.append(round_)
            if round_.verdict == VerdictKind.PROMOTE:
                dataset_id = step_record(cycle, CycleState.TRAINING)["dataset_id"]
                datasets.append(Path((await shop.get(f"/v1/datasets/{dataset_id}"))["path"]))
        policy = await shop.get(f"/v1/policies/{config.policy.name}")
    return rounds, datasets, int(str(policy["champion"]).rsplit("@", 1)[1])


async def _round(
    number: int,
    options: DemoOptions,
    shop: Shop,
    crowd: Crowd,
    train_pool: Iterator[int],
    gate_pool: Iterator[int],
    bench: _Bench,
    watcher: Watcher,
) -> tuple[Round, Mapping[str, Any]]:
    tally, seconds = Tally(), dict[str, float]()
    label = f"round {number}"
    with _timed(seconds, "collect"):
        numbers = [*islice(train_pool, options.customers), *islice(gate_pool, options.gate_customers)]
        await _send(shop, crowd, numbers, tally, f"{label}: customers ask and pick", watcher)
    watcher.stage(f"{label}: {tally.groups} answers in pairs, {len(tally.picks)} picks, {seconds['collect']:.1f} s")
    duel = Tally()
    cycle = await run_cycle(shop, crowd, gate_pool, duel, label, watcher, seconds)
    verdict, reasons, e_value, headline = await _verdict(shop, cycle)
    with _timed(seconds, "measure"):
        score = None
        if (challenger := step_record(cycle, CycleState.CHECKING).get("version")) is not None:
            score = bench.score(await _version(shop, shop.policy, int(challenger)))
    watcher.stage(f"{label}: {verdict}: {headline}")
    if score is not None:
        rate = score.win_rate
        watcher.stage(
            f"{label}: version {score.version} beats the base on {rate.mean:.3f} [{rate.lo:.3f}, {rate.hi:.3f}] of "
            f"{rate.n} held-out prompts, utility {score.utility:.2f}, fidelity {score.fidelity.mean:.3f}"
        )
    return Round(number, verdict, reasons, score, len(tally.picks), len(duel.picks), e_value, seconds), cycle


async def _send(shop: Shop, crowd: Crowd, numbers: list[int], tally: Tally, text: str, watcher: Watcher) -> None:
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        watcher.bar(text, done, len(numbers))

    await send(shop, crowd, numbers, tally, on_done=one_more)


async def run_cycle(
    shop: Shop,
    crowd: Crowd,
    gate_pool: Iterator[int],
    duel: Tally,
    label: str,
    watcher: Watcher,
    seconds: dict[str, float],
) -> Mapping[str, Any]:
    """Asks for a cycle and watches it to its end; while it duels, sends customers of the gate pool.

    ``seconds`` gets the time spent in each state, as seen from here.
    """
    clock = asyncio.get_running_loop()
    deadline = clock.time() + CYCLE_TIMEOUT_S
    newest = await _newest_cycle(shop)
    await shop.post("/v1/cycles", {"reason": label})
    sent, last_state = 0, ""
    while (now := clock.time()) < deadline:
        cycle = await _newest_cycle(shop)
        if cycle is None or (newest is not None and cycle["number"] == newest["number"]):
            await asyncio.sleep(POLL_S)
            continue
        state = CycleState(cycle["state"])
        if state != last_state:
            watcher.stage(f"{label}: {state}")
            last_state, entered_at = state, now
        if state.is_terminal:
            return cycle
        if state is CycleState.DUELLING and sent < DUEL_CUSTOMERS:
            wave = list(islice(gate_pool, min(DUEL_WAVE, DUEL_CUSTOMERS - sent)))
            await send(shop, crowd, wave, duel)
            sent += len(wave)
            watcher.bar(f"{label}: champion against challenger, customers of the gate pool", sent, DUEL_CUSTOMERS)
        else:
            await _show_progress(shop, label, state, watcher)
            await asyncio.sleep(POLL_S)
        seconds[state.value] = clock.time() - entered_at
    raise SystemFailure(f"{label}: the cycle did not end within {CYCLE_TIMEOUT_S:.0f} s; it is {last_state}")


async def _show_progress(shop: Shop, label: str, state: CycleState, watcher: Watcher) -> None:
    progress = (await shop.get("/v1/status"))["progress"]
    if progress is not None:
        watcher.bar(f"{label}: {state}", int(progress["done"]), int(progress["of"]))


async def _newest_cycle(shop: Shop) -> Mapping[str, Any] | None:
    newest = (await shop.get("/v1/cycles?limit=1"))["data"]
    return newest[0] if newest else None


async def _version(shop: Shop, policy: str, number: int) -> Mapping[str, Any]:
    return await shop.get(f"/v1/versions/{policy}@{number}")


def step_record(cycle: Mapping[str, Any], state: CycleState) -> Mapping[str, Any]:
    """The record with which a cycle entered a state; empty where it has not been there."""
    return next((dict(step["record"]) for step in cycle["steps"] if step["state"] == state), {})


async def _verdict(shop: Shop, cycle: Mapping[str, Any]) -> tuple[str, tuple[str, ...], float, str]:
    """The gate's last word, its reasons, e-value and the reason that decided; where no gate was asked, the cycle's own end."""
    if cycle["state"] in (CycleState.FAILED, CycleState.NOTHING_TO_TRAIN):
        reason = str(cycle["steps"][-1]["record"].get("reason", cycle["state"]))
        return str(cycle["state"]).upper(), (reason,), 1.0, reason
    verdict = (await shop.get(f"/v1/gates/{cycle['id']}"))["verdict"]
    reasons = tuple(str(reason["text"]) for reason in verdict["reasons"])
    failed = [str(reason["text"]) for reason in verdict["reasons"] if reason["passed"] is False]
    return str(verdict["kind"]), reasons, float(verdict["e_value"]), "; ".join(failed) or reasons[0]


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[phase] = time.monotonic() - started


def free_folder(out: Path | None) -> Path:
    """``out``, or ``demo-out`` here; where that holds an earlier demo, the next ``demo-out-2``, ``-3``, … that does not."""
    if out is not None:
        return out
    names = ["demo-out", *(f"demo-out-{number}" for number in range(2, 10_000))]
    return next(path for name in names if not (path := Path(name)).exists())
