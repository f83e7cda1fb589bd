"""The least that a Python proxy can do: asyncio.Protocol, httptools and uvloop, bytes passed through, nothing else.

One upstream, no limits, no retries, no backpressure, no keys. Prints its port. `--upstream` is the upstream's port.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import cast

import httptools
import uvloop


class Upstream(asyncio.Protocol):
    client: Client

    def __init__(self, idle: list[Upstream]) -> None:
        self._idle = idle
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.client.transport.write(data)
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._idle.append(self)


class Client(asyncio.Protocol):
    def __init__(self, idle: list[Upstream], port: int) -> None:
        self._idle = idle
        self._port = port
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._request = b""
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._request += data
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        if self._idle:
            self._send(self._idle.pop())
        else:
            self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        _, upstream = await self._loop.create_connection(lambda: Upstream(self._idle), "127.0.0.1", self._port)
        self._send(upstream)

    def _send(self, upstream: Upstream) -> None:
        upstream.client = self
        upstream.transport.write(self._request)
        self._request = b""


async def main(upstream: int) -> None:
    idle: list[Upstream] = []
    server = await asyncio.get_running_loop().create_server(lambda: Client(idle, upstream), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", type=int, required=True)
    uvloop.run(main(parser.parse_args().upstream))
