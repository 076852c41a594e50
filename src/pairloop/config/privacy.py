"""What is kept of people's words, for how long, and what is taken out before it is stored."""

from __future__ import annotations

import re
from importlib.util import find_spec

from pydantic import Field, field_validator

from pairloop.config.section import Positive, Section

OFF, PATTERNS, PRESIDIO = "off", "patterns", "presidio"
_HOOK = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,31}")


class PrivacySection(Section):
    """What is taken out of texts before they are stored, and how long texts are kept."""

    redact: str = PATTERNS
    """What takes personal data out of prompts, answers and feedback before they are stored: ``patterns`` (e-mail addresses,
    phone numbers, IBANs, cards, IP addresses, credentials, API keys), ``presidio`` (the extra of that name),
    ``module:function`` (called with a text, returns it without them), or ``off``. Clients get what was sampled; only what is
    kept changes."""
    patterns: tuple[str, ...] = ()
    """Patterns of your own, beside any of these: ``NAME=regular expression``; what matches becomes ``[NAME]``."""
    keep: tuple[str, ...] = ()
    """What is never taken out, such as your own ``help@shop.example``; ``@shop.example`` stands for all its addresses."""
    redact_files: bool = False
    """Whether rows that come as a file (uploads for fine-tuning, `pairloop data import`) are redacted, too; otherwise they are
    kept and trained on as they came."""
    presidio_language: str = "en"
    """The language that Presidio looks for names and places in."""
    presidio_model: str = "en_core_web_sm"
    """The spaCy model that Presidio reads with."""
    presidio_score: float = Field(default=0.5, ge=0.0, le=1.0)
    """How sure Presidio must be."""
    log_texts: bool = False
    """Whether the log may quote messages: what an unforeseen error says, for the time in which you look for its cause."""
    keep_days: Positive | None = None
    """Days after which texts (prompts, answers, comments, and datasets that hold them) are erased; numbers stay. By default
    they are kept."""
    keep_versions: int | None = Field(default=None, ge=0)
    """Weights of so many of the newest versions that never became champion are kept; by default all are."""

    @field_validator("redact")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in (OFF, PATTERNS, PRESIDIO) and not _HOOK.fullmatch(value):
            raise ValueError(f'{value!r} is none of "patterns", "presidio", "off", and not of the form module:function')
        if value == PRESIDIO and find_spec("presidio_analyzer") is None:
            raise ValueError('presidio_analyzer is not installed: pip install "pairloop[presidio]", or take "patterns"')
        return value

    @field_validator("patterns")
    @classmethod
    def _compile(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            name, _, expression = entry.partition("=")
            if not _NAME.fullmatch(name) or not expression:
                raise ValueError(
                    f"{entry!r}: write NAME=regular expression, the name in capitals, such as CUSTOMER=K-[0-9]{{6}}"
                )
            try:
                empty = re.compile(expression).search("")
            except re.error as error:
                raise ValueError(f"{name}: not a regular expression: {error}") from error
            if empty is not None:
                raise ValueError(f"{name}: the expression matches the empty text, and so every place")
        return value
