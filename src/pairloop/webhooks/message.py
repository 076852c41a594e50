"""What is sent: the envelope of OpenAI's webhook events, signed as Standard Webhooks says (standardwebhooks.com)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass

from pairloop import __version__
from pairloop.config import WebhookEndpoint, secret
from pairloop.errors import ConfigError
from pairloop.store.events import Event

ENCODED_KEY = "whsec_"


@dataclass(frozen=True, slots=True)
class Message:
    """One request: its body and its headers."""

    body: bytes
    headers: Mapping[str, str]


def key_of(endpoint: WebhookEndpoint) -> bytes:
    """The key that signs for an endpoint; ConfigError where its variable is not set, or is not what it looks like."""
    text = secret(endpoint.secret_env)
    if not text.startswith(ENCODED_KEY):
        return text.encode()
    what = f"environment variable {endpoint.secret_env} begins with {ENCODED_KEY}, but"
    try:
        key = base64.b64decode(text.removeprefix(ENCODED_KEY), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"{what} no base64 follows: {error}") from error
    if not key:
        raise ConfigError(f"{what} nothing follows: anybody could sign with an empty key")
    return key


def message_of(event: Event, key: bytes, *, sent_at: int) -> Message:
    """The event as a signed request, under the event's own id, by which a receiver knows it again; ``sent_at`` in Unix time."""
    found = {
        "id": event.event_id,
        "object": "event",
        "type": event.type,
        "created_at": int(event.created_at.timestamp()),
        "data": event.data,
    }
    body = json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()
    headers = {
        "content-type": "application/json",
        "user-agent": f"pairloop/{__version__}",
        "webhook-id": event.event_id,
        "webhook-timestamp": str(sent_at),
        "webhook-signature": f"v1,{_signature(key, event.event_id, sent_at, body)}",
    }
    return Message(body, headers)


def _signature(key: bytes, event_id: str, sent_at: int, body: bytes) -> str:
    signed = f"{event_id}.{sent_at}.".encode() + body
    return base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
