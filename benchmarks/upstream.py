"""An engine that answers at once: a small JSON body, or a stream of 64 chunks, one a turn of the loop.

A prompt that asks for a pace (benchmarks/pace.py) gets a stream at that pace. It listens on `--ports` ports, as so many
engines; with `--control PATH` it also plays the manager there, and says that they are the instances of the model `m`.
Prints its ports as a line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import cast

import httptools
import msgspec
import uvloop

from benchmarks.keys import keys
from benchmarks.machine import raise_descriptor_limit
from benchmarks.pace import CHUNKS, Pace
from modelpool.messages.routing import KEEPALIVE_S, ModelEntry, Route, Snapshot

_EVENT = (
    b'data: {"id":"cmpl-1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":" tok"}}]}\n\n'
)
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def plain(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


_CHUNK = chunk(_EVENT)
_END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
_ANSWER = plain(
    b'{"id":"cmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"finish_reason":"stop",'
    b'"message":{"role":"assistant","content":"' + b"x" * 200 + b'"}}],'
    b'"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}'
)
_ABOUT = plain(b'{"object":"list","data":[{"id":"m","object":"model","created":1,"owned_by":"bench"}]}')
"""For whatever a router asks first: is it well, which models has it."""


class Message(msgspec.Struct):
    content: str = ""


class Ask(msgspec.Struct):
    stream: bool = False
    messages: list[Message] = []


class Engine(asyncio.Protocol):
    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._body = b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._parser.get_method() != b"POST":
            self._transport.write(_ABOUT)
            return
        ask = msgspec.json.decode(self._body, type=Ask)
        if not ask.stream:
            self._transport.write(_ANSWER)
            return
        self._transport.write(_STREAM_HEAD)
        pace = Pace.of(ask.messages[0].content) if ask.messages else None
        if pace:
            self._pace(pace, 0, self._loop.time())
        else:
            self._go_on(CHUNKS)

    def _go_on(self, left: int) -> None:
        if not left:
            self._transport.write(_END)
        elif not self._transport.is_closing():
            self._transport.write(_CHUNK)
            self._loop.call_soon(self._go_on, left - 1)

    def _pace(self, pace: Pace, index: int, since: float) -> None:
        if self._transport.is_closing():
            return
        if index == pace.chunks:
            self._transport.write(_END)
            return
        self._transport.write(chunk(pace.event(index)))
        self._loop.call_at(since + (index + 1) * pace.every_s, self._pace, pace, index + 1, since)


class Manager(asyncio.Protocol):
    """Says the same snapshot and keys to everybody, and after them that it is alive."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._lines = b"".join(msgspec.json.encode(each) + b"\n" for each in (snapshot, keys()))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(self._lines))
        self._keep_alive()

    def _keep_alive(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(b"1\r\n\n\r\n")
            asyncio.get_running_loop().call_later(KEEPALIVE_S, self._keep_alive)


def snapshot_of(ports: list[int], capacity: int) -> Snapshot:
    routes = tuple(
        Route(instance=f"m-r{number}", worker_id="w", host="127.0.0.1", port=port, capacity=capacity)
        for number, port in enumerate(ports, 1)
    )
    return Snapshot(epoch="bench", sequence=1, models={"m": ModelEntry(alias="m", created=1, routes=routes)})


async def main(ports: int, control: str, capacity: int) -> None:
    raise_descriptor_limit()
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(Engine, "127.0.0.1", 0, backlog=4096) for _ in range(ports)]
    taken = [int(server.sockets[0].getsockname()[1]) for server in servers]
    if control:
        snapshot = snapshot_of(taken, capacity)
        servers.append(await loop.create_unix_server(lambda: Manager(snapshot), control))
    print(msgspec.json.encode(taken).decode(), flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ports", type=int, default=8)
    parser.add_argument("--control", default="")
    parser.add_argument("--capacity", type=int, default=2048, help="of each instance, as the manager says it")
    arguments = parser.parse_args()
    uvloop.run(main(arguments.ports, arguments.control, arguments.capacity))
