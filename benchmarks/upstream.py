"""An engine that answers at once: a small JSON body, or a stream of 64 chunks, one a turn of the loop.

With `--control PATH` it also plays the manager there, and says that it is `--instances` instances of the model `m`.
Prints its port.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from typing import cast

import httptools
import msgspec
import uvloop

from modelpool.messages.routing import KEEPALIVE_S, ModelEntry, Route, Snapshot

CHUNKS = 64
_EVENT = (
    b'data: {"id":"cmpl-1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" tok"}}]}\n\n'
)
_CHUNK = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_BODY = (
    b'{"id":"cmpl-1","object":"chat.completion","choices":[{"index":0,"message":{"content":"' + b"x" * 200 + b'"}}]}'
)
PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
STREAM_MARK = b'"stream":true'


class Engine(asyncio.Protocol):
    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._stream = False
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._stream = STREAM_MARK in body

    def on_message_complete(self) -> None:
        if self._stream:
            self._transport.write(_STREAM_HEAD)
            self._go_on(iter(range(CHUNKS)))
        else:
            self._transport.write(PLAIN)

    def _go_on(self, numbers: Iterator[int]) -> None:
        if next(numbers, None) is None:
            self._transport.write(b"0\r\n\r\n")
        elif not self._transport.is_closing():
            self._transport.write(_CHUNK)
            self._loop.call_soon(self._go_on, numbers)


class Manager(asyncio.Protocol):
    """Says the same snapshot to everybody, and after it that it is alive."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._line = msgspec.json.encode(snapshot) + b"\n"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        chunk = b"%x\r\n%b\r\n" % (len(self._line), self._line)
        self._transport.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk)
        self._keep_alive()

    def _keep_alive(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(b"1\r\n\n\r\n")
            asyncio.get_running_loop().call_later(KEEPALIVE_S, self._keep_alive)


async def main(control: str, instances: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Engine, "127.0.0.1", 0, backlog=4096)
    port = server.sockets[0].getsockname()[1]
    if control:
        routes = tuple(
            Route(instance=f"m-r{number}", worker_id="w", host="127.0.0.1", port=port, capacity=256)
            for number in range(instances)
        )
        snapshot = Snapshot(epoch="bench", sequence=1, models={"m": ModelEntry(alias="m", created=1, routes=routes)})
        await loop.create_unix_server(lambda: Manager(snapshot), control)
    print(port, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--control", default="")
    parser.add_argument("--instances", type=int, default=8)
    arguments = parser.parse_args()
    uvloop.run(main(arguments.control, arguments.instances))
