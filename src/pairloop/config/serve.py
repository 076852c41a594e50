"""The HTTP side: addresses, pools, limits."""

from __future__ import annotations

from ipaddress import IPv6Network, ip_network
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from pairloop.config.section import Section, Share, duration_s

IPV4_IN_IPV6 = IPv6Network("::ffff:0:0/96")
"""Where a socket of both families shows IPv4 addresses."""


class ServeSection(Section):
    """The HTTP side: who gets two answers, and who judges."""

    host: str = "127.0.0.1"
    """Address to listen on: loopback only, as long as there are no keys (`pairloop keys create`)."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which clients may ask for this server, beside its addresses and localhost; `*` for any. Needs a key."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may call this server from a browser, such as `https://shop.example`; none by default."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks of the reverse proxies in front, such as `127.0.0.1` or `10.0.0.0/28` (one of IPv4 also as
    `::ffff:10.0.0.1`): of these alone `X-Forwarded-For` and `X-Forwarded-Proto` are believed. Needs a key or an account."""
    requests_per_minute: int = Field(default=0, ge=0)
    """Requests per minute of one key (of one address, without keys); more are answered 429. A key may have its own; 0 is no
    limit."""
    exposure_rate: Share = 1.0
    """Share of requests that opted in to two answers and get them."""
    gate_share: Share = 0.2
    """Share of raters, by hash, in the gate pool."""
    duel_share: Share = 1.0
    """Share of the gate pool's two-answer requests that are a duel while one is open."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer where the request does not say."""
    max_context: int = Field(default=0, ge=0)
    """Longest prompt plus completion in tokens; 0 takes the model's own limit."""
    max_body_bytes: int = Field(default=8_000_000, ge=1_000)
    """Longest request body; a longer one is answered 413."""
    max_file_bytes: int = Field(default=512_000_000, ge=1_000)
    """Longest body that uploads a file."""
    body_timeout: str = "30s"
    """How long a client may be silent while it sends a body, and how long one may take that comes at under 10 kB a second;
    then it is answered 408."""
    queue_limit: int = Field(default=1_024, ge=1)
    """Requests waiting for the sampler, and answers under way; one more is answered 503 with retry-after."""
    drain: str = "20s"
    """After SIGTERM, how long answers under way may take to end; then they end with an error."""
    drain_delay: str = "0s"
    """After SIGTERM, how long requests are still taken while ``/health/ready`` says 503, so that a load balancer sees it; 0s
    where there is none."""

    @field_validator("body_timeout", "drain")
    @classmethod
    def _duration(cls, value: str) -> str:
        duration_s(value)
        return value

    @field_validator("drain_delay")
    @classmethod
    def _delay(cls, value: str) -> str:
        if value != "0s":
            duration_s(value)
        return value

    @property
    def drain_delay_s(self) -> float:
        return 0.0 if self.drain_delay == "0s" else duration_s(self.drain_delay)

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in value:
            try:
                network = ip_network(proxy)
            except ValueError as error:
                raise ValueError(f"{proxy!r} is no address and no network, such as 127.0.0.1 or 10.0.0.0/28") from error
            if network.prefixlen == 0 or (isinstance(network, IPv6Network) and network.supernet_of(IPV4_IN_IPV6)):
                raise ValueError(f"{proxy!r} is everybody: name the addresses of the proxies alone")
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}":
                raise ValueError(f"{origin!r} is not an origin, such as https://shop.example or http://localhost:3000")
        return value
