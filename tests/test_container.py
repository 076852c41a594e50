"""Containerfile and compose file say what configuration, command line and server know; that needs no container engine."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import pytest
import yaml
from sqlalchemy.engine import make_url
from tests.stores import open_store

from pairloop.cli import pairloop
from pairloop.config import Config, load_config
from pairloop.policy.fake import FakePolicy
from pairloop.web.app import create_app

REPOSITORY = Path(__file__).parent.parent
INSIDE = REPOSITORY / "configs" / "container.toml"
ASKED_FOR = {"POSTGRES_PASSWORD": "pw", "VLLM_API_KEY": "key", "MODEL_DIR": "/srv/base"}
SECRET = re.compile(r"PASSWORD|KEY|TOKEN|SECRET")
_VARIABLE = re.compile(r"\$\{(?P<name>[A-Z_]+)(?::(?P<kind>[-?])(?P<text>[^}]*))?\}")


def filled_in(text: str, env: Mapping[str, str] = ASKED_FOR) -> str:
    """Compose's ``${NAME}``, ``${NAME:-default}`` and ``${NAME:?message}``; KeyError for one that had to be given."""
    return _VARIABLE.sub(lambda m: env[m["name"]] if m["kind"] != "-" else env.get(m["name"], m["text"]), text)


def compose(env: Mapping[str, str] = ASKED_FOR) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(filled_in((REPOSITORY / "compose.yaml").read_text(), env))
    return found


def instructions() -> list[tuple[str, str]]:
    """The Containerfile's instructions, continued lines joined."""
    text = (REPOSITORY / "Containerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def said(name: str) -> list[str]:
    return [text for instruction, text in instructions() if instruction == name]


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The options of a verb as the command line would take them; a UsageError where it would not."""
    command: click.Command = pairloop
    while isinstance(command, click.Group):
        found = command.commands.get(arguments[0])
        assert found is not None, f"pairloop has no verb {arguments[0]}"
        command, arguments = found, arguments[1:]
    return command.make_context(command.name, list(arguments)).params


def config_of(service: str) -> Config:
    """The configuration that a service of ours runs with."""
    return load_config(INSIDE, env=compose()["services"][service]["environment"])


@pytest.mark.parametrize("service", ["server", "worker"])
def test_every_setting_of_ours_is_a_key_of_the_configuration(service: str) -> None:
    settings = {
        name: value for name, value in compose()["services"][service]["environment"].items() if name.startswith("PAIRLOOP_")
    }
    known = {
        f"PAIRLOOP_{section}_{key}".upper()
        for section, field in Config.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
    }
    assert settings.keys() <= known
    config = config_of(service)
    assert config.policy.model == "/model"
    assert make_url(config.database_url).host in compose()["services"]
    assert make_url(config.database_url).get_backend_name() == "postgresql"


def test_the_commands_are_verbs_of_ours() -> None:
    assert parsed(json.loads(said("CMD")[0]))["config_path"] == Path("/etc/pairloop/pairloop.toml")
    services = compose()["services"]
    assert parsed(services["server"]["command"])["no_scheduler"] is True
    parsed(services["worker"]["command"])
    for path in ("Containerfile", "compose.yaml"):
        for line in re.findall(
            r"^#\s+docker (?:run|compose run) .*? (?:pairloop|server) (\w+ .*?)(?:\s+#.*)?$",
            (REPOSITORY / path).read_text(),
            re.M,
        ):
            parsed(shlex.split(line))
    with pytest.raises(click.UsageError):
        parsed(["serve", "--no-such-option"])


def test_ports_and_paths_agree() -> None:
    inside, services = load_config(INSIDE, env={}), compose()["services"]
    port = inside.serve.port
    assert said("EXPOSE") == [str(port)]
    assert services["server"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert said("VOLUME") == [str(inside.state_dir)]
    assert f"state:{inside.state_dir}" in services["server"]["volumes"]
    assert f"state:{inside.state_dir}:ro" in services["vllm"]["volumes"]
    assert services["server"]["volumes"] == services["worker"]["volumes"]
    assert any(text == f"configs/container.toml {WORKDIR}/pairloop.toml" for text in said("COPY"))
    assert said("WORKDIR")[-1] == WORKDIR
    for text in said("COPY"):
        for source in text.split()[:-1]:
            assert source.startswith(("--from=", "/opt")) or (REPOSITORY / source).exists(), source
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert all(f"!{source}" in ignored for text in said("COPY") if "--from" not in text for source in text.split()[:-1])


WORKDIR = "/etc/pairloop"


def test_the_health_check_asks_for_a_route_that_exists(tmp_path: Path) -> None:
    (check,) = said("HEALTHCHECK")
    found = re.search(r"http://127\.0\.0\.1:(\d+)(/[a-z/]+)", check)
    assert found is not None
    assert int(found[1]) == load_config(INSIDE, env={}).serve.port
    with open_store(tmp_path / "artifacts") as store:
        assert found[2] in create_app(store, FakePolicy(), Config(), None).openapi()["paths"]


def test_nobody_but_pairloop_reaches_engine_and_database() -> None:
    services = compose()["services"]
    assert {name for name, service in services.items() if "ports" in service} == {"server"}
    config: Any = config_of("server").policy
    vllm = services["vllm"]
    (url,) = config.engine_urls
    options = dict(option.removeprefix("--").split("=", 1) for option in vllm["command"] if "=" in option)
    assert (urlsplit(url).hostname, urlsplit(url).port) == ("vllm", int(options["port"]))
    assert config.engine_key_env in vllm["environment"]
    assert vllm["environment"][config.engine_key_env] == services["server"]["environment"][config.engine_key_env]
    assert config.engine_model == options["served-model-name"]
    assert (vllm["command"][0], options["dtype"]) == (config.model, config.dtype)
    assert int(options["max-lora-rank"]) >= config.lora_rank
    assert "--enable-lora" in vllm["command"]
    assert vllm["environment"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"


def test_secrets_come_from_the_environment_and_have_no_default() -> None:
    raw = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
    for service in raw["services"].values():
        for name, value in service["environment"].items():
            if SECRET.search(name) and not name.endswith("_ENV"):
                assert re.fullmatch(r"\$\{[A-Z_]+:\?[^}]+\}", value), name
    for name in ASKED_FOR:
        with pytest.raises(KeyError, match=name):
            compose({other: value for other, value in ASKED_FOR.items() if other != name})
    assert not any(SECRET.search(text) for text in [*said("ENV"), *said("ARG")])


def test_the_image_runs_as_nobody_in_particular_and_installs_what_is_pinned() -> None:
    names = [name for name, _ in instructions()]
    assert said("USER") == ["pairloop"]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert all("-c constraints.txt" in text for text in said("RUN") if "pip install" in text)
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (default,) = (text.removeprefix("EXTRAS=") for text in said("ARG") if text.startswith("EXTRAS="))
    assert set(default.split(",")) <= extras.keys()
