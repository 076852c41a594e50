"""An S3 server of the tests' own: moto on loopback, in a thread of the process that asked for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint of a server that has an empty ``BUCKET``; the environment holds keys for it meanwhile."""
    reason = "needs s3fs and moto (constraints.txt has them)"
    for name in ("s3fs", "moto", "flask", "flask_cors"):
        pytest.importorskip(name, reason=reason)
    server_of: Any = pytest.importorskip("moto.server", reason=reason).ThreadedMotoServer
    before = {name: os.environ.get(name) for name in KEYS}
    os.environ.update(KEYS)
    server = server_of(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        httpx.post(f"{endpoint}/moto-api/reset", trust_env=False).raise_for_status()  # servers of one process share it all
        client_of(endpoint).mkdir(BUCKET)
        yield endpoint
    finally:
        server.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def client_of(endpoint: str) -> Any:
    import s3fs

    return s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True, use_listings_cache=False)
