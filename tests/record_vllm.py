"""Records what a real vLLM says, for the tests that have none: ``python -m tests.record_vllm URL BASE_DIR ADAPTERS_DIR``.

The server must serve the starter with ``--enable-lora --max-lora-rank 16 --max-model-len 512``; ``ADAPTERS_DIR`` holds ``a1``
(rank 4) and ``rank32``. Paths and ids of the recording machine are replaced.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import httpx

from pairloop.policy.protocols import SampleRequest
from pairloop.policy.remote.wire import completion_body
from pairloop.template import ChatTemplate
from pairloop.types import Message, SamplingParams

FOLDER = Path(__file__).parent / "recorded" / "vllm"
SCHEMA: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}


def exchanges(base_dir: Path, adapters: str) -> dict[str, tuple[str, str, dict[str, Any] | None]]:
    """Name → method, path, body; in this order."""
    tokens = ChatTemplate.load(base_dir)
    prompt = tokens.encode_prompt((Message("user", "Where is my order 4417?"),))

    def ask(
        model: str = "tiny", *, n: int = 1, top: int = 0, ids: tuple[int, ...] = prompt, **params: Any
    ) -> tuple[str, str, Any]:
        shape = params.pop("response_format", None)
        settings = SamplingParams(**{"max_tokens": 12, "seed": 5, **params})
        request = SampleRequest(ids, 0, n, settings, top_logprobs=top, response_format=shape)
        return "POST", "/v1/completions", completion_body(request, model, n=n, eos_token_ids=tokens.eos_token_ids)

    def lora(verb: str, name: str, folder: str | None = None) -> tuple[str, str, Any]:
        body = {"lora_name": name} | ({"lora_path": f"{adapters}/{folder}"} if folder else {})
        return "POST", f"/v1/{verb}_lora_adapter", body

    return {
        "health": ("GET", "/health", None),
        "models_base": ("GET", "/v1/models", None),
        "two": ask(n=2),
        "top": ask(n=2, top=3),
        "eos": ask(temperature=0.0, max_tokens=80),
        "stop": ask(temperature=0.0, max_tokens=80, stop=("order", "never")),
        "bytes": ask(ids=tokens.encode_prompt("öäü ß öäü ß öäü"), temperature=2.0, max_tokens=60, seed=18),
        "greedy_two": ask(n=2, temperature=0.0),
        "unknown_model": ask("bot--v9-00000000"),
        "bad_schema": ask(response_format=SCHEMA),
        "bad_token": ask(ids=(99_999,)),
        "load": lora("load", "bot--v1-00000001", "a1"),
        "load_again": lora("load", "bot--v1-00000001", "a1"),
        "load_rank": lora("load", "bot--v2-00000002", "rank32"),
        "load_missing": lora("load", "bot--v3-00000003", "nowhere"),
        "models_adapter": ("GET", "/v1/models", None),
        "adapter": ask("bot--v1-00000001", temperature=0.0),
        "unload": lora("unload", "bot--v1-00000001"),
        "unload_again": lora("unload", "bot--v1-00000001"),
        "no_route": ("GET", "/v1/nowhere", None),
    }


def main() -> None:
    url, base_dir, adapters = sys.argv[1:]
    FOLDER.mkdir(parents=True, exist_ok=True)
    with httpx.Client(base_url=url, timeout=120) as http:
        for name, (method, path, body) in exchanges(Path(base_dir), adapters).items():
            reply = http.request(method, path, json=body)
            found = {
                "request": {"method": method, "path": path, "json": body},
                "response": {"status": reply.status_code, "type": reply.headers.get("content-type"), "body": reply.text},
            }
            text = json.dumps(found, indent=1).replace(adapters, "/adapters").replace(str(base_dir), "/models/starter")
            text = re.sub(r"cmpl-[0-9a-f]+", "cmpl-0", re.sub(r"modelperm-[0-9a-f]+", "modelperm-0", text))
            text = re.sub(r'(\\"created\\":)\d+', r"\g<1>1700000000", text)
            (FOLDER / f"{name}.json").write_text(text + "\n")
            print(name, reply.status_code)


if __name__ == "__main__":
    main()
