"""How many tokens a request may need and did use, for callers whose tokens are limited."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from modelpool.gateway.routes import Kind, Route
from modelpool.relay import ResponseHead, Sink

BYTES_PER_TOKEN = 4
"""Of a body, about: the engine's own count comes at the end."""
_DATA_BYTES = 4 << 10
_MOST = 10**12
_TAIL_BYTES = 16 << 10
"""An answer's `usage` is looked for in its last bytes."""
_LOOKED_AT_MAX = 8
"""Objects of that name: a schema that is echoed may be full of them."""
_EVENT = b"\ndata:"
_WITHOUT_TOKENS = (b"/tokenize", b"/detokenize", b"/count_tokens", b"/render", b"/derender")
_USUAL = re.compile(rb'"usage"\s*:\s*\{[^{}]*?"total_tokens"\s*:\s*([0-9]{1,12})\s*[,}]')


class _Sampling(msgspec.Struct):
    max_tokens: int | None = None


class _Asked(msgspec.Struct):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None
    sampling_params: _Sampling | None = None


_DECODER = msgspec.json.Decoder(_Asked)


class Estimate(msgspec.Struct, frozen=True):
    prompt: int
    completion: int

    @property
    def total(self) -> int:
        return min(_MOST, self.prompt + self.completion)


NOTHING = Estimate(0, 0)


def estimate(route: Route, body: bytes) -> Estimate:
    """Before the engine is asked: the size of what it reads, and the most that it was told to write.

    Without a limit in the body the answer's length is nobody's to know, and is left out.
    """
    if route.kind is Kind.FORM or route.path.endswith(_WITHOUT_TOKENS):
        return NOTHING  # of sound, an engine makes as many tokens as it likes
    longest, times = 0, 1
    try:
        asked = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # the engine will refuse it
    else:
        longest = max(0, asked.max_tokens or 0, asked.max_completion_tokens or 0, asked.max_output_tokens or 0)
        if asked.sampling_params is not None:
            longest = max(longest, asked.sampling_params.max_tokens or 0)
        times = max(1, asked.n or 1)
    text = len(body) if len(body) < _DATA_BYTES else len(body) - _data_bytes(body)
    return Estimate(-(-text // BYTES_PER_TOKEN), longest * times)


def _data_bytes(body: bytes) -> int:
    """The bytes of long strings that are no text: images and sound in base64. They are tokens in another measure."""
    strings = (each for each in body.split(b'"') if len(each) > _DATA_BYTES)
    return sum(len(each) for each in strings if each.isascii() and b" " not in each and b"\\u" not in each)


class Meter:
    """Sees an answer pass, and says what it used."""

    __slots__ = ("_asked", "_events", "_status", "_stream", "_tail")

    def __init__(self) -> None:
        self._asked = False
        self._status = 0

    def watching(self, sink: Sink) -> Sink:
        """`sink`, watched: for each attempt anew. An engine is asked now."""
        self._asked = True
        self._status = 0
        return _Watched(self, sink)

    def begin(self, head: ResponseHead, rest: bytes) -> None:
        self._status = head.status
        self._events = 0
        self._stream = head.event_stream
        self._tail: bytes | bytearray = rest
        if self._stream:
            self._tail = b"\n"
            self.feed(rest)

    def feed(self, data: bytes) -> None:
        tail = self._tail
        if not isinstance(tail, bytearray):
            tail = self._tail = bytearray(tail)
        seen = max(0, len(tail) - len(_EVENT) + 1)
        tail += data
        if self._stream:
            self._events += tail.count(_EVENT, seen)
        if len(tail) > 2 * _TAIL_BYTES:
            del tail[:-_TAIL_BYTES]

    def used(self, estimated: Estimate, *, abandoned: bool) -> int:
        """By the engine's own count where the answer tells it.

        Else what was estimated, of a stream the events that passed instead of the answer's longest length; and nothing
        where there was no good answer, unless the engine was left (`abandoned`) while it worked on one.
        """
        if self._status == 0:
            return estimated.total if self._asked and abandoned else 0
        if not 200 <= self._status < 300:
            return 0
        usage = _usage(self._tail, estimated.prompt)
        if usage is not None:
            return usage
        if not self._stream:
            return estimated.total
        return estimated.prompt + self._events - self._tail.count(b"\ndata: [DONE]")


class _Watched:
    """A Sink."""

    __slots__ = ("_meter", "_sink")

    def __init__(self, meter: Meter, sink: Sink) -> None:
        self._meter = meter
        self._sink = sink

    def head(self, head: ResponseHead, rest: bytes) -> None:
        self._meter.begin(head, rest)
        self._sink.head(head, rest)

    def data(self, data: bytes) -> None:
        self._meter.feed(data)
        self._sink.data(data)


def _usage(tail: bytes | bytearray, prompt: int) -> int | None:
    """What the last `usage` object in these bytes says. In the text of an answer the quotes around it are escaped."""
    at = len(tail)
    for _ in range(_LOOKED_AT_MAX):
        if (at := tail.rfind(b'"usage"', 0, at)) < 0:
            break
        if match := _USUAL.match(tail, at):
            return int(match[1])
        text = tail[at + 7 :].decode("utf-8", "replace").lstrip()
        if not text.startswith(":"):
            continue
        try:
            usage, _ = json.JSONDecoder().raw_decode(text[1:].lstrip())
        except (ValueError, RecursionError):
            continue
        if isinstance(usage, dict) and (total := _total(usage, prompt)) is not None:
            return total
    return None


def _total(usage: dict[str, Any], prompt: int) -> int | None:
    """As OpenAI, Anthropic or Cohere have it."""
    if (total := _count(usage, "total_tokens")) is not None:
        return total
    if isinstance(tokens := usage.get("tokens"), dict):
        usage = tokens
    written = _count(usage, "output_tokens", "completion_tokens")
    read = _count(usage, "input_tokens", "prompt_tokens")
    if written is None and read is None:
        return None
    return (prompt if read is None else read) + (written or 0)


def _count(usage: dict[str, Any], *names: str) -> int | None:
    for name in names:
        value = usage.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST:
            return value
    return None
