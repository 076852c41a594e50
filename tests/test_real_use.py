"""Real files through the product as users run it: the command line and a server in its own process."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pairloop.config import load_config
from pairloop.demo.server import start_server
from pairloop.demo.traffic import Shop, open_shop
from pairloop.scaffold import starter_recipe, write_config
from pairloop.store import Store, groups

DATA = Path(os.environ.get("PAIRLOOP_TEST_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data").resolve()
QUERIES = 1_000
CLIENTS = 16

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "expected_counts.json").exists(), reason=f"no test data in {DATA}"),
]


def test_a_one_off_run_on_thumbs_with_a_recurrent_model(tmp_path: Path) -> None:
    """Prompts are plain strings, so the model needs no template; pairs above 512 tokens (bytes) are refused and counted."""
    rows = tmp_path / "tm4.jsonl"
    with rows.open("w", encoding="utf-8") as sink:
        for text in (DATA / "taskmaster/tm4_thumbs.jsonl").read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            thumb = {"prompt": line["context"], "completion": line["generation"], "label": line["reward"] == 1.0}
            sink.write(json.dumps(thumb) + "\n")
    settings = "--method full --batch-size 4 --epochs 2 --max-length 512 --learning-rate 1e-4 --heldout-share 0.2"
    model, out = str(DATA / "models/tiny-rwkv-4v0-660K"), str(tmp_path / "model")
    command = [sys.executable, "-m", "pairloop", "train", "--data", str(rows), "--model", model, "--out", out, "--json"]
    done = subprocess.run([*command, *settings.split()], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout)
    result = document["result"]
    print(json.dumps({key: result[key] for key in ("steps", "pairs", "dropped", "heldout_before", "heldout_after")}))
    assert document["rows"] == 1690
    assert sum(document["pairs"].values()) == 338
    assert result["dropped"]["over_long"] > 0
    assert result["steps"] >= 30
    before, after = result["heldout_before"], result["heldout_after"]
    assert after["n"] == before["n"] > 0
    assert after["accuracy"] * after["n"] == pytest.approx(round(after["accuracy"] * after["n"]))
    assert after["loss"] < before["loss"]
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_a_thousand_queries_are_a_thousand_groups(tmp_path: Path) -> None:
    with (DATA / "banking77/test.csv").open(encoding="utf-8", newline="") as file:
        queries = [row["text"] for row in csv.DictReader(file)][:QUERIES]
    config_path = write_config(tmp_path / "bot", starter_recipe())
    server = start_server(config_path, log=tmp_path / "server.log")
    try:
        answered = asyncio.run(_ask_all(server.url, queries))
    finally:
        server.stop()
    assert len(set(answered)) == len(queries) == QUERIES
    store = Store.open(load_config(config_path, env={}))
    try:
        with store.reading() as c:
            assert groups.count(c, "support-bot") == QUERIES
            for group_id, query in answered.items():
                group = groups.get(c, group_id)
                assert group is not None
                assert not isinstance(group.prompt, str)
                assert group.prompt[-1].content == query
                assert len(group.completions) == 2
    finally:
        store.close()


async def _ask_all(url: str, queries: list[str]) -> dict[str, str]:
    """Group id → query, as the server acknowledged them."""
    answered: dict[str, str] = {}
    waiting = iter(enumerate(queries))

    async def client(shop: Shop) -> None:
        for number, query in waiting:
            body = {
                "model": "support-bot",
                "n": 2,
                "user": f"reader-{number}",
                "messages": [{"role": "user", "content": query}],
            }
            answered[str((await shop.post("/v1/chat/completions", body))["id"])] = query

    async with open_shop("support-bot", lambda: url) as shop, asyncio.TaskGroup() as clients:
        for _ in range(CLIENTS):
            clients.create_task(client(shop))
    return answered
