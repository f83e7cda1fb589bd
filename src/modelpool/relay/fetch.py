"""A response for a coroutine: status, headers, and the body piece by piece with the framing taken off."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from modelpool.errors import EngineError
from modelpool.relay.request import Headers, end_to_end
from modelpool.relay.response import BodyDecoder, ResponseHead
from modelpool.relay.upstream import Exchange, Pool

_BUFFERED_MAX = 256 << 10
"""Bytes that wait for a slow reader before the upstream is told to wait too."""


class Response:
    """`async for` gives the body's pieces as they came, once; raises UpstreamFailed where the upstream breaks off."""

    def __init__(self) -> None:
        self._head: ResponseHead | None = None
        self._exchange: Exchange | None = None
        self._decoder = BodyDecoder()
        self._pieces: deque[bytes] = deque()
        self._buffered = 0
        self._news = asyncio.Event()

    @property
    def status(self) -> int:
        assert self._head is not None
        return self._head.status

    @property
    def headers(self) -> Headers:
        """End-to-end headers, names in lower case; without `Transfer-Encoding`, since the framing is off."""
        assert self._head is not None
        return end_to_end(self._head.headers())

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self])

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert self._exchange is not None
        while True:
            while self._pieces:
                piece = self._pieces.popleft()
                self._buffered -= len(piece)
                yield piece
            self._exchange.resume()
            if self._exchange.over:
                await self._exchange.ended()
                return
            await self._wait()

    # As a Sink

    def head(self, head: ResponseHead, rest: bytes) -> None:
        self._head = head
        self._decoder.feed(head.raw)
        self.data(rest)

    def data(self, data: bytes) -> None:
        for piece in self._decoder.feed(data):
            self._pieces.append(piece)
            self._buffered += len(piece)
        if self._buffered > _BUFFERED_MAX and self._exchange is not None:
            self._exchange.pause()
        self._news.set()

    # Used by fetch

    async def begin(self, exchange: Exchange) -> None:
        """Wait for the head. Raises UpstreamFailed."""
        self._exchange = exchange
        exchange.when_over(self._news.set)
        while self._head is None:
            if exchange.over:
                await exchange.ended()
            await self._wait()

    async def _wait(self) -> None:
        await self._news.wait()
        self._news.clear()


@asynccontextmanager
async def fetch(pool: Pool, request: bytes, *, head_only: bool = False) -> AsyncIterator[Response]:
    """Send a request; entered means that the response's head is there. Leaving early closes the connection.

    A request that met a connection which its peer had closed meanwhile is sent again on a new one, once.
    Raises UpstreamFailed or UpstreamTimeout.
    """
    response, exchange = await _open(pool, request, head_only=head_only)
    try:
        yield response
    finally:
        exchange.close()


async def _open(pool: Pool, request: bytes, *, head_only: bool) -> tuple[Response, Exchange]:
    for fresh in (False, True):
        response = Response()
        exchange = await pool.send(request, response, head_only=head_only, fresh=fresh)
        try:
            await response.begin(exchange)
        except EngineError as error:
            if fresh or error.may_have_run:
                raise
        except BaseException:
            exchange.close()
            raise
        else:
            return response, exchange
    raise AssertionError("a fresh connection is tried last")
