"""Configuration: one typed section per stage, read from TOML and overridden by ``PAIRLOOP_<SECTION>_<KEY>``.

The class defaults are the vetted settings; a file holds only what differs. Illegal settings are refused here, with the
section, the key and the reason. This module is the only reader of ``os.environ``.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from pydantic import BaseModel, ValidationError, model_validator

from pairloop.config.artifacts import folder_of
from pairloop.config.deploy import DeploySection
from pairloop.config.feedback import FeedbackSection, LabelSection, PairsSection
from pairloop.config.gate import EvaluateSection, GateSection
from pairloop.config.log import LogSection, MetricsSection
from pairloop.config.otel import OtelSection
from pairloop.config.policy import PolicySection
from pairloop.config.privacy import PrivacySection
from pairloop.config.queue import QueueSection
from pairloop.config.schedule import SETTINGS as SCHEDULE_SETTINGS
from pairloop.config.schedule import ScheduleSection, with_settings
from pairloop.config.section import Section, duration_s, is_loopback
from pairloop.config.serve import ServeSection
from pairloop.config.store import Durability, StoreSection
from pairloop.config.strays import warn_of_strays
from pairloop.config.track import TrackSection
from pairloop.config.train import TrainSection
from pairloop.config.webhooks import WebhookEndpoint, WebhooksSection
from pairloop.errors import ConfigError

CONFIG_FILE = "pairloop.toml"
ENV_PREFIX = "PAIRLOOP_"

__all__ = [
    "CONFIG_FILE",
    "SCHEDULE_SETTINGS",
    "Config",
    "DeploySection",
    "Durability",
    "EvaluateSection",
    "FeedbackSection",
    "GateSection",
    "LabelSection",
    "LogSection",
    "MetricsSection",
    "OtelSection",
    "PairsSection",
    "PolicySection",
    "PrivacySection",
    "QueueSection",
    "ScheduleSection",
    "Section",
    "ServeSection",
    "StoreSection",
    "TrackSection",
    "TrainSection",
    "WebhookEndpoint",
    "WebhooksSection",
    "child_env",
    "duration_s",
    "is_loopback",
    "load_config",
    "log_of_child",
    "override",
    "parse_config",
    "planned_fault",
    "secret",
    "set_by",
    "with_settings",
]


class Config(Section):
    """Everything pairloop can be told; ``state_dir`` is where it keeps what it makes."""

    state_dir: Path = Path("pairloop-data")
    policy: PolicySection = PolicySection()
    serve: ServeSection = ServeSection()
    feedback: FeedbackSection = FeedbackSection()
    label: LabelSection = LabelSection()
    queue: QueueSection = QueueSection()
    pairs: PairsSection = PairsSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    gate: GateSection = GateSection()
    deploy: DeploySection = DeploySection()
    schedule: ScheduleSection = ScheduleSection()
    store: StoreSection = StoreSection()
    track: TrackSection = TrackSection()
    log: LogSection = LogSection()
    metrics: MetricsSection = MetricsSection()
    otel: OtelSection = OtelSection()
    webhooks: WebhooksSection = WebhooksSection()
    privacy: PrivacySection = PrivacySection()

    @model_validator(mode="after")
    def _offline_needs_a_labeller(self) -> Self:
        if self.gate.offline and self.label.verifier is None and self.label.judge_url is None:
            raise ValueError("gate.offline = true needs label.verifier or label.judge_url: an offline duel asks one of them")
        return self

    @model_validator(mode="after")
    def _seed_duel_has_somebody_to_ask(self) -> Self:
        is_asked = self.label.verifier is not None or self.label.judge_url is not None or self.gate.seed_share > 0
        if "seed_duel" in self.gate.require and not is_asked:
            raise ValueError(
                'gate.require names "seed_duel", and nobody compares a challenger with the base: set gate.seed_share (0.2, '
                "say), which asks the raters, or label.verifier or label.judge_url"
            )
        return self

    @model_validator(mode="after")
    def _suite_has_a_file(self) -> Self:
        if "suite" in self.gate.require and self.evaluate.suite is None:
            raise ValueError('gate.require names "suite": set evaluate.suite to its file')
        return self

    @model_validator(mode="after")
    def _processes_have_devices(self) -> Self:
        if self.train.processes > 1 and self.policy.device not in ("auto", "cpu", "cuda"):
            raise ValueError(
                f'policy.device = "{self.policy.device}" is one device, and train.processes = {self.train.processes} need one '
                'each: set it to "cuda"'
            )
        if self.train.sharding == "fsdp2" and self.policy.quantization != "none":
            raise ValueError(
                'train.sharding = "fsdp2" cannot divide a base of 4 bits: set it to "none", where each process holds all of it'
            )
        return self

    @property
    def database_url(self) -> str:
        return self.store.database or f"sqlite:///{self.state_dir.resolve() / 'pairloop.sqlite'}"

    @property
    def artifacts_dir(self) -> Path:
        """Where artifacts lie on this machine: the folder of all, or of those that were fetched from ``artifacts_url``."""
        if self.artifacts_url is not None:
            return self.state_dir / "cache" / "artifacts"
        return (folder_of(self.store.artifacts) if self.store.artifacts else None) or self.state_dir / "artifacts"

    @property
    def artifacts_url(self) -> str | None:
        """Where artifacts lie for all machines; None where they lie in ``artifacts_dir`` alone."""
        place = self.store.artifacts
        return place.rstrip("/") if place and folder_of(place) is None else None

    @property
    def keep_warm(self) -> int:
        """Former champions that stay loaded: as many as are wanted and fit beside base, champion and challenger."""
        return min(self.deploy.keep_warm, max(0, self.policy.max_loaded - 3))

    @property
    def runs_dir(self) -> Path:
        return self.state_dir / "runs"


def load_config(
    path: Path | None = None,
    *,
    env: Mapping[str, str] | None = None,
    begin_log: Callable[[LogSection], None] | None = None,
) -> Config:
    """The configuration in ``path`` (a TOML file, or a directory that holds ``pairloop.toml``), with environment overrides.

    ``state_dir`` defaults to the file's own directory and is resolved against it. ``begin_log`` sets up the log, where a
    process keeps one, before it is warned of anything. Raises ConfigError naming file, section, key and reason.
    """
    data: dict[str, Any] = {}
    if path is not None:
        path = path / CONFIG_FILE if path.is_dir() else path
        data = _read_toml(path)
        data["state_dir"] = path.parent / data.get("state_dir", ".")
    env = os.environ if env is None else env
    _apply_env(data, env)
    try:
        config = parse_config(data, origin=str(path) if path else "environment", env=env)
        if begin_log is not None:
            begin_log(config.log)
        return config
    finally:  # also of what is refused: the misspelt one may be why
        warn_of_strays(env, [f"{ENV_PREFIX}STATE_DIR", *_variables()], data, prefix=ENV_PREFIX)


def parse_config(
    data: Mapping[str, Any], *, origin: str = "configuration", env: Mapping[str, str] = MappingProxyType({})
) -> Config:
    """A checked Config from plain data; raises ConfigError naming ``origin``, the key (and the variable of ``env`` that it
    was taken from) and the reason."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + "; ".join(_reason(item, env) for item in error.errors())) from error


def override(config: Config, changes: Mapping[str, Mapping[str, Any]]) -> Config:
    """A checked copy with ``changes`` (section → key → value) laid over it."""
    data = config.model_dump(exclude_unset=True)  # what was left at its default stays told apart
    for section, values in changes.items():
        data[section] = {**data.get(section, {}), **values}
    return parse_config(data, origin="command line")


def set_by(config: Config, section: str, key: str, *, env: Mapping[str, str] | None = None) -> str | None:
    """What a setting comes from: the environment variable of that name, ``file`` (or command line), or None: the default."""
    variable = _variable(section, key)
    if variable in (os.environ if env is None else env):
        return variable
    return "file" if key in getattr(config, section).model_fields_set else None


def secret(name: str) -> str:
    """The environment variable ``name`` that the configuration refers to; ConfigError where it is not set."""
    value = os.environ.get(name)
    if not value:
        raise ConfigError(f"environment variable {name} is not set; the configuration names it as a secret")
    return value


def planned_fault(name: str) -> str | None:
    """The fault that a test has planned for this process (`pairloop.faults`); None outside of tests."""
    return os.environ.get(name)


def child_env(**extra: str) -> dict[str, str]:
    """The environment for a child process of ours: this process's, plus ``extra``."""
    return {**os.environ, **extra}


def log_of_child(env: Mapping[str, str] | None = None) -> LogSection:
    """How a child process of ours logs: as its environment says, on its own standard error."""
    data: dict[str, Any] = {}
    _apply_env(data, os.environ if env is None else env)
    return LogSection.model_validate({**data.get("log", {}), "file": None})


def _variable(*place: object) -> str:
    return ENV_PREFIX + "_".join(map(str, place)).upper()


def _reason(item: Mapping[str, Any], env: Mapping[str, str]) -> str:
    key = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] == "extra_forbidden":
        meant = _meant(item["loc"])
        return f"{key}: unknown key; " + (f"did you mean {meant}?" if meant else "check the spelling against docs/config.md")
    variable = _variable(*item["loc"][:2])
    if variable in env:
        key = f"{key} (set by {variable} in the environment)"
    return f"{key}: {str(item['msg']).removeprefix('Value error, ')}"


def _meant(place: Sequence[Any]) -> str | None:
    """The key beside the unknown one at ``place`` that is spelt much like it."""
    model: type[BaseModel] = Config
    for part in place[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return None
        model = field.annotation
    close = difflib.get_close_matches(str(place[-1]), model.model_fields, n=1)
    return ".".join([*map(str, place[:-1]), *close]) if close else None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; `pairloop init DIR` writes one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _apply_env(data: dict[str, Any], env: Mapping[str, str]) -> None:
    """Overrides such as PAIRLOOP_TRAIN_BETA=0.2; values are read as TOML where they parse, as strings otherwise."""
    for variable, (section, key) in _variables().items():
        raw = env.get(variable)
        if raw is not None:
            data.setdefault(section, {})[key] = _toml_value(raw)
    if f"{ENV_PREFIX}STATE_DIR" in env:
        data["state_dir"] = env[f"{ENV_PREFIX}STATE_DIR"]


def _variables() -> dict[str, tuple[str, str]]:
    """The variable of each setting → its section and key."""
    sections = {
        section: field.annotation
        for section, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    return {_variable(section, key): (section, key) for section, model in sections.items() for key in model.model_fields}


def _toml_value(raw: str) -> Any:
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw
