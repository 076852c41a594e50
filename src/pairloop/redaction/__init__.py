"""Personal data and secrets are taken out of texts before they are stored (``privacy.redact``).

``patterns`` finds them by form and checksum, ``hooks`` are what may do it (the patterns, Presidio, a function of one's own),
and ``redactor`` applies the hook to prompts, answers, feedback and replies, and says what of them is still what was sampled.
"""

from pairloop.redaction.hooks import hook_of, presidio_hook
from pairloop.redaction.redactor import Redactor, pseudonym_of

__all__ = ["Redactor", "hook_of", "presidio_hook", "pseudonym_of"]
