"""From sampled tokens to text while they come: whole UTF-8 characters only, cut at stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"


class TextStream:
    """The text of one growing completion; the pieces that `add` returns, concatenated, are its whole text.

    A piece is held back while it may be the beginning of a character or of a stop string. Each token decodes a short window
    only, so a long completion costs linear time.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: tuple[str, ...] = ()) -> None:
        self._decode = decode
        self._stop = tuple(s for s in stop if s)
        self._ids: list[int] = []
        self._start = 0
        self._read = 0
        self._text = ""
        self._sent = 0
        self.stopped = False

    @property
    def text(self) -> str:
        return self._text

    def add(self, token_id: int, *, last: bool = False) -> str:
        """The text that is certain after this token; ``last`` gives out what was held back; ``stopped`` at a stop string."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._start : self._read])
        window = self._decode(self._ids[self._start :])
        if last or not window.endswith(_BROKEN):
            searched = len(self._text)
            self._text += window[len(before) :]
            self._start, self._read = self._read, len(self._ids)
            self._cut(searched)
        end = len(self._text) if last or self.stopped else len(self._text) - self._held()
        piece = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def would_add(self, token_id: int) -> str:
        """The text that another token would have added at this place, alone."""
        before = self._decode(self._ids[self._start :])
        return self._decode([*self._ids[self._start :], token_id]).removeprefix(before)

    def _cut(self, searched: int) -> None:
        found = [self._text.find(stop, max(0, searched - len(stop) + 1)) for stop in self._stop]
        found = [at for at in found if at >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True

    def _held(self) -> int:
        """Length of the longest ending of the text that begins a stop string."""
        held = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._text)), held, -1):
                if stop.startswith(self._text[-size:]):
                    held = size
                    break
        return held
