"""Versions as folders for use elsewhere: what transformers and PEFT read from them, and what their cards say."""

from __future__ import annotations

import io
import json
import re
import shlex
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, PeftModel
from sqlalchemy import Connection
from tests.learner_rig import job_maker, text_pairs
from tests.server import RunningServer
from tests.tiny_models import byte_tokenizer, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pairloop.cli import pairloop
from pairloop.config import Config, parse_config
from pairloop.errors import BrokenVersionError, ModelError, NotFoundError, StoreError, UserError
from pairloop.formats import snapshot
from pairloop.learner import train
from pairloop.learner.merge import check
from pairloop.loop import export
from pairloop.loop.cycle.base import register_base
from pairloop.loop.export.archive import PIECE, Member, archive
from pairloop.policy.fake import FakePolicy
from pairloop.policy.scoring import LoraSettings, load_causal_lm
from pairloop.store import Store, cycles, datasets, removed, runs, verdicts, versions
from pairloop.store.keys import Scope
from pairloop.store.schema import removed_artifacts
from pairloop.types import (
    Alias,
    Cycle,
    CycleState,
    CycleStep,
    Dataset,
    Reason,
    Run,
    RunStatus,
    Verdict,
    VerdictKind,
    Version,
    VersionKind,
)
from pairloop.web.scopes import scopes_of

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SECRET = "the words of a customer"
REPORT: dict[str, Any] = {
    "metrics": {"length_ratio": {"mean": 1.05, "lo": 0.98, "hi": 1.125, "n": 64}},
    "errors": {},
    "notes": [],
}
REPORT |= {"challenger": 1, "champion": 0, "prompts": 16, "prompts_from": "gate", "samples": 64}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md", "lineage.json")
PEFT_WARNINGS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
Auto: Any = AutoModelForCausalLM


class World:
    """A policy of a tiny model, whose version 1 was trained by a cycle: really trained, and published as training does it."""

    def __init__(
        self, folder: Path, *, method: str = "lora", name: str = "bot", store: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.base = write_model(folder / "base", tokenizer=byte_tokenizer())
        self.name = name
        policy = {"name": self.name, "model": str(self.base), "method": method}
        self.config: Config = parse_config({"state_dir": folder / "state", "policy": policy, "store": store or {}})
        self.store = Store.open(self.config)
        job = job_maker(folder, self.base)(text_pairs(8), method=method, recipe={"epochs": 1, "learning_rate": 0.05})
        result = train(job)
        assert result.error is None, result.error
        manifest = {"noun": "version", "recipe": job.recipe(), "result": result.as_dict()}
        self.artifact = self.store.artifacts.publish(Path(job.out_dir), manifest)
        self.version = self._record(VersionKind.FULL if method == "full" else VersionKind.ADAPTER)

    def _record(self, kind: VersionKind) -> Version:
        with self.store.artifacts.stage() as folder:
            snapshot.write(folder / "train.jsonl", text_pairs(6))
            snapshot.write(folder / "heldout.jsonl", text_pairs(2, start=6))
            data = self.store.artifacts.publish(folder, {})
        self.data_hash = data.hash
        dataset = Dataset("dataset_1", self.name, str(data.path), 6, 2, {"picks": 9}, {"instant_pick": 3}, NOW)
        version = Version(self.name, 1, kind, str(self.artifact.path), self.artifact.hash, 0, "dataset_1", "run_1", NOW)
        steps: list[tuple[CycleState, dict[str, Any]]] = [
            (CycleState.BUILDING, {}),
            (CycleState.TRAINING, {}),
            (CycleState.CHECKING, {"version": 1}),
        ]
        steps += [(CycleState.DUELLING, {"report": REPORT}), (CycleState.PROMOTED, {"reason": SECRET})]
        cycle = Cycle("cycle_1", self.name, 7, 0, "test", NOW, tuple(CycleStep(state, record, NOW) for state, record in steps))
        run = Run("run_1", self.name, "cycle_1", "dataset_1", 0, RunStatus.SUCCEEDED, "me", 1, NOW, NOW, {}, {}, None, NOW)
        reasons = (Reason("duel", True, f"because of {SECRET}", 27.5, 20.0), Reason("max_picks", None, SECRET))
        verdict = Verdict(VerdictKind.PROMOTE, reasons, e_value=27.5, wins=30, losses=10, ties=4, raters=44)

        def write(c: Connection) -> None:
            cycles.insert(c, cycle)
            datasets.insert(c, dataset, feedback_seq=1, cycle_id="cycle_1", pairs=())
            runs.insert(c, run)
            versions.insert(c, version)
            versions.set_alias(c, self.name, Alias.CHAMPION, 1)
            verdicts.insert(c, "cycle_1", None, verdict, NOW)

        register_base(self.store, self.config)
        self.store.write(write)
        return version

    def export(self, name: str = "out", **options: Any) -> Path:
        return export.run(self.store, self.config, self.version, self.folder / name, **options).path

    def served(self) -> torch.nn.Module:
        """Version 1 as engine and trainer read it."""
        return load_causal_lm(self.base, self.artifact.path, self.version.kind)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("export"))
    yield made
    made.store.close()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def front_matter(folder: Path) -> dict[str, Any]:
    _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(front)
    return found


def leftovers(folder: Path, out: str) -> Sequence[str]:
    return [path.name for path in folder.iterdir() if out in path.name]


@PEFT_WARNINGS
def test_an_exported_adapter_is_what_peft_reads(world: World) -> None:
    out = world.export("adapter")
    assert {path.name for path in out.iterdir()} == {*ADAPTER_FILES}
    wanted = logits(world.served())
    loaded: Any = PeftModel
    assert torch.equal(logits(loaded.from_pretrained(Auto.from_pretrained(world.base), out)), wanted)
    by_itself: Any = AutoPeftModelForCausalLM
    assert torch.equal(logits(by_itself.from_pretrained(out)), wanted)
    assert not torch.allclose(logits(Auto.from_pretrained(world.base)), wanted, atol=0.1)


@PEFT_WARNINGS
def test_a_stored_version_is_itself_what_peft_reads(world: World) -> None:
    by_itself: Any = AutoPeftModelForCausalLM
    assert torch.equal(logits(by_itself.from_pretrained(world.artifact.path)), logits(world.served()))


def test_a_merged_version_answers_as_base_and_adapter(world: World) -> None:
    out = world.export("merged", merged=True)
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "lineage.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (logits(Auto.from_pretrained(out)) - logits(world.served())).abs().max() <= 1e-5
    tokenizer: Any = AutoTokenizer
    prompt = tokenizer.from_pretrained(out).apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt == "user: hi\n"


def test_the_card_tells_where_a_version_came_from_and_quotes_nobody(world: World) -> None:
    card = (world.export("card", base_name="org/tiny") / "README.md").read_text()
    assert front_matter(world.folder / "card") == {
        "base_model": "org/tiny",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["pairloop", "dpo", "lora"],
    }
    assert json.loads((world.folder / "card" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"
    for expected in (
        world.artifact.hash,
        world.data_hash,
        "| parent | bot@0 |",
        "| rows to train on | 6 |",
        "| rows held out | 2 |",
        "| count: picks | 9 |",
        "| set aside: instant_pick | 3 |",
        "| length_ratio | 1.05 [0.98, 1.125] | 64 |",
        "## Gate: PROMOTE",
        "30 picks won, 10 lost, 4 ties, 44 raters; win rate 0.75 [0.5981, 0.8581] (95 %); e-value 27.5.",
        "| duel | pass | 27.5 | 20 |",
        "| max_picks | open | – | – |",
        f"torch {torch.__version__.partition('+')[0]}",
        '"learning_rate": 0.05',
    ):
        assert expected in card
    assert SECRET not in card
    assert "what is" not in card


def test_the_licence_is_the_bases_or_left_to_the_user(world: World, tmp_path: Path) -> None:
    assert export.license_of(tmp_path) is None
    for text, expected in (
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n", "apache-2.0"),
        ('---\ntags: [x]\nlicense: "mit"\n---\n', "mit"),
        ("# Base\nlicense: mit\n", None),
        ("---\ntags: [x]\n---\nlicense: mit\n", None),
    ):
        (tmp_path / "README.md").write_text(text)
        assert export.license_of(tmp_path) == expected
    (world.base / "README.md").write_text("---\nlicense: mit\n---\n")
    try:
        assert front_matter(world.export("licensed"))["license"] == "mit"
    finally:
        (world.base / "README.md").unlink()


def test_a_full_version_is_copied_with_a_card(tmp_path: Path) -> None:
    world = World(tmp_path, method="full")
    with world.store:
        out = world.export("model")
        assert torch.equal(logits(Auto.from_pretrained(out)), logits(world.served()))
        assert front_matter(out)["library_name"] == "transformers"
        assert not (out / "manifest.json").exists()


def test_a_version_of_another_base_is_exported_with_that_one(world: World, tmp_path: Path) -> None:
    config = parse_config({"state_dir": world.config.state_dir, "policy": {"name": "other", "model": "starter"}})
    out = export.run(world.store, config, world.version, tmp_path / "out", merged=True)
    assert out.base_model == str(world.base)
    assert (logits(Auto.from_pretrained(out.path)) - logits(world.served())).abs().max() <= 1e-5


# --- refused


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
def test_an_adapter_on_tied_embeddings_is_not_folded_in(world: World) -> None:
    torch.manual_seed(0)
    model: Any = load_causal_lm(world.base, trainable=True, lora=LoraSettings(4, 8, ("lm_head",)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(world.folder / "tied", save_embedding_layers=False)
    artifact = world.store.artifacts.publish(world.folder / "tied", {})
    version = Version("bot", 2, VersionKind.ADAPTER, str(artifact.path), artifact.hash, 1, None, None, NOW)
    with pytest.raises(ModelError, match="is not base and adapter"):
        export.run(world.store, world.config, version, world.folder / "untied", merged=True)
    assert leftovers(world.folder, "untied") == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_model_that_answers_otherwise_is_refused(dtype: str) -> None:
    before_TV = torch.randn(32, 50, dtype=torch.float64).log_softmax(-1)
    check(before_TV, before_TV + 1e-5, dtype)
    with pytest.raises(ModelError, match="nats per token apart"):
        check(before_TV, before_TV.roll(1, dims=1), dtype)
    with pytest.raises(ModelError, match="nan nats"):
        check(before_TV, torch.full_like(before_TV, torch.nan), dtype)


def test_nothing_is_overwritten(world: World) -> None:
    mine = world.folder / "mine"
    mine.mkdir()
    world.export("mine/empty-is-free")
    with pytest.raises(UserError, match="is not empty"):
        world.export("mine")
    (world.folder / "file").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        world.export("file")


def test_a_stored_version_that_was_changed_is_not_handed_on(tmp_path: Path) -> None:
    world = World(tmp_path)
    with world.store:
        path = world.artifact.path / "adapter_model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(BrokenVersionError, match=r"bot@1 .*adapter_model\.safetensors was changed.*pairloop doctor"):
            world.export()
        assert leftovers(tmp_path, "out") == []


@contextmanager
def hidden(path: Path) -> Iterator[None]:
    away = path.rename(path.with_name(f"{path.name}.gone"))
    try:
        yield
    finally:
        away.rename(path)


def test_over_http_it_is_said_what_is_missing_and_what_to_do(world: World, tmp_path: Path) -> None:
    beside: Any = SimpleNamespace(store=world.store)
    world.store.write(lambda c: versions.set_alias(c, "bot", Alias.CHAMPION, 0))
    with RunningServer(tmp_path / "server", config=world.config, policy=FakePolicy(), beside=beside) as server:
        for broken in ("adapter_model.safetensors", "manifest.json", ""):
            with hidden(world.artifact.path / broken):
                refused, page = server.http.get("/v1/exports/bot@1"), server.http.get("/versions/1").text
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (500, "broken_artifact")
            assert refused.headers["x-should-retry"] == "false"
            said = ("bot@1", f"{broken or 'manifest.json'} is missing", "`pairloop doctor`")
            assert [part for part in said if part not in error["message"]] == []
            assert str(world.folder) not in refused.text
            assert "/v1/exports/" not in page
            assert "Files of it are missing" in page
    world.store.write(lambda c: versions.set_alias(c, "bot", Alias.CHAMPION, 1))


def test_bases_and_the_policy_without_a_model_have_nothing_to_export(world: World, tmp_path: Path) -> None:
    base = Version("bot", 0, VersionKind.BASE, str(world.base), "0" * 64, None, None, None, NOW)
    with pytest.raises(UserError, match="is the base model itself"):
        export.run(world.store, world.config, base, tmp_path / "out")
    fake = parse_config({"state_dir": tmp_path, "policy": {"name": "bot", "model": "fake"}})
    with pytest.raises(ModelError, match="has no weights to export"):
        export.run(world.store, fake, world.version, tmp_path / "out")


def test_a_version_is_named_as_models_are(world: World) -> None:
    with world.store.reading() as c:
        for name, number in (("1", 1), ("bot@1", 1), ("bot", 1), ("bot@champion", 1), ("bot@base", 0), ("0", 0)):
            assert versions.named(c, "bot", name).number == number
        for name in (
            "9",
            "ft:bot:pairloop::nothing",
            "bot@9",
            "bot@challenger",
            "other",
            "other@1",
            "bot@",
            "@1",
            "",
            "-1",
            "bot@1.0",
            "9" * 30,
            "bot@²",
        ):
            with pytest.raises(NotFoundError, match="no version"):
                versions.named(c, "bot", name)


def test_the_verb_writes_once_and_then_refuses(world: World, tmp_path: Path) -> None:
    (tmp_path / "pairloop.toml").write_text(
        f'state_dir = "{world.config.state_dir}"\n[policy]\nname = "bot"\nmodel = "{world.base}"\n'
    )
    arguments = ["versions", "export", "bot@1", str(tmp_path / "out"), "--config", str(tmp_path), "--json"]
    done = CliRunner().invoke(pairloop, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "version": "bot@1",
        "path": str(tmp_path / "out"),
        "form": "adapter",
        "base_model": str(world.base),
    }
    again = CliRunner().invoke(pairloop, arguments)
    assert again.exit_code == 2
    assert "is not empty" in json.loads(again.stdout)["error"]["message"]
    listed = CliRunner().invoke(pairloop, ["versions", "--config", str(tmp_path), "--json"])
    assert json.loads(listed.stdout)["aliases"] == {"champion": 1}


@PEFT_WARNINGS
def test_the_documented_commands_do_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "interop.md").read_text()
    blocks = {kind: re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("sh", "python", "toml")}
    world = World(tmp_path, name="support-bot")
    with world.store:
        (tmp_path / "pairloop.toml").write_text(
            f'state_dir = "state"\n[policy]\nname = "support-bot"\nmodel = "{world.base}"\n{blocks["toml"][0]}'
        )
        monkeypatch.chdir(tmp_path)
        commands = [shlex.split(line, comments=True)[1:] for line in blocks["sh"][0].splitlines()]
        assert len(commands) == 2
        for command in commands:
            done = CliRunner().invoke(pairloop, command, catch_exceptions=False)
            assert done.exit_code == 0, done.output
        scope: dict[str, Any] = {}
        exec(blocks["python"][0], scope)
        assert (logits(scope["model"]) - logits(scope["same"])).abs().max() <= 1e-5
        assert torch.equal(logits(scope["model"]), logits(world.served()))
        assert scope["tokenizer"].chat_template


# --- the archive


def test_the_archive_holds_what_the_folder_holds_and_is_as_long_as_it_says(world: World) -> None:
    out, found = world.export("beside"), export.stream(world.store, world.config, world.version)
    pieces = list(found.pieces())
    content = b"".join(pieces)
    assert (found.name, found.size) == ("bot-1.tar", len(content))
    assert max(map(len, pieces)) <= PIECE
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(world.folder / "unpacked", filter="data")
        assert tar.getnames() == [f"bot-1/{name}" for name in ADAPTER_FILES]
    for path in out.iterdir():
        assert (world.folder / "unpacked" / "bot-1" / path.name).read_bytes() == path.read_bytes(), path.name
    assert b"".join(export.stream(world.store, world.config, world.version).pieces()) == content


@settings(max_examples=25)
@given(st.lists(st.tuples(st.text("abcä/", min_size=1, max_size=300), st.integers(0, 3 * PIECE // 2)), max_size=3))
def test_any_members_come_out_as_they_went_in(made: list[tuple[str, int]]) -> None:
    members = [Member(f"{i}/{name.strip('/')}x", bytes([i]) * size) for i, (name, size) in enumerate(made)]
    found = archive("f", members, NOW)
    content = b"".join(found.pieces())
    assert len(content) == found.size
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        read = [(info.name, file.read()) for info in tar if (file := tar.extractfile(info)) is not None]
    assert read == [(f"f/{one.name}", one.content) for one in members]


def test_a_file_that_shrinks_while_it_is_sent_ends_the_stream_short(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 1_000)
    found = archive("f", [Member("weights", path)], NOW)
    path.write_bytes(b"x" * 999)
    sent = list[bytes]()
    with pytest.raises(StoreError, match="shorter than it was"):
        sent.extend(found.pieces())
    assert 0 < sum(map(len, sent)) < found.size


def test_lineage_says_for_programs_what_the_card_says_and_quotes_nobody(world: World) -> None:
    text = (world.export("lineage") / "lineage.json").read_text()
    told = json.loads(text)
    assert (told["version"], told["parent"], told["form"], told["cycle"]) == ("bot@1", "bot@0", "adapter", 7)
    assert told["dataset"]["rows"] == {"train": 6, "heldout": 2}
    assert (told["dataset"]["hash"], told["artifact_hash"]) == (world.data_hash, world.artifact.hash)
    assert told["evaluation"]["length_ratio"]["mean"] == 1.05
    assert told["gate"]["rules"][0] == {"rule": "duel", "passed": True, "observed": 27.5, "threshold": 20.0}
    assert told["recipe"]["train"]["learning_rate"] == 0.05
    assert SECRET not in text


def test_a_link_on_the_versions_page_downloads_it_and_what_is_gone_is_said(world: World, tmp_path: Path) -> None:
    beside: Any = SimpleNamespace(store=world.store)
    world.store.write(lambda c: versions.set_alias(c, "bot", Alias.CHAMPION, 0))  # the server without a model serves the base
    with RunningServer(tmp_path / "server", config=world.config, policy=FakePolicy(), beside=beside) as server:
        page = server.http.get("/versions/1").text
        assert 'href="/v1/exports/bot%401"' in page
        assert "pairloop versions export 1 ./bot-1" in page
        page = server.http.get("/versions/0").text
        assert ("/v1/exports/" in page, "there is no adapter" in page) == (False, True)
        reply = server.http.get("/v1/exports/bot%401", params={"base": "org/tiny"})
        assert reply.status_code == 200
        assert reply.headers["content-disposition"] == 'attachment; filename="bot-1.tar"'
        assert int(reply.headers["content-length"]) == len(reply.content)
        with tarfile.open(fileobj=io.BytesIO(reply.content)) as tar:
            read: Any = tar.extractfile("bot-1/adapter_config.json")
            assert json.load(read)["base_model_name_or_path"] == "org/tiny"
        for name, status, words in (
            ("bot@0", 400, "is the base model itself"),
            ("bot@9", 404, "bot@9"),
            ("..%2F..%2Fetc%2Fpasswd", 404, ""),
        ):
            refused = server.http.get(f"/v1/exports/{name}")
            assert (refused.status_code, words in refused.text) == (status, True), refused.text
        world.store.write(lambda c: removed.mark(c, world.version.path, removed.Why.RETENTION, NOW))
        refused = server.http.get("/v1/exports/bot@1")
        page = server.http.get("/versions/1").text
        world.store.write(lambda c: c.execute(sa.delete(removed_artifacts)))
    world.store.write(lambda c: versions.set_alias(c, "bot", Alias.CHAMPION, 1))
    assert (refused.status_code, "pairloop rebuild 1" in refused.text) == (404, True)
    assert "/v1/exports/" not in page
    assert "Its weights were removed" in page
    assert "export-command" not in page
    assert scopes_of("GET", "/v1/exports/bot@1") == {Scope.OPERATE}
