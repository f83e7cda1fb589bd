"""The fake tokenizer, and what is generated for a request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import cycle, islice

import msgspec

# A word with the space before it, or one Chinese character, or trailing space.
_WORD = re.compile(r"\s*(?:[㐀-鿿]|[^\s㐀-鿿]+)|\s+")
# An id holds its token's bytes, so that a list of ids can be turned back into text, and stays exact as a JSON number.
_TOKEN_BYTES = 6


def tokens(text: str) -> list[str]:
    """`text` cut into tokens; joined they are `text` again."""
    return [piece for word in _WORD.findall(text) for piece in _pieces(word)]


def _pieces(word: str) -> Iterator[str]:
    piece = ""
    for character in word:
        if len((piece + character).encode()) > _TOKEN_BYTES:
            yield piece
            piece = ""
        piece += character
    yield piece


def token_id(token: str) -> int:
    return int.from_bytes(token.encode(), "big")


def detokenized(ids: Sequence[int]) -> str:
    """The text of token ids; an id that no token has becomes U+FFFD."""
    data = b"".join(number.to_bytes((number.bit_length() + 7) // 8 or 1, "big") for number in ids)
    return data.decode(errors="replace")


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """All that a request will generate, known in advance. `finish_reason` is "stop" or "length"."""

    tokens: tuple[str, ...]
    finish_reason: str
    stop_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.tokens)


def generation(
    text: str, *, max_tokens: int, exactly: int | None = None, ignore_eos: bool = False, stop: Sequence[str] = ()
) -> Generation:
    """Generate `text`, up to `max_tokens`.

    `exactly` repeats or cuts the text to that many tokens, `ignore_eos` to `max_tokens`; a stop string ends it before.
    """
    made = tokens(text) or [""]
    if ignore_eos or exactly is not None:
        made = list(islice(cycle(made), max_tokens if exactly is None else exactly))
    whole = "".join(made[:max_tokens])
    hits = [(at, string) for string in stop if string and (at := whole.find(string)) >= 0]
    if hits:
        at, string = min(hits)
        return Generation(tokens=tuple(tokens(whole[:at])) or ("",), finish_reason="stop", stop_reason=string)
    finish = "length" if len(made) > max_tokens or ignore_eos else "stop"
    return Generation(tokens=tuple(made[:max_tokens]), finish_reason=finish)
