"""What is kept of a request, an answer or a feedback row, once personal data are taken out of every text in it."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from pairloop.config import Config
from pairloop.redaction.hooks import Hook, hook_of
from pairloop.redaction.patterns import OUR_ID
from pairloop.types import (
    DEMONSTRATION_METRIC,
    REDACTED_TAG,
    TOOLS_ROLE,
    Completion,
    Feedback,
    Group,
    Message,
    Prompt,
    ToolCall,
)

KEY_FILE = "pseudonyms.key"
PSEUDONYM = "person-"


class Redactor:
    """Applies one hook to all that is stored. The same text always becomes the same, so that a conversation that goes on from
    an answer is found by what became of it. For any thread."""

    def __init__(self, hook: Hook, key: bytes | Path, *, is_quick: bool = True) -> None:
        """``key`` of the pseudonyms, or the folder that keeps it, where it is drawn when the first one is needed.

        ``is_quick``: microseconds for an answer's text, so it need not leave the event loop.
        """
        self.text = hook
        self.is_quick = is_quick
        self._key = key

    @classmethod
    def of(cls, config: Config) -> Self | None:
        """The configured one; None where nothing is taken out. ConfigError where its hook cannot be had."""
        hook = hook_of(config.privacy)
        if hook is None:
            return None
        return cls(hook, config.state_dir, is_quick=config.privacy.redact in ("patterns", "off"))

    def identifier(self, name: str) -> str:
        """A user's or conversation's id: as it is, or a pseudonym where it is itself personal data (an e-mail address, say)."""
        if name.startswith(PSEUDONYM) or _is_ours(name) or self.text(name) == name:
            return name
        if isinstance(self._key, Path):
            self._key = _drawn(self._key)
        return _pseudonym(self._key, name)

    def values(self, pairs: Mapping[str, str], *, ids: Sequence[str] = ()) -> dict[str, str]:
        """Metadata or tags; the keys stay, ids of ours (a parent's, say) too, and the values of ``ids`` are identifiers."""
        return {key: self.identifier(value) if key in ids else self._value(value) for key, value in pairs.items()}

    def prompt(self, prompt: Prompt) -> Prompt:
        """The conversation; equal to the one given where nothing was taken out."""
        return self.text(prompt) if isinstance(prompt, str) else tuple(self._message(turn) for turn in prompt)

    def completion(self, completion: Completion, *, other_prompt: bool) -> Completion:
        """The answer. Where its words changed its tokens are no longer what was sampled, and go; where only the prompt did
        (``other_prompt``), its log-probs go: they were those of an answer to the words that were taken out."""
        text = self.text(completion.text)
        if text != completion.text:
            return replace(completion, text=text, token_ids=(), logps=(), is_redacted=True)
        return replace(completion, logps=()) if other_prompt and completion.logps else completion

    def group(self, group: Group) -> Group:
        """A group as it is stored. Where the prompt changed its tokens go: they would say what was taken out."""
        prompt = self.prompt(group.prompt)
        other = prompt != group.prompt
        return replace(
            group,
            prompt=prompt,
            prompt_token_ids=() if other else group.prompt_token_ids,
            completions=tuple(self.completion(completion, other_prompt=other) for completion in group.completions),
            sampling=replace(group.sampling, stop=tuple(self.text(stop) for stop in group.sampling.stop)),
            user=None if group.user is None else self.identifier(group.user),
            conversation_id=None if group.conversation_id is None else self.identifier(group.conversation_id),
            metadata=self.values(group.metadata, ids=("conversation_id",)),
        )

    def feedback(self, row: Feedback) -> Feedback:
        """The row; an ideal answer that something was taken out of is marked: nobody should learn to write a placeholder."""
        value = self.text(row.value) if isinstance(row.value, str) else row.value
        tags = self.values(row.tags, ids=("conversation_id",))
        if row.metric == DEMONSTRATION_METRIC and value != row.value:
            tags[REDACTED_TAG] = "true"
        text = None if row.text is None else self.text(row.text)
        return replace(row, rater_id=self.identifier(row.rater_id), value=value, text=text, tags=tags)

    def json_text(self, text: str) -> str:
        """JSON with its strings (and numbers that are, say, a card's) redacted; any other text as a text."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return self.text(text)
        redacted = self._json(value)
        return text if redacted == value else json.dumps(redacted, ensure_ascii=False)

    def reply(self, body: bytes) -> bytes:
        """A JSON reply as it is kept for replays; tokens of an answer of which something was taken out go with it."""
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return body
        if isinstance(value, dict) and isinstance(value.get("choices"), list):
            for choice in value["choices"]:
                message = choice.get("message") if isinstance(choice, dict) else None
                if message is not None and self._json(message) != message:
                    choice["logprobs"] = None
        redacted = self._json(value)
        return json.dumps(redacted, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")

    def _message(self, turn: Message) -> Message:
        content = self.json_text(turn.content) if turn.role == TOOLS_ROLE else self.text(turn.content)
        calls = tuple(ToolCall(call.id, call.name, self.json_text(call.arguments)) for call in turn.tool_calls)
        return replace(turn, content=content, tool_calls=calls)

    def _value(self, value: str) -> str:
        return value if _is_ours(value) else self.text(value)

    def _json(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._value(value)
        if isinstance(value, int) and not isinstance(value, bool):
            text = str(value)
            return value if self.text(text) == text else self.text(text)
        if isinstance(value, list):
            return [self._json(item) for item in value]
        if isinstance(value, dict):
            return {self.text(key): self._json(item) for key, item in value.items()}
        return value


def pseudonym_of(state_dir: Path, name: str) -> str | None:
    """What stands for the id wherever a hook once found something in it; None where no pseudonym was ever needed."""
    path = state_dir / KEY_FILE
    return _pseudonym(_read(path), name) if path.exists() else None


def _pseudonym(key: bytes, name: str) -> str:
    return PSEUDONYM + hmac.new(key, name.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]


def _read(path: Path) -> bytes:
    return bytes.fromhex(path.read_text(encoding="ascii").strip())


def _is_ours(text: str) -> bool:
    """Whether it is an id of the store, whatever a hook would find in it."""
    return OUR_ID.fullmatch(text) is not None


def _drawn(state_dir: Path) -> bytes:
    """The key of pseudonyms, drawn once per state directory: without it nobody can try out which address one stands for."""
    path = state_dir / KEY_FILE
    if not path.exists():
        state_dir.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f".{KEY_FILE}.{os.getpid()}.{secrets.token_hex(4)}")
        with open(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(own, path)  # whole, and the first of several processes wins
        own.unlink()
    return _read(path)
