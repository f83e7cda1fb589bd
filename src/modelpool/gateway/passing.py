"""A response on its way from an upstream to the client: the bytes as they come."""

from __future__ import annotations

from time import monotonic

import msgspec

from modelpool.errors import EngineError, UpstreamFailed
from modelpool.gateway.answer import LAST_CHUNK, error_event, framed, last_event
from modelpool.gateway.connection import ClientConnection
from modelpool.gateway.request import Request
from modelpool.relay import Exchange, ResponseHead
from modelpool.relay.response import BodyDecoder

_HELD_MAX = 64 << 10
_EVENT_MAX = 1 << 20


class PassThrough:
    """A Sink that writes to the client.

    An answer whose status is in `hold` is held back: it may say that the instance took no notice of the request, which
    the client need not see. `release` lets it go.

    A client that was sent the head of an event stream already, while it waited, gets the body only; and an answer that
    is no event stream as one event, mostly the error that the engine says.

    `segments` and `size` count the pieces and bytes of the body, framing included; `first_byte` is the first's time.
    `status` is 0 before there is a head.
    """

    __slots__ = (
        "_chunks",
        "_client",
        "_decoder",
        "_head",
        "_held",
        "_hold",
        "_request",
        "_whole",
        "first_byte",
        "segments",
        "size",
        "status",
        "streamed",
    )

    def __init__(self, request: Request, client: ClientConnection, *, hold: frozenset[int] = frozenset()) -> None:
        self._request = request
        self._client = client
        self._hold = hold
        self._head: ResponseHead | None = None
        self._held: bytearray | None = None
        self._decoder: BodyDecoder | None = None
        self._chunks = False
        self._whole: bytearray | None = None
        self.first_byte = 0.0
        self.segments = 0
        self.size = 0
        self.status = 0
        self.streamed = False

    def head(self, head: ResponseHead, rest: bytes) -> None:
        self._head = head
        self.status = head.status
        self.streamed = head.event_stream
        if rest:
            self._count(rest)
        if head.status in self._hold:
            self._held = bytearray(rest)
        else:
            self._pass_head(head, rest)

    def data(self, data: bytes) -> None:
        self._count(data)
        if self._held is not None:
            self._held += data
            if len(self._held) > _HELD_MAX:
                self.release()
        elif self._decoder is not None:
            for piece in self._decoder.feed(data):
                self._write(piece)
        else:
            self._client.write(data)

    def finish(self) -> None:
        """The answer is complete, and nothing of it is held back."""
        if self._whole is not None:
            self._client.write(self._as_event(bytes(self._whole)))
        elif self._chunks:
            self._client.write(LAST_CHUNK)

    def _write(self, piece: bytes) -> None:
        """A piece of the body that came out of its framing."""
        if self._whole is None:
            self._client.write(framed(piece, chunked=self._chunks))
        elif len(self._whole) <= _EVENT_MAX:
            self._whole += piece

    def _as_event(self, body: bytes) -> bytes:
        path, chunked = self._request.path, self._chunks
        try:
            one_line = msgspec.json.format(body, indent=-1)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return error_event(UpstreamFailed(f"The answer had status {self.status}."), path, chunked=chunked)
        return last_event(one_line, path, error=self.status >= 400, chunked=chunked)

    def _count(self, data: bytes) -> None:
        if not self.segments:
            self.first_byte = monotonic()
        self.segments += 1
        self.size += len(data)

    @property
    def held_body(self) -> bytes | None:
        """The body of the answer that is held back, if one is."""
        if self._held is None or self._head is None:
            return None
        return b"".join(BodyDecoder().feed(self._head.raw + self._held))

    def release(self) -> None:
        """Let go what is held back, if anything is."""
        if self._held is not None and self._head is not None:
            held, self._held = bytes(self._held), None
            self._pass_head(self._head, held)

    def break_off(self, exchange: Exchange, error: EngineError) -> None:
        """The answer cannot go on. Raises `error` where the client cannot be told in the answer itself.

        An event stream gets a last event; anything else breaks off, so that nobody takes it for whole.
        """
        head = self._head
        if not self._client.answered or head is None:
            raise error
        if not head.event_stream:
            if head.ends_with_connection or self._request.http10:
                self._client.reset()  # to whom the end of the connection is the end of the answer
            raise error
        chunked = self._chunks or (head.chunked and self._decoder is None)
        if chunked and not self._chunks and not exchange.takes_chunk:
            raise error
        if not chunked and not head.chunked and not head.ends_with_connection and not self._client.opened:
            raise error
        self._client.close_after()
        self._client.write(error_event(error, self._request.path, chunked=chunked))

    def _pass_head(self, head: ResponseHead, rest: bytes) -> None:
        """In one write with what came with it: each write is a system call and a segment."""
        request, client = self._request, self._client
        if client.opened:
            self._pass_into(head, rest)
            return
        if head.ends_with_connection and not request.head_only:
            client.close_after()
        if request.http10:
            if head.chunked and not request.head_only:
                self._decoder = BodyDecoder()
                self._decoder.feed(head.raw)
                rest = b"".join(self._decoder.feed(rest))
            client.write(head.rewritten(close=True, framed=False, added=request.added) + rest)
        elif client.closes or head.names_ours:
            client.write(head.rewritten(close=client.closes, added=request.added) + rest)
        else:
            client.write(b"%b%b\r\n%b" % (head.raw[:-2], request.added, rest))

    def _pass_into(self, head: ResponseHead, rest: bytes) -> None:
        """Only the body, in the framing that the client was told of."""
        whole = head.status != 200 or not head.event_stream
        self._chunks = not self._request.http10 and (whole or not head.chunked)
        if whole:
            self._whole = bytearray()
        if whole or self._chunks or head.chunked == self._request.http10:
            self._decoder = BodyDecoder()
            self._decoder.feed(head.raw)
            for piece in self._decoder.feed(rest):
                self._write(piece)
        elif rest:
            self._client.write(rest)
