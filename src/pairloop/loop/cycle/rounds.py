"""What a cycle's training round came to, for those who watch: why it stopped, how stale its data grew, how far it moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pairloop.types import Cycle, CycleState, Interval


@dataclass(frozen=True, slots=True)
class RoundStatus:
    """The training round of one cycle.

    ``stopped_because``, ``stop_message``: see `pairloop.learner.controller.Stop`. ``ess_mean``, ``ess_min``: effective sample
    size over its steps, in (0, 1]. ``kl_parent``, ``kl_base``: nats per answer, from the offline report; None until there is
    one.
    """

    cycle: int
    version: int
    steps: int
    steps_planned: int
    stopped_because: str
    stop_message: str
    warnings: tuple[str, ...]
    ess_mean: float | None
    ess_min: float | None
    kl_parent: Interval | None
    kl_base: Interval | None

    @property
    def text(self) -> str:
        """One line for people."""
        parts = [f"cycle {self.cycle}, version {self.version}: {self.stop_message or self.stopped_because}"]
        if self.ess_mean is not None and self.ess_min is not None:
            parts.append(f"ESS {self.ess_mean:.2f} on average, {self.ess_min:.2f} at least")
        for name, kl in (("parent", self.kl_parent), ("base", self.kl_base)):
            if kl is not None:
                parts.append(f"KL to {name} {kl.mean:.2f} [{kl.lo:.2f}, {kl.hi:.2f}]")
        return "; ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data, with ``text``."""
        intervals = {name: getattr(self, name) for name in ("kl_parent", "kl_base")}
        plain = {name: None if kl is None else kl._asdict() for name, kl in intervals.items()}
        return {**asdict(self), **plain, "warnings": list(self.warnings), "text": self.text}


def round_of(cycle: Cycle) -> RoundStatus | None:
    """The round of a cycle that trained a version; None of any other."""
    record = cycle.record(CycleState.CHECKING)
    if record is None or "result" not in record:
        return None
    result: Mapping[str, Any] = record["result"]
    metrics: Mapping[str, Any] = result.get("metrics") or {}
    kl = _report_metrics(cycle)
    return RoundStatus(
        cycle=cycle.number,
        version=record["version"],
        steps=result["steps"],
        steps_planned=result["steps_planned"],
        stopped_because=result["stopped_because"],
        # Rounds of earlier versions of pairloop have neither message nor warnings.
        stop_message=result.get("stop_message") or "",
        warnings=tuple(result.get("warnings") or ()),
        ess_mean=metrics.get("ess_mean"),
        ess_min=metrics.get("ess_min"),
        kl_parent=kl.get("kl_parent"),
        kl_base=kl.get("kl_base"),
    )


def _report_metrics(cycle: Cycle) -> dict[str, Interval]:
    """The offline report's figures: in the record that opened the duel, or in the last one where there was no duel."""
    report = next((step.record["report"] for step in cycle.steps if "report" in step.record), None)
    return {} if report is None else {name: Interval(**value) for name, value in report["metrics"].items()}
