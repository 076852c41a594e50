"""The log: standard ``logging``, as text or JSON lines, with fields from the context that a line is written in.

``setup`` is called once, where a process begins. ``about`` names what the block works on, so that each line in it says so.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from queue import Full, Queue
from types import MappingProxyType
from typing import Any, NoReturn

from pairloop.config import LogSection
from pairloop.errors import ConfigError

Field = str | int | float | None

WAITING_LINES = 10_000
"""Lines that may wait for a slow terminal or disk; more are dropped and counted, and nobody waits."""
STOP_S = 2.0
INDENTED = "\n    "
VARIABLES = ("PAIRLOOP_LOG_FORMAT", "PAIRLOOP_LOG_LEVEL")
_OURS = ("pairloop", "uvicorn")
"""Loggers that speak at the configured level; others, whose lines may hold addresses and texts, from warning on."""
_KEY = re.compile(r"sk-pairloop-[0-9a-f]{16}-[0-9a-f]+")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")
_NONE: Mapping[str, Field] = MappingProxyType({})
_FIELDS: ContextVar[Mapping[str, Field]] = ContextVar("log_fields", default=_NONE)


@contextmanager
def about(**fields: Field) -> Iterator[None]:
    """Lines logged in this block, and in tasks that begin in it, carry these fields too."""
    token = _FIELDS.set({**_FIELDS.get(), **fields})
    try:
        yield
    finally:
        _FIELDS.reset(token)


def extra(**fields: Field) -> dict[str, Mapping[str, Field]]:
    """Fields of one line: ``logger.info(text, extra=logs.extra(status=200))``."""
    return {"fields": fields}


def setup(section: LogSection, *, background: bool = False) -> None:
    """Send the log where ``section`` says; a second call takes the place of the first.

    ``background``: lines are written by a thread of their own, so that a terminal or pipe that nobody reads holds up no
    request. ConfigError where the file cannot be opened.
    """
    global _installed
    root, sink = logging.getLogger(), _sink(section)
    formatter = JsonFormatter() if section.format == "json" else TextFormatter()
    if background:
        handler: logging.Handler = _Background(sink)
    else:
        handler = sink
    handler.setFormatter(formatter)
    handler.addFilter(_add_context)
    if _installed is not None:
        root.removeHandler(_installed[1])
        _installed[1].close()
    root.addHandler(handler)
    level = logging.getLevelNamesMapping()[section.level.upper()]
    root.setLevel(max(logging.WARNING, level))
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    _installed = (section, handler)


def environment() -> dict[str, str]:
    """What makes a child process log as this one does; its lines go to its own standard error."""
    if _installed is None:
        return {}
    section, _ = _installed
    return dict(zip(VARIABLES, (section.format, section.level), strict=True))


def end_at_once() -> NoReturn:
    """End this process now, as a second signal asks: what was acknowledged is on the disk, what was not is not waited for."""
    logging.getLogger(__name__).warning("a second signal: ended at once")
    if _installed is not None:
        _installed[1].close()
    os._exit(1)


class TextFormatter(logging.Formatter):
    """``time level logger: message [field=value …]``; further lines of a message are indented: none looks like a new one."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={_escaped(str(value))}" for name, value in _fields(record).items() if value is not None)
        message = INDENTED.join(map(_escaped, record.getMessage().split("\n")))
        line = f"{_time(record)} {record.levelname} {record.name}: {message}" + (f" [{fields}]" if fields else "")
        raised = _raised(self, record)
        return without_keys(f"{line}\n{raised}" if raised else line)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the fields, and what was raised under ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        found |= {name: value for name, value in _fields(record).items() if value is not None and name not in found}
        raised = _raised(self, record)
        if raised:
            found["exception"] = raised
        return without_keys(json.dumps(found, ensure_ascii=False, default=str))


def without_keys(text: str) -> str:
    """The text with the secret part of our keys taken out: the last line of defence, for what an error may quote."""
    return _KEY.sub("sk-pairloop-…", text) if "sk-pairloop-" in text else text


def _escaped(text: str) -> str:
    """Without what begins a line or drives a terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class _Background(logging.Handler):
    """Formats where a line is written, and writes it to ``sink`` in a thread."""

    def __init__(self, sink: logging.Handler) -> None:
        super().__init__()
        self._sink = sink
        sink.setFormatter(_Formatted())
        self._queue: Queue[logging.LogRecord | None] = Queue(WAITING_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def emit(self, record: logging.LogRecord) -> None:
        record.line = self.format(record)
        try:
            self._queue.put_nowait(record)
        except Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what waits, for a moment at most."""
        atexit.unregister(self.close)
        try:
            self._queue.put(None, timeout=STOP_S)
        except Full:
            return
        self._thread.join(STOP_S)
        if not self._thread.is_alive():
            self._sink.close()
        super().close()

    def _write(self) -> None:
        while (record := self._queue.get()) is not None:
            self._sink.handle(record)
            if self._dropped:
                lost, self._dropped = self._dropped, 0
                text = f"{lost} lines were lost: they came faster than they could be written"
                self.handle(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None))


class _Formatted(logging.Formatter):
    """The line as it was formatted already."""

    def format(self, record: logging.LogRecord) -> str:
        line: str = record.__dict__["line"]
        return line


_installed: tuple[LogSection, logging.Handler] | None = None


def _sink(section: LogSection) -> logging.Handler:
    if not section.file:
        return logging.StreamHandler()
    try:
        return WatchedFileHandler(section.file, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"log.file: {section.file} cannot be written: {error.strerror}") from error


def _add_context(record: logging.LogRecord) -> bool:
    record.fields = {**_FIELDS.get(), **_fields(record)}
    return True


def _fields(record: logging.LogRecord) -> Mapping[str, Field]:
    fields: Mapping[str, Field] = record.__dict__.get("fields", _NONE)
    return fields


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _raised(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""
