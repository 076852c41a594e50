"""Whether a row fits: its length in characters, and in tokens once the model's own template has rendered it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pairloop.errors import InvalidRequestError, ModelError
from pairloop.formats.row import Draft, Row
from pairloop.types import Prompt

MAX_CHARS = 200_000


class Encoder(Protocol):
    """What counts tokens: a chat template with its tokenizer (`pairloop.template.ChatTemplate`), or a stand-in."""

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]: ...

    def encode_completion(self, prompt: Prompt, text: str) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Fit:
    """The limits of a row: characters, and with ``tokens`` also what the template refuses and ``max_length`` in tokens.

    Both count the prompt and the longest of its answers.
    """

    max_chars: int = MAX_CHARS
    tokens: Encoder | None = None
    max_length: int | None = None

    def check(self, row: Row, draft: Draft) -> None:
        """Refuses the row as ``over_long`` or ``template_refused``; one that has problems already is left alone."""
        if row.problems or draft.prompt is None:
            return
        prompt = draft.prompt if isinstance(draft.prompt, str) else "".join(message.content for message in draft.prompt)
        length = len(prompt) + max((len(text or "") for text in draft.completions), default=0)
        if length > self.max_chars:
            row.refuse("$", "over_long", f"prompt and answer have {length:,} characters; the limit is {self.max_chars:,}")
        elif self.tokens is not None:
            self._check_tokens(row, draft, draft.prompt, self.tokens)

    def _check_tokens(self, row: Row, draft: Draft, prompt: Prompt, tokens: Encoder) -> None:
        try:
            length = len(tokens.encode_prompt(prompt))
            length += max((len(tokens.encode_completion(prompt, text or "")) for text in draft.completions), default=0)
        except (InvalidRequestError, ModelError) as error:
            row.refuse("$", "template_refused", str(error))
            return
        if self.max_length is not None and length > self.max_length:
            said = f"prompt and answer have {length:,} tokens once rendered; the limit is {self.max_length:,}"
            row.refuse("$", "over_long", said)
