"""A typed client of the server's own resources, with progress iterators::

from pairloop.client import Client

with Client("http://127.0.0.1:8000", api_key="sk-pairloop-…") as client:
    for step in client.run_cycle(reason="new tone of voice"):
        print(step.state, step.record)
"""

from pairloop.client.client import Client, Resource
from pairloop.client.errors import (
    AccessDenied,
    ApiError,
    BadRequest,
    Conflict,
    NotFound,
    RateLimited,
    ServerError,
    Unreachable,
)

__all__ = [
    "AccessDenied",
    "ApiError",
    "BadRequest",
    "Client",
    "Conflict",
    "NotFound",
    "RateLimited",
    "Resource",
    "ServerError",
    "Unreachable",
]
