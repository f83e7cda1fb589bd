"""Streams whose every byte is known beforehand: what the client asks for in its prompt, and both ends can compute."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

CHUNKS = 64
"""Of a stream, where nobody says another number."""
MARK = "pace"
_EVENT = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":%b}]}\n\n'
)
_BARE = len(_EVENT % b'{"content":""}')


class Pace(NamedTuple):
    """`chunks` events of `size` bytes, one every `every_s` seconds. No two events of any two `number`s are the same."""

    number: int
    chunks: int
    every_s: float
    size: int = 200

    def prompt(self) -> str:
        return f"{MARK} {self.number} {self.chunks} {self.every_s} {self.size}"

    @classmethod
    def of(cls, prompt: str) -> Pace | None:
        """What a prompt asks for; None for any other prompt."""
        words = prompt.split()
        if len(words) != 5 or words[0] != MARK:
            return None
        return cls(int(words[1]), int(words[2]), float(words[3]), int(words[4]))

    def event(self, index: int) -> bytes:
        unique = hashlib.blake2b(b"%d/%d" % (self.number, index)).hexdigest().encode()
        fill = (unique * (self.size // len(unique) + 1))[: self.size - _BARE]
        return _EVENT % (b'{"content":"%b"}' % fill)
