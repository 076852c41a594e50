"""What takes personal data out of one text: the patterns, Presidio, or a function of one's own."""

from __future__ import annotations

import importlib
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Any

from pairloop.config import PrivacySection
from pairloop.errors import ConfigError, SystemFailure
from pairloop.redaction.patterns import FINDERS, OUR_ID, Finder, Span

Hook = Callable[[str], str]


def hook_of(section: PrivacySection) -> Hook | None:
    """The configured hook, one's own patterns last; None where nothing is taken out. ConfigError where it cannot be had."""
    own = [_own(entry) for entry in section.patterns]
    if section.redact == "off":
        return _by_finders(own, section.keep) if own else None
    if section.redact == "patterns":
        return _by_finders([*FINDERS, *own], section.keep)
    first = _presidio(section) if section.redact == "presidio" else _function(section.redact)
    if not own:
        return first
    then = _by_finders(own, section.keep)
    return lambda text: then(first(text))


def _by_finders(finders: Iterable[tuple[str, Finder]], keep: Iterable[str]) -> Hook:
    listed, exempt = tuple(finders), tuple(entry.casefold() for entry in keep)
    endings = tuple(entry for entry in exempt if entry.startswith("@"))

    def hook(text: str) -> str:
        for name, find in listed:
            spans = [span for span in find(text) if not is_kept(text[slice(*span)])]
            text = replaced(text, _outside_ids(text, spans) if spans else spans, f"[{name}]")
        return text

    def is_kept(found: str) -> bool:
        folded = found.casefold()
        return folded in exempt or (bool(endings) and folded.endswith(endings))

    return hook


def _outside_ids(text: str, spans: list[Span]) -> list[Span]:
    """Without those that begin in the midst of an id of ours."""
    ids = [match.span() for match in OUR_ID.finditer(text)]
    starts = [start for start, _ in ids]

    def is_inside(place: int) -> bool:
        before = bisect_left(starts, place)
        return before > 0 and place < ids[before - 1][1]

    return [span for span in spans if not is_inside(span[0])]


def replaced(text: str, spans: Iterable[tuple[int, int]], placeholder: str) -> str:
    """``text`` with the placeholder in place of each span; spans come in order and do not overlap."""
    parts, end = [], 0
    for start, stop in spans:
        parts += [text[end:start], placeholder]
        end = stop
    return "".join([*parts, text[end:]]) if parts else text


def _own(entry: str) -> tuple[str, Finder]:
    name, _, expression = entry.partition("=")
    pattern = re.compile(expression)
    return name, lambda text: (match.span() for match in pattern.finditer(text) if match[0])


def _function(name: str) -> Hook:
    """``module:function``, held to give back a text; what it raises is not told, for it may quote the text."""
    module_name, _, function_name = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"privacy.redact: {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"privacy.redact: {name!r} is not a function")

    def hook(text: str) -> str:
        try:
            result = found(text)
        except Exception as error:  # noqa: BLE001 - whatever a user's function raises; without it nothing may be stored
            raise SystemFailure(f"privacy.redact: {name} failed ({type(error).__name__}); nothing was stored") from None
        if not isinstance(result, str):
            raise SystemFailure(f"privacy.redact: {name} gave {type(result).__name__} in place of a text; nothing was stored")
        return result

    return hook


def _presidio(section: PrivacySection) -> Hook:
    """Presidio's analyzer with its predefined recognizers, and spaCy's model for names and places."""
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import NlpEngineProvider

    models = [{"lang_code": section.presidio_language, "model_name": section.presidio_model}]
    try:
        nlp = NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": models}).create_engine()
    except (OSError, SystemExit) as error:  # spaCy tries to download a model that is not there, and ends the process
        raise ConfigError(
            f"privacy.presidio_model: spaCy has no model {section.presidio_model!r}: python -m spacy download "
            f"{section.presidio_model}"
        ) from error
    engine = AnalyzerEngine(nlp_engine=nlp, supported_languages=[section.presidio_language])
    return presidio_hook(engine, section)


def presidio_hook(engine: Any, section: PrivacySection) -> Hook:
    """The hook of an analyzer engine; of overlapping findings the surest, then the longest."""
    import tldextract

    # Presidio's finder of addresses would fetch the list of top-level domains from the network; the packaged one will do.
    tldextract.extract = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    exempt = tuple(entry.casefold() for entry in section.keep)

    def hook(text: str) -> str:
        found = engine.analyze(text=text, language=section.presidio_language, score_threshold=section.presidio_score)
        taken: list[tuple[int, int, str]] = []
        for one in sorted(found, key=lambda one: (-one.score, one.start - one.end, one.start)):
            is_free = all(one.end <= start or stop <= one.start for start, stop, _ in taken)
            if is_free and not text[one.start : one.end].casefold().endswith(exempt or ("\0",)):
                taken.append((one.start, one.end, one.entity_type))
        for start, stop, kind in sorted(taken, reverse=True):
            text = f"{text[:start]}[{kind}]{text[stop:]}"
        return text

    return hook
