"""An exported version as one stream: a tar archive, piece by piece, of which no more than a piece is ever in memory."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pairloop.errors import StoreError

PIECE = 1 << 18
"""Bytes of a file that are read at once."""
_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)


@dataclass(frozen=True, slots=True)
class Member:
    """A file of the exported folder: what it is called there, and where it lies, or its content."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True, slots=True)
class Archive:
    """``name`` of the file; ``size`` of it in bytes, known before the first one is read."""

    name: str
    size: int
    _headers: Sequence[tuple[Member, int, bytes]]

    def pieces(self) -> Iterator[bytes]:
        """The bytes, in order. StoreError where a file is no longer what it was: the stream ends short of its size."""
        for member, size, header in self._headers:
            yield header
            yield from _content(member, size)
            yield bytes(-size % _BLOCK)
        yield _END


def archive(folder: str, members: Sequence[Member], at: datetime) -> Archive:
    """``members`` below ``folder``, as of ``at``; the same ones always make the same bytes."""
    headers = []
    for member in members:
        info = tarfile.TarInfo(f"{folder}/{member.name}")
        info.size, info.mtime, info.mode = member.size, int(at.timestamp()), 0o644
        headers.append((member, info.size, info.tobuf(tarfile.PAX_FORMAT)))
    size = sum(len(header) + length + -length % _BLOCK for _, length, header in headers) + len(_END)
    return Archive(f"{folder}.tar", size, headers)


def _content(member: Member, size: int) -> Iterator[bytes]:
    if isinstance(member.content, bytes):
        yield member.content
        return
    left = size
    try:
        with member.content.open("rb") as file:
            while left and (piece := file.read(min(PIECE, left))):
                left -= len(piece)
                yield piece
    except OSError as error:
        raise StoreError(f"{member.content}: {error.strerror or error}") from error
    if left:
        raise StoreError(f"{member.content}: is shorter than it was")
