"""A response on its way from an upstream to the client: the bytes as they come."""

from __future__ import annotations

from time import monotonic

from modelpool.errors import EngineError
from modelpool.gateway.answer import error_event
from modelpool.gateway.connection import ClientConnection
from modelpool.gateway.request import Request
from modelpool.relay import Exchange, ResponseHead
from modelpool.relay.response import BodyDecoder

_HELD_MAX = 64 << 10


class PassThrough:
    """A Sink that writes to the client.

    An answer whose status is in `hold` is held back: it may say that the instance took no notice of the request, which
    the client need not see. `release` lets it go.

    `segments` and `size` count the pieces and bytes of the body, framing included; `first_byte` is the first's time.
    """

    __slots__ = ("_client", "_decoder", "_head", "_held", "_hold", "_request", "first_byte", "segments", "size")

    def __init__(self, request: Request, client: ClientConnection, *, hold: frozenset[int] = frozenset()) -> None:
        self._request = request
        self._client = client
        self._hold = hold
        self._head: ResponseHead | None = None
        self._held: bytearray | None = None
        self._decoder: BodyDecoder | None = None
        self.first_byte = 0.0
        self.segments = 0
        self.size = 0

    @property
    def status(self) -> int:
        """0 before there is a head."""
        return 0 if self._head is None else self._head.status

    @property
    def streamed(self) -> bool:
        return self._head is not None and self._head.event_stream

    def head(self, head: ResponseHead, rest: bytes) -> None:
        self._head = head
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
                self._client.write(piece)
        else:
            self._client.write(data)

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
        if not self._client.answered or head is None or not head.event_stream:
            raise error
        chunked = head.chunked and self._decoder is None
        if chunked and not exchange.takes_chunk:
            raise error
        if not chunked and not head.chunked and not head.ends_with_connection:
            raise error
        self._client.close_after()
        self._client.write(error_event(error, self._request.path, chunked=chunked))

    def _pass_head(self, head: ResponseHead, rest: bytes) -> None:
        """In one write with what came with it: each write is a system call and a segment."""
        request, client = self._request, self._client
        if head.ends_with_connection and not request.head_only:
            client.close_after()
        if request.http10:
            if head.chunked and not request.head_only:
                self._decoder = BodyDecoder()
                self._decoder.feed(head.raw)
                rest = b"".join(self._decoder.feed(rest))
            client.write(head.rewritten(close=True, framed=False, added=request.added) + rest)
        elif client.closes or head.names_connection or head.names_request:
            client.write(head.rewritten(close=client.closes, added=request.added) + rest)
        else:
            client.write(b"%b%b\r\n%b" % (head.raw[:-2], request.added, rest))
