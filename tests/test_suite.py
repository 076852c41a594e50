"""The suite: what a version must not fail that the champion passes."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.loop_rig import open_rig, settings
from tests.test_deploy import add_version, version
from tests.test_gate import GOOD, T0

from pairloop.config import Config, GateSection, parse_config
from pairloop.errors import ConfigError
from pairloop.loop import evaluate, gate
from pairloop.loop.evaluate import suite
from pairloop.types import Interval, Reason, VerdictKind

HIGH = {"messages": [{"role": "user", "content": "how good?"}], "must_match": "answer [3-9]", "name": "good enough"}


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "suite.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def with_suite(tmp_path: Path, **gate_settings: Any) -> Config:
    return settings(tmp_path, evaluate={"suite": "suite.jsonl"}, gate=gate_settings)


def test_a_challenger_that_fails_what_the_champion_passes_is_rejected_and_the_report_says_which(tmp_path: Path) -> None:
    english = {"messages": [{"role": "user", "content": "hi"}], "must_match": "^answer", "must_not_match": "Antwort"}
    write(tmp_path, HIGH, english, {"messages": HIGH["messages"], "must_be_json": True})
    with open_rig(with_suite(tmp_path)) as rig:
        champion, worse = add_version(rig, 12), add_version(rig, -12)
        lost = evaluate.run(rig.store, rig.policy, rig.loop.config, challenger=worse, champion=champion, dataset=None)
        won = evaluate.run(rig.store, rig.policy, rig.loop.config, challenger=champion, champion=version(rig, 0), dataset=None)
    assert lost.metrics["suite_lost"] == Interval(1.0, 1.0, 1.0, 3)  # neither passes the third
    assert "case lost: good enough" in lost.notes
    assert won.metrics["suite_lost"].mean == 0
    assert judged(lost.metrics["suite_lost"]).passed is False
    assert judged(won.metrics["suite_lost"]).passed is True
    assert judged(lost.metrics["suite_lost"], max_suite_lost=1).passed is True


def judged(lost: Interval, **settings: Any) -> Reason:
    report = type(GOOD)({**GOOD.metrics, "suite_lost": lost})
    verdict = gate.decide(report, (), GateSection(**settings), opened_at=T0, now=T0 + timedelta(hours=1))
    (reason,) = (reason for reason in verdict.reasons if reason.rule == "suite")
    assert (verdict.kind is VerdictKind.REJECT) == (reason.passed is False)
    return reason


def test_a_file_that_cannot_be_read_is_hold(tmp_path: Path) -> None:
    with open_rig(with_suite(tmp_path)) as rig:
        report = evaluate.run(
            rig.store, rig.policy, rig.loop.config, challenger=add_version(rig, 1), champion=version(rig, 0), dataset=None
        )
    assert "cannot be read" in report.errors["suite_lost"]
    sound = type(GOOD)(GOOD.metrics, {"suite_lost": report.errors["suite_lost"]})
    verdict = gate.decide(sound, (), GateSection(), opened_at=T0, now=T0)
    assert verdict.kind is VerdictKind.HOLD


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "2: Invalid JSON"),
        ({"messages": []}, "2: messages: List should have at least 1 item"),
        ({"messages": HIGH["messages"]}, "2: give must_match, must_not_match or must_be_json"),
        ({**HIGH, "must_match": "("}, "2: must_match: not a regular expression"),
        ({**HIGH, "must_contain": "x"}, "2: must_contain: Extra inputs"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, says: str) -> None:
    path = write(tmp_path, HIGH, row)
    with pytest.raises(ConfigError) as caught:
        suite.read(path)
    assert f"{path}:{says}" in str(caught.value)


def test_what_is_required_must_be_configured() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.suite"):
        parse_config({"gate": {"require": ["suite"]}})
