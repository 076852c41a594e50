"""The suite: cases, which are questions with checks that an answer must pass, such as its format.

A version must not fail one that the champion passes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pairloop.config import Config
from pairloop.errors import ConfigError
from pairloop.policy.protocols import Policy, SampleRequest
from pairloop.types import Interval, Message, SamplingParams, Version

METRIC = "suite_lost"


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str


class Case(BaseModel):
    """One line of the file: ``messages`` and at least one check of the greedy answer to them."""

    model_config = ConfigDict(extra="forbid")
    name: str | None = None
    messages: list[_Turn] = Field(min_length=1)
    must_match: str | None = None
    must_not_match: str | None = None
    must_be_json: bool = False

    @field_validator("must_match", "must_not_match")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _checks_something(self) -> Self:
        if self.must_match is None and self.must_not_match is None and not self.must_be_json:
            raise ValueError("give must_match, must_not_match or must_be_json: this line checks nothing")
        return self

    @property
    def prompt(self) -> tuple[Message, ...]:
        return tuple(Message(turn.role, turn.content) for turn in self.messages)

    @property
    def label(self) -> str:
        return self.name or self.messages[-1].content[:40]

    def passes(self, answer: str) -> bool:
        if self.must_match is not None and not re.search(self.must_match, answer):
            return False
        if self.must_not_match is not None and re.search(self.must_not_match, answer):
            return False
        return not self.must_be_json or _is_json(answer)


def read(path: Path) -> list[Case]:
    """The cases of a file, one JSON object per line. ConfigError naming file, line and field."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"evaluate.suite: {path} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(Case.model_validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(str(part) for part in first["loc"])
                what = str(first["msg"]).removeprefix("Value error, ")
                raise ConfigError(f"{path}:{number}: {field + ': ' if field else ''}{what}") from error
    if not found:
        raise ConfigError(f"evaluate.suite: {path} holds no line")
    return found


def measure(policy: Policy, config: Config, *, challenger: Version, champion: Version) -> tuple[dict[str, Interval], list[str]]:
    """How many cases that the champion passes the challenger fails, and a note for each. ``config`` names the file."""
    assert config.evaluate.suite is not None, "asked for only where there is a file"
    cases = read(config.state_dir / config.evaluate.suite)
    new, old = (_answers(policy, config, cases, version) for version in (challenger, champion))
    lost = [
        case.label for case, ours, theirs in zip(cases, new, old, strict=True) if case.passes(theirs) and not case.passes(ours)
    ]
    count = float(len(lost))
    return {METRIC: Interval(count, count, count, len(cases))}, [f"case lost: {label}" for label in lost]


def _answers(policy: Policy, config: Config, cases: Sequence[Case], version: Version) -> list[str]:
    """Greedy, so that the same version always answers the same."""
    policy.load(version)
    params = SamplingParams(max_tokens=config.evaluate.max_tokens, temperature=0.0, seed=0)
    requests = [SampleRequest(policy.tokens.encode_prompt(case.prompt), version.number, params=params) for case in cases]
    futures = [policy.sample(request) for request in requests]
    try:
        return [future.result()[0].text for future in futures]
    finally:
        for future in futures:
            future.cancel()


def _is_json(answer: str) -> bool:
    try:
        json.loads(answer)
    except ValueError:
        return False
    return True
