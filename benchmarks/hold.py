"""Connections that stay: idle ones, each after one request, or streams at a pace, each byte of which is compared.

Prints a line once all are open. Idle connections stay until its standard input ends. Streams end by themselves, or with
the standard input; then a Held is printed as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from typing import cast

import httptools
import msgspec
import uvloop

from benchmarks.load import request
from benchmarks.machine import raise_descriptor_limit
from benchmarks.pace import Pace

OPENING = 64
"""So many wait for their first byte at once, so that opening them is no storm of its own."""
_DONE = b"data: [DONE]\n\n"


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the streams. Times in seconds, `opened_at` and `closed_at` on this machine's monotonic clock."""

    streams: int
    complete: int
    """Ended as they should, with each byte as it should be."""
    wrong: int
    """Had a byte that should not be there."""
    bytes: int
    opened_at: float
    """When the last one had its first byte."""
    closed_at: float
    """When the first one ended."""
    late_p50_s: float
    late_p99_s: float
    """Over the streams: how much later than its pace a stream's latest chunk came."""


class Connection(asyncio.Protocol):
    """One that is opened, asks, and stays."""

    def __init__(self, raw: bytes, pace: Pace | None) -> None:
        self._raw = raw
        self._pace = pace
        self._parser = httptools.HttpResponseParser(self)
        self._index = 0
        self._expected = b""
        self._first = 0.0
        self.open: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.complete = False
        self.wrong = False
        self.bytes = 0
        self.late = 0.0
        self.opened_at = 0.0
        self.closed_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._raw)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        if not self.open.done():
            self.open.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)
        if not self.opened_at:
            self.opened_at = time.monotonic()
            self.open.set_result(None)

    def on_headers_complete(self) -> None:
        self.wrong |= self._parser.get_status_code() != 200

    def on_body(self, part: bytes) -> None:
        if self._pace is None:
            return
        self.bytes += len(part)
        while part:
            if not self._expected:
                self._expected = self._begin_chunk(self._pace)
            length = min(len(part), len(self._expected))
            if not length or part[:length] != self._expected[:length]:
                self.wrong = True
                return
            part, self._expected = part[length:], self._expected[length:]

    def _begin_chunk(self, pace: Pace) -> bytes:
        index, self._index = self._index, self._index + 1
        if index >= pace.chunks:
            return _DONE if index == pace.chunks else b""
        now = time.monotonic()
        self._first = self._first or now
        self.late = max(self.late, now - self._first - index * pace.every_s)
        return pace.event(index)

    def on_message_complete(self) -> None:
        if self._pace is not None:
            whole = self._index == self._pace.chunks + 1 and not self._expected
            self.complete = whole and not self.wrong
            self._end()
            self.transport.close()

    def _end(self) -> None:
        if not self.over.done():
            self.closed_at = time.monotonic()
            self.over.set_result(None)


async def open_all(port: int, key: str, paces: list[Pace | None]) -> list[Connection]:
    """In order, a few at a time, each until its first byte."""
    loop = asyncio.get_running_loop()
    gate = asyncio.Semaphore(OPENING)

    async def open_one(pace: Pace | None) -> Connection:
        raw = request(key, stream=pace is not None, prompt=pace.prompt() if pace else "hello")
        async with gate:
            _, connection = await loop.create_connection(lambda: Connection(raw, pace), "127.0.0.1", port)
            await connection.open
        return connection

    return await asyncio.gather(*map(open_one, paces))


def held(connections: list[Connection]) -> Held:
    late = sorted(each.late for each in connections)
    return Held(
        streams=len(connections),
        complete=sum(each.complete for each in connections),
        wrong=sum(each.wrong for each in connections),
        bytes=sum(each.bytes for each in connections),
        opened_at=max(each.opened_at for each in connections),
        closed_at=min(each.closed_at or time.monotonic() for each in connections),
        late_p50_s=late[len(late) // 2],
        late_p99_s=late[len(late) * 99 // 100],
    )


async def main(port: int, key: str, paces: list[Pace | None]) -> Held:
    raise_descriptor_limit()
    connections = await open_all(port, key, paces)
    print(flush=True)
    told = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_reader(0, lambda: None if told.done() else told.set_result(None))
    ended = asyncio.gather(*(each.over for each in connections))
    await asyncio.wait((told, ended), return_when=asyncio.FIRST_COMPLETED)
    ended.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await ended
    for each in connections:
        each.transport.abort()
    return held(connections)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--key", default="none")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--first", type=int, default=0, help="the first stream's number")
    parser.add_argument("--chunks", type=int, default=0, help="of each stream; 0: idle connections")
    parser.add_argument("--every", type=float, default=1.0)
    given = parser.parse_args()
    numbers = range(given.first, given.first + given.count)
    paces = [Pace(number, given.chunks, given.every) if given.chunks else None for number in numbers]
    sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(main(given.port, given.key, paces))))
