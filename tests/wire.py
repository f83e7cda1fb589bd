"""Raw sockets for contract tests: servers that answer byte by byte as a test says, and clients that do the same."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec

import uvloop

from modelpool.relay import Endpoint

P = ParamSpec("P")
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

DEADLINE_S = 30.0


def on_uvloop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A test that is a coroutine, with a deadline."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        uvloop.run(asyncio.wait_for(test(*args, **kwargs), DEADLINE_S))

    return run


@asynccontextmanager
async def serving(handle: Handler, *, path: Path | None = None, port: int = 0) -> AsyncIterator[Endpoint]:
    """A server that runs `handle` for each connection, on a Unix socket or on a TCP port of 127.0.0.1."""
    running: set[asyncio.Task[None]] = set()

    async def handle_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        try:
            # Cancelled only below, at the end of the test; the streams' own callback would make noise of it.
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await handle(reader, writer)
        finally:
            running.discard(task)
            writer.close()

    if path is not None:
        server: asyncio.Server = await asyncio.start_unix_server(handle_one, path)
        endpoint = Endpoint.unix(path)
    else:
        server = await asyncio.start_server(handle_one, "127.0.0.1", port)
        endpoint = Endpoint("127.0.0.1", server.sockets[0].getsockname()[1])
    try:
        yield endpoint
    finally:
        server.close()
        tasks = list(running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Unfinished:
    """A handler that takes a request, writes the beginning of an answer, and no more until the other side is gone."""

    def __init__(self, beginning: bytes = b"") -> None:
        self.asked = asyncio.Event()
        self.left = asyncio.Event()
        self._beginning = beginning

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(self._beginning)
        self.asked.set()
        await gone(reader)
        self.left.set()


async def read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """One request or response: its head, and its body by Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return head, await reader.readexactly(length)


def response(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """A response with a length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def gone(reader: asyncio.StreamReader) -> None:
    """Wait until the peer has closed or broken the connection."""
    with suppress(ConnectionError):
        while await reader.read(65536):
            pass
