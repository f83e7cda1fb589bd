"""uvicorn, run by a host: on a socket of ours, in a loop of ours, ended by us alone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import uvicorn

from modelpool.engines.engine import ASGIApp

# The gateway keeps idle connections; the host must not be the one that closes first, or requests are lost in the gap.
_KEEP_ALIVE_S = 600
# After the drain is over: time for answers that are cancelled now to leave.
_CUT_S = 1


class Server(uvicorn.Server):
    """`ready` is set once it accepts; setting `stop` closes it, cutting what is still in flight after a second."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                cast(Any, app),
                http="httptools",
                interface="asgi3",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_CUT_S,
            )
        )
        self.ready = asyncio.Event()
        self.stop = asyncio.Event()

    async def serve_on(self, listener: socket.socket) -> None:
        await self.serve(sockets=[listener])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        """Wait, where uvicorn's own wakes ten times a second to look for signals and to update the date header."""
        await self.on_tick(0)
        self.ready.set()
        await self.stop.wait()
