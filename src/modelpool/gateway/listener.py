"""The listening socket and the connections that came through it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from modelpool.gateway.client_limits import Limits
from modelpool.gateway.connection import Application, ClientConnection
from modelpool.tcp import BACKLOG

ACCEPTED = 16
"""Connections taken in a turn of the loop, at most. libuv takes one per turn and listening descriptor (since 1.45), so
with one of them 256 clients that came at once to a busy gateway waited for a second; that many look at the same socket.
"""
CHECKED = 256
"""Connections looked at in a turn of the loop: nine thousand take 10 ms, which nobody else should wait for."""


class Listener:
    """The connections of one socket. Use `listening`."""

    def __init__(self) -> None:
        self.ending = False
        self.retiring = False
        self.servers: list[asyncio.Server] = []
        self._connections: set[ClientConnection] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def connections(self) -> int:
        return len(self._connections)

    def joined(self, connection: ClientConnection) -> None:
        self._connections.add(connection)
        self._empty.clear()

    def left(self, connection: ClientConnection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    async def enforce_deadlines(self, every_s: float) -> None:
        """One timer for all connections: one each would cost more than the rest of their reading."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(every_s)
            now = loop.time()
            for number, connection in enumerate(list(self._connections), 1):
                connection.check(now)
                if number % CHECKED == 0:
                    await asyncio.sleep(0)

    async def retire(self) -> None:
        """Take no more connections, and return once all that there are have ended. What comes through them is served,
        and answered as their last: closed under a client that is about to use it, one would be an error there.
        """
        self.retiring = True
        self.stop_listening()
        await self._empty.wait()

    def stop_listening(self) -> None:
        for server in self.servers:
            server.close()

    async def end(self, grace_s: float) -> None:
        """Let what is being served finish for up to `grace_s`, then cut it. Returns when all of it has ended."""
        self.ending = True
        for connection in list(self._connections):
            connection.end()
        try:
            async with asyncio.timeout(grace_s):
                await self._empty.wait()
        except TimeoutError:
            for connection in list(self._connections):
                connection.abort()
            await self._empty.wait()


@asynccontextmanager
async def listening(
    sock: socket.socket, app: Application, limits: Limits, *, grace_s: float, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Listener]:
    """Serve `app` on a bound socket. Left, no connection and no request of it is alive."""
    loop = asyncio.get_running_loop()
    listener = Listener()
    for each in (sock, *(sock.dup() for _ in range(ACCEPTED - 1))):
        server = await loop.create_server(
            lambda: ClientConnection(app, listener, limits, loop),
            sock=each,
            backlog=BACKLOG,
            ssl=tls,
            ssl_handshake_timeout=limits.head_s if tls else None,
            ssl_shutdown_timeout=limits.linger_s if tls else None,
        )
        listener.servers.append(server)
    async with asyncio.TaskGroup() as tasks:
        deadlines = tasks.create_task(listener.enforce_deadlines(limits.check_s))
        try:
            yield listener
        finally:
            listener.stop_listening()
            await listener.end(grace_s)
            deadlines.cancel()
