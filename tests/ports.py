"""A loopback port for a server that is started later, or again and again."""

from __future__ import annotations

import socket


def hold_port() -> socket.socket:
    """A socket that holds a free port until it is closed: bound, and never listened on.

    Nobody is given the port meanwhile, and whoever sets SO_REUSEADDR, as servers do, may listen there.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def number_of(held: socket.socket) -> int:
    return int(held.getsockname()[1])
