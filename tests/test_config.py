from __future__ import annotations

from pathlib import Path

import pytest

from pairloop.config import Config, duration_s, load_config, override, parse_config
from pairloop.errors import ConfigError, ConflictError
from pairloop.scaffold import render_config, starter_recipe, write_config

REPOSITORY = Path(__file__).parent.parent


def test_what_init_writes_is_read_back_as_it_was_meant(tmp_path: Path) -> None:
    settings = starter_recipe() | {"gate": {"max_picks": 600}, "policy": {"name": "bot", "model": "starter", "method": "full"}}
    config = load_config(write_config(tmp_path / "bot", settings), env={})
    assert config.train.nll_weight == 1.0
    assert config.gate.max_picks == 600
    assert config.policy.name == "bot"
    assert config.state_dir == tmp_path / "bot"


def test_commented_keys_show_their_defaults() -> None:
    text = render_config({})
    assert "# beta = 0.1" in text
    uncommented = text.replace("# beta = 0.1", "beta = 0.1")
    assert uncommented != text


def test_every_toml_in_the_repository_is_loaded() -> None:
    files = [*REPOSITORY.glob("configs/*.toml"), *REPOSITORY.glob("src/pairloop/starter/*.toml")]
    assert files
    for path in files:
        load_config(path, env={})


def test_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    write_config(tmp_path, {})
    with pytest.raises(ConflictError, match="--force"):
        write_config(tmp_path, {})
    write_config(tmp_path, {"gate": {"alpha": 0.01}}, force=True)
    assert load_config(tmp_path, env={}).gate.alpha == 0.01


def test_environment_overrides_a_key(tmp_path: Path) -> None:
    path = write_config(tmp_path, {"train": {"beta": 0.5}})
    config = load_config(path, env={"PAIRLOOP_TRAIN_BETA": "0.2", "PAIRLOOP_POLICY_NAME": "shop"})
    assert config.train.beta == 0.2
    assert config.policy.name == "shop"


def test_a_misspelt_variable_is_told_once_with_the_near_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    judge = {"judge_url": "http://127.0.0.1", "judge_model": "m", "judge_api_key_env": "PAIRLOOP_LABEL_JUDGE_API_KEY"}
    path = write_config(tmp_path, {"label": judge})
    of_kubernetes = {
        "PAIRLOOP_SERVICE_HOST": "10.0.0.1",
        "PAIRLOOP_SERVICE_PORT": "8000",
        "PAIRLOOP_SERVICE_PORT_HTTP": "8000",
        "PAIRLOOP_PORT": "tcp://10.0.0.1:8000",
        "PAIRLOOP_SERVER_PORT": "tcp://10.0.0.1:8000",
        "PAIRLOOP_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "PAIRLOOP_PORT_8000_TCP_PORT": "8000",
        "PAIRLOOP_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    a_secret = {"PAIRLOOP_LABEL_JUDGE_API_KEY": "sk"}
    load_config(path, env={**of_kubernetes, **a_secret, "PAIRLOOP_SOMETHING": "else", "PAIRLOOP_SERVE_PORT": "1"})
    assert caplog.messages == []
    for _ in range(2):
        assert load_config(path, env={**of_kubernetes, "PAIRLOOP_SERV_PORT": "1", "PAIRLOOP_STATEDIR": "x"}).serve.port != 1
    assert caplog.messages == [
        "PAIRLOOP_SERV_PORT is no setting and is ignored; did you mean PAIRLOOP_SERVE_PORT?",
        "PAIRLOOP_STATEDIR is no setting and is ignored; did you mean PAIRLOOP_STATE_DIR?",
    ]


def test_a_misspelt_variable_is_told_once_the_log_is_set_up_and_in_any_case(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, told = write_config(tmp_path, {"log": {"format": "json"}}), list[tuple[str, int]]()
    env = {"PAIRLOOP_SERVE_PROT": "1"}
    load_config(path, env=env, begin_log=lambda section: told.append((section.format, len(caplog.messages))))
    assert told == [("json", 0)]
    assert [text.split()[0] for text in caplog.messages] == ["PAIRLOOP_SERVE_PROT"]
    path.write_text("[train]\nbeta = -1\n")
    with pytest.raises(ConfigError):
        load_config(path, env={"PAIRLOOP_TRIAN_BETA": "1"}, begin_log=lambda _: told.append(("never", 0)))
    assert len(told) == 1
    assert caplog.messages[-1].endswith("did you mean PAIRLOOP_TRAIN_BETA?")


def test_a_wrong_value_of_the_environment_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    (tmp_path / "pairloop.toml").write_text("[train]\nbeta = -1\n")
    with pytest.raises(ConfigError) as told:
        load_config(tmp_path, env={"PAIRLOOP_SERVE_PORT": "tcp://10.0.0.1:8000"})
    assert "serve.port (set by PAIRLOOP_SERVE_PORT in the environment): " in str(told.value)
    assert "train.beta: " in str(told.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": {"bta": 0.1}}, r"train\.bta: unknown key; did you mean train\.beta\?"),
        ({"train": {"zzz": 0.1}}, r"train\.zzz: unknown key; check the spelling"),
        ({"sevre": {"port": 1}}, r"sevre: unknown key; did you mean serve\?"),
        ({"train": {"beta": -1}}, "train.beta"),
        ({"schedule": {"every": "6 parsecs"}}, "not a duration"),
        ({"schedule": {"cron": "99 * * * *"}}, "not a cron line"),
        ({"gate": {"min_picks": 100, "max_picks": 10}}, "min_picks must not exceed"),
        ({"gate": {"offline": True}}, "needs label.verifier"),
        ({"label": {"verifier": "a:b", "judge_url": "http://127.0.0.1", "judge_model": "m"}}, "exclude each other"),
        ({"label": {"judge_url": "http://127.0.0.1"}}, "go together"),
        ({"policy": {"name": "a b"}}, "policy.name"),
    ],
)
def test_illegal_settings_are_refused_with_key_and_reason(data: dict[str, dict[str, object]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(data)


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.toml", env={})
    (tmp_path / "pairloop.toml").write_text("[train\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path, env={})


def test_override_is_checked_as_a_whole() -> None:
    assert override(Config(), {"serve": {"port": 0}}).serve.port == 0
    with pytest.raises(ConfigError, match=r"serve\.port"):
        override(Config(), {"serve": {"port": 70_000}})


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("15m", 900.0), ("6h", 21_600.0), ("1.5d", 129_600.0), ("2w", 1_209_600.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds
