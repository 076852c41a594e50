"""A load of chat requests from a few clients at once: closed loops over kept connections, as cheap as Python lets them be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from pairloop.errors import SystemFailure

PATIENCE_S = 60.0
PATH = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Load:
    """Seconds until each reply was whole, and until its first byte of content (of a stream: of its first event)."""

    whole_s: list[float]
    first_s: list[float]
    wall_s: float


def request_bytes(url: str, body: dict[str, Any]) -> bytes:
    """One request as it goes over the wire."""
    content = json.dumps(body).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer none\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def run(url: str, requests: Sequence[bytes], clients: int) -> Load:
    """Send all requests, by so many clients, each of which waits for its reply. SystemFailure for any reply but a 200."""
    return asyncio.run(_run(url, requests, clients))


async def _run(url: str, requests: Sequence[bytes], clients: int) -> Load:
    whole_s: list[float] = []
    first_s: list[float] = []
    waiting = iter(requests)

    async def client() -> None:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            for request in waiting:
                begun = perf_counter()
                writer.write(request)
                first = await asyncio.wait_for(_read_reply(reader), PATIENCE_S)
                whole_s.append(perf_counter() - begun)
                first_s.append(first - begun)
        finally:
            writer.close()

    begun = perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return Load(whole_s, first_s, perf_counter() - begun)


async def one_reply(url: str, request: bytes) -> tuple[dict[str, str], list[bytes]]:
    """The headers and the pieces of one reply; of a stream, its events."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(request)
        headers = await _read_head(reader)
        pieces: list[bytes] = []
        await _read_body(reader, headers, pieces)
        return headers, pieces
    finally:
        writer.close()


async def _read_reply(reader: asyncio.StreamReader) -> float:
    """Reads to the end of a reply; when its first content came."""
    return await _read_body(reader, await _read_head(reader), [])


async def _read_head(reader: asyncio.StreamReader) -> dict[str, str]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status, *lines = head.rstrip().split("\r\n")
    if " 200 " not in status:
        raise SystemFailure(f"a request of the benchmark was answered {status}")
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str], pieces: list[bytes]) -> float:
    """Appends what came to ``pieces``; when the first of it did."""
    if "content-length" in headers:
        pieces.append(await reader.readexactly(int(headers["content-length"])))
        return perf_counter()
    first = 0.0
    while size := int(await reader.readuntil(b"\r\n"), 16):
        pieces.append((await reader.readexactly(size + 2))[:-2])
        first = first or perf_counter()
    await reader.readexactly(2)
    return first
