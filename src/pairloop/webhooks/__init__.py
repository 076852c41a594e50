"""Tells the configured receivers what happened: ``message`` (body and signature) and ``sender`` (until it is taken).

Events are rows that the store writes in the transaction of the act (``store.events``). Nothing waits for a receiver.
"""

from pairloop.webhooks.message import Message, key_of, message_of
from pairloop.webhooks.sender import Sender, send_test

__all__ = ["Message", "Sender", "key_of", "message_of", "send_test"]
