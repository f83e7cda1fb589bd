"""Pooled connections to upstreams: one request at a time on each, the response's bytes handed on as they come.

The parser only watches: it finds the response's head and its end. The bytes go to the Sink as the socket gave them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection
from time import monotonic
from typing import NamedTuple, Protocol, cast

import httptools

from modelpool.errors import EngineError, UpstreamFailed, UpstreamTimeout
from modelpool.relay.endpoint import Endpoint
from modelpool.relay.response import ResponseHead

HEAD_BYTES_MAX = 256 << 10
IDLE_MAX = 1024
"""Idle connections kept per endpoint."""
GATHER_S = 0.002
"""Where pieces are rapid, what comes within this is taken at once."""
_RAPID_S = 0.001
"""From one piece to the next."""
_RAPID_MAX = 1
"""So many rapid pieces in a row are taken as they come: an engine sends the first ones of a stream together."""
_SMALL = 32 << 10
"""Pieces of this size are as good as gathered."""
STALE_S = 1.0
"""A peer that closed an idle connection shows within a round trip of the next request that it never read it."""


class Deadlines(NamedTuple):
    """How long an answer may take, in seconds; infinity for as long as it likes. Looked at by `Exchange.check`."""

    first_byte_s: float = math.inf
    between_bytes_s: float = math.inf
    total_s: float = math.inf


class Sink(Protocol):
    """Takes a response. Called from the event loop; must not block or raise."""

    def head(self, head: ResponseHead, rest: bytes) -> None:
        """The final response's head, once, and what came with it of the body. Interim (1xx) responses are left out."""

    def data(self, data: bytes) -> None:
        """More of the body, framing included, segment by segment as it came."""


class Exchange:
    """One request and its response. It ends by itself when the response is complete or has failed, or by `close`."""

    __slots__ = (
        "_connection",
        "_ended",
        "_moved_at",
        "_paused",
        "_seen",
        "deadlines",
        "head",
        "head_only",
        "reused",
        "segments",
        "sent_at",
        "sink",
        "takes_chunk",
    )

    def __init__(
        self, connection: _Connection, sink: Sink, ended: asyncio.Future[None], *, head_only: bool, reused: bool
    ) -> None:
        self._connection: _Connection | None = connection
        self._ended = ended
        self._paused = False
        self._seen = 0
        self._moved_at = 0.0
        self.deadlines = _NO_DEADLINES
        self.segments = 0
        """How often something of the answer came."""
        self.sink = sink
        self.head: ResponseHead | None = None
        self.head_only = head_only
        self.reused = reused
        self.sent_at = 0.0
        self.takes_chunk = False
        """After a failure: whether another chunk may follow what was passed on, since it ended between two chunks."""

    @property
    def over(self) -> bool:
        """Whether the response is complete or has failed."""
        return self._ended.done()

    def when_over(self, act: Callable[[], object]) -> None:
        """Call `act` soon after the response is complete or has failed."""
        self._ended.add_done_callback(lambda _: act())

    async def ended(self) -> None:
        """Wait for the response's end. Raises UpstreamFailed. Cancelled or failed, the connection is closed."""
        try:
            await self._ended
        finally:
            self.close()

    def close(self) -> None:
        """Leave. If the response is not complete, its connection is closed at once, so that the engine aborts."""
        if self._connection is not None:
            self._connection.abandon()
            self._connection = None

    def pause(self) -> None:
        """Stop reading: the peer is slowed down by its full socket."""
        if self._connection is not None and not self._paused:
            self._paused = True
            self._connection.pause()

    def resume(self) -> None:
        if self._connection is not None and self._paused:
            self._paused = False
            self._connection.resume()

    def check(self, now: float) -> None:
        """Fail with UpstreamTimeout if a deadline has passed. To be called every now and then, on the loop's clock."""
        if self.segments != self._seen or self._paused:
            self._seen, self._moved_at = self.segments, now
        if self._connection is None:
            return
        first_byte_s, between_bytes_s, total_s = self.deadlines
        if now - self.sent_at > total_s:
            self._connection.give_up(f"The answer was not complete within {total_s:g} s.")
        elif self.head is None:
            if now - self.sent_at > first_byte_s:
                self._connection.give_up(f"No answer began within {first_byte_s:g} s.")
        elif now - self._moved_at > between_bytes_s:
            self._connection.give_up(f"Nothing more of the answer came for {between_bytes_s:g} s.")

    def finish(self) -> None:
        """For the connection: the response is complete, the connection is no longer this exchange's."""
        if self._paused:
            self.resume()
        self._connection = None
        if not self._ended.done():
            self._ended.set_result(None)

    def fail(self, error: EngineError, *, takes_chunk: bool) -> None:
        """For the connection: there will be no more of this response."""
        self.takes_chunk = takes_chunk
        if not self._ended.done():
            self._ended.set_exception(error)
            self._ended.exception()  # nobody may be waiting; that is no error of its own


_NO_DEADLINES = Deadlines()


class _Connection(asyncio.Protocol):
    __slots__ = (
        "_complete",
        "_excess",
        "_exchange",
        "_final",
        "_gathering",
        "_interims",
        "_keep_alive",
        "_loop",
        "_moved_at",
        "_parser",
        "_paused",
        "_pool",
        "_rapid",
        "_transport",
        "_unread",
        "_used",
    )

    def __init__(self, pool: Pool, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._used = False
        self._moved_at = 0.0
        self._rapid = 0
        self._gathering = False
        self._paused = False
        self._reset()

    def _reset(self) -> None:
        self._unread = b""
        self._interims = 0
        self._final = False
        self._complete = False
        self._excess = False
        self._keep_alive = False

    # Used by the pool and the exchange

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def begin(self, request: bytes, sink: Sink, *, head_only: bool) -> Exchange:
        assert self._exchange is None
        assert self._transport is not None
        exchange = Exchange(self, sink, self._loop.create_future(), head_only=head_only, reused=self._used)
        self._used = True
        self._exchange = exchange
        exchange.sent_at = self._loop.time()
        self._transport.write(request)
        return exchange

    def abandon(self) -> None:
        self._exchange = None
        self.close()

    def give_up(self, why: str) -> None:
        self._fail(UpstreamTimeout(why))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        self._paused = True
        self._read(False)

    def resume(self) -> None:
        self._paused = False
        self._read(not self._gathering)

    def _gather(self, size: int) -> None:
        """Leave a rapid stream of small pieces in the socket for a moment, to take many of them at once.

        Each piece costs two system calls and wakes the client. What engines generate is far slower than this.
        """
        now = monotonic()
        self._rapid = self._rapid + 1 if size < _SMALL and now - self._moved_at < _RAPID_S else 0
        self._moved_at = now
        if self._rapid > _RAPID_MAX and not self._paused:
            self._gathering = True
            self._read(False)
            self._loop.call_later(GATHER_S, self._gathered)

    def _gathered(self) -> None:
        self._gathering = False
        self._moved_at = monotonic()
        self._read(not self._paused)

    def _read(self, on: bool) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if on:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    # Called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._pool.count(1)

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            self.close()  # what an idle upstream says belongs to no request
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(UpstreamFailed("What answered does not speak HTTP."))
            return
        if self._excess:
            self._fail(UpstreamFailed("More than one answer came."))
            return
        exchange.segments += 1
        if exchange.head is not None:
            exchange.sink.data(data)
        elif not self._take_head(exchange, data):
            return
        if self._complete and self._exchange is exchange:
            self._finish(exchange)
        else:
            self._gather(len(data))

    def eof_received(self) -> None:
        self._ended(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        self._pool.count(-1)
        self._ended(exc)
        self._transport = None
        del self._parser  # they hold each other

    # Called by the parser

    def on_message_begin(self) -> None:
        if self._complete:
            self._excess = True

    def on_headers_complete(self) -> None:
        if 100 <= self._parser.get_status_code() < 200:
            self._interims += 1
        else:
            self._final = True

    def on_message_complete(self) -> None:
        if self._final:
            self._complete = True
            self._keep_alive = self._parser.should_keep_alive()

    def _take_head(self, exchange: Exchange, data: bytes) -> bool:
        """Hand on the head and what follows it, once it is there."""
        self._unread = data = self._unread + data
        if not self._final:
            if len(data) > HEAD_BYTES_MAX:
                self._fail(UpstreamFailed("The answer has too long a head."))
            return False
        for _ in range(self._interims):
            data = data[data.index(b"\r\n\r\n") + 4 :]
        end = data.index(b"\r\n\r\n") + 4
        self._unread = b""
        exchange.head = head = ResponseHead(self._parser.get_status_code(), data[:end])
        exchange.sink.head(head, data[end:])
        if exchange.head_only and not self._complete:
            # There is no way to tell the parser that a body is announced but does not come.
            self._keep_alive = end == len(data) and self._parser.should_keep_alive()
            self._parser = httptools.HttpResponseParser(self)
            self._complete = True
        return True

    def _finish(self, exchange: Exchange) -> None:
        keep_alive = self._keep_alive
        self._exchange = None
        self._reset()
        exchange.finish()
        if keep_alive:
            self._pool.give_back(self)
        else:
            self.close()

    def _ended(self, exc: Exception | None) -> None:
        """The peer closed or broke the connection."""
        exchange = self._exchange
        if exchange is None:
            self._pool.forget(self)
            return
        if exc is None and exchange.head is not None and exchange.head.ends_with_connection:
            self._keep_alive = False
            self._finish(exchange)
            return
        if exchange.head is not None:
            self._fail(UpstreamFailed("The connection broke in the middle of the answer."))
            return
        stale = exchange.reused and not self._unread and self._loop.time() - exchange.sent_at < STALE_S
        self._fail(UpstreamFailed("The connection broke before there was an answer.", may_have_run=not stale))

    def _fail(self, error: EngineError) -> None:
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        head = exchange.head
        takes_chunk = head is not None and head.chunked and not head.announces_trailers and self._between_chunks()
        exchange.fail(error, takes_chunk=takes_chunk)
        self.close()

    def _between_chunks(self) -> bool:
        """Ask the parser, which knows: a last chunk completes the message only between two chunks."""
        if self._complete or not self._final:
            return False
        try:
            self._parser.feed_data(b"0\r\n\r\n")
        except httptools.HttpParserError:
            return False
        return self._complete


class Pool:
    """Connections to one endpoint. The one used last is used again first, so that spare ones grow old and go."""

    def __init__(self, endpoint: Endpoint, *, connect_timeout_s: float) -> None:
        self.endpoint = endpoint
        self._connect_timeout_s = connect_timeout_s
        self._idle: dict[_Connection, None] = {}
        self._open = 0
        self._opening: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def busy(self) -> int:
        return self._open - len(self._idle)

    async def send(self, request: bytes, sink: Sink, *, head_only: bool = False, fresh: bool = False) -> Exchange:
        """Send a request on an idle connection, else (or if `fresh`) on a new one; its response goes to `sink`.

        `head_only`: the method is HEAD. The caller awaits the exchange's `ended()` or closes it. Raises UpstreamFailed
        or UpstreamTimeout, both with `may_have_run` false, when there can be no connection.
        """
        while self._idle and not fresh:
            connection, _ = self._idle.popitem()
            if connection.usable:
                return connection.begin(request, sink, head_only=head_only)
        connection = await self._connect()
        if not connection.usable:
            raise UpstreamFailed("The connection was closed as soon as it was taken.", may_have_run=False)
        if not fresh:
            self._open_ahead()
        return connection.begin(request, sink, head_only=head_only)

    def close(self) -> None:
        """Close what is idle now; what is busy is closed when its response has ended."""
        self._closed = True
        if self._opening is not None:
            self._opening.cancel()
        while self._idle:
            self._idle.popitem()[0].close()

    def give_back(self, connection: _Connection) -> None:
        """For a connection: it is free again."""
        if self._closed or len(self._idle) >= IDLE_MAX or not connection.usable:
            connection.close()
        else:
            self._idle[connection] = None

    def forget(self, connection: _Connection) -> None:
        """For a connection: its peer is gone."""
        self._idle.pop(connection, None)

    def count(self, opened: int) -> None:
        """For a connection: it was opened (1) or is closed (-1)."""
        self._open += opened

    def _open_ahead(self) -> None:
        """Where several are busy at once, and none was idle, the next request would wait for a connection too."""
        if self.busy > 1 and self._opening is None and not self._closed:
            self._opening = asyncio.get_running_loop().create_task(self._open_one())

    async def _open_one(self) -> None:
        try:
            self.give_back(await self._connect())
        except EngineError:
            pass  # the request that needs a connection will say so
        finally:
            self._opening = None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        path = self.endpoint.socket_path
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                if path is not None:
                    _, connection = await loop.create_unix_connection(lambda: _Connection(self, loop), path)
                else:
                    _, connection = await loop.create_connection(lambda: _Connection(self, loop), *self.endpoint)
        except TimeoutError as error:
            text = f"No connection was taken within {self._connect_timeout_s:g} s."
            raise UpstreamTimeout(text, may_have_run=False) from error
        except OSError as error:
            raise UpstreamFailed("No connection is taken.", may_have_run=False) from error
        return connection


class Pools:
    """The pools of one process, by endpoint."""

    def __init__(self, *, connect_timeout_s: float) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._pools: dict[Endpoint, Pool] = {}

    def pool(self, endpoint: Endpoint) -> Pool:
        pool = self._pools.get(endpoint)
        if pool is None:
            pool = self._pools[endpoint] = Pool(endpoint, connect_timeout_s=self._connect_timeout_s)
        return pool

    def keep_only(self, endpoints: Collection[Endpoint]) -> None:
        """Close the pools of endpoints that are no more."""
        for endpoint in self._pools.keys() - endpoints:
            self._pools.pop(endpoint).close()

    def close(self) -> None:
        self.keep_only(())
