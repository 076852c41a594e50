"""Where a request comes from, when a proxy stands in front: what the proxies of ``serve.trusted_proxies`` say, and nobody else.

Plain ASGI. Each proxy appends the address that it was asked from to X-Forwarded-For, so the rightmost one that is no proxy's
is the client's; what stands to its left is only claimed. X-Forwarded-Proto says whether the client came over https.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, cast

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from pairloop.config.serve import IPV4_IN_IPV6
from pairloop.web.headers import header

logger = logging.getLogger(__name__)


class Proxies:
    """Sets client and scheme as the trusted ones say; of another that says something the log tells once."""

    def __init__(self, app: ASGIApp, trusted: Sequence[str]) -> None:
        self._through = cast("ASGIApp", ProxyHeadersMiddleware(cast("Any", app), _both_ways(trusted)))
        self._has_told = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer = scope.get("client")
        await self._through(scope, receive, send)
        if self._has_told or scope["type"] != "http" or header(scope, b"x-forwarded-for") is None:
            return
        if peer is not None and scope.get("client") == peer:
            self._has_told = True
            logger.warning(
                "the X-Forwarded-For of %s is not believed: if this is your proxy, name it in serve.trusted_proxies, or "
                "all who come through it count as one address, and as http",
                peer[0],
            )


def _both_ways(trusted: Sequence[str]) -> list[str]:
    """The networks, those of IPv4 also as IPv6 writes them: a socket of both families names 10.0.0.1 as ::ffff:10.0.0.1."""
    networks = [ip_network(one) for one in trusted]
    return [str(one) for network in networks for one in (network, _other_way(network)) if one is not None]


def _other_way(network: IPv4Network | IPv6Network) -> IPv4Network | IPv6Network | None:
    if isinstance(network, IPv4Network):
        return IPv6Network((int(IPV4_IN_IPV6.network_address) + int(network.network_address), 96 + network.prefixlen))
    if network.subnet_of(IPV4_IN_IPV6):
        return IPv4Network((int(network.network_address) % 2**32, network.prefixlen - 96))
    return None
