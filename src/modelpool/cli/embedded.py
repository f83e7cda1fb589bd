"""A whole pool on one machine: gateway, manager and worker as children, started again when they die, ended together."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil

from modelpool.children import Child, Notice, child_environ
from modelpool.home import Home
from modelpool.process import READY_FD, RUN_ID
from modelpool.settings import Settings
from modelpool.tcp import listen_shared


class EmbeddedPool:
    """The children of one `modelpool up`.

    It holds the gateways' sockets itself: while one of them is started again, who connects waits and is not refused.
    """

    def __init__(self, settings: Settings, home: Home, notice: Notice) -> None:
        self.run_id = settings.run_id
        self._home = home
        environ = child_environ(settings, f"unix:{home.control_socket}")
        self.manager = Child("manager", environ, home.logs / "manager.log", notice)
        self._sockets = listen_shared(
            settings.gateway.host,
            settings.gateway.port,
            settings.gateway.processes,
            flag="--port",
            variable="SERVE_PORT",
        )
        self.gateways = [
            Child("gateway", environ, home.gateway_log(number), notice, listen=sock.dup)
            for number, sock in enumerate(self._sockets, 1)
        ]
        self.worker = Child("worker", environ, home.logs / "worker.log", notice, port_variable="WORKER_PORT")

    @property
    def url(self) -> str:
        """Where clients reach the pool."""
        return self.gateways[0].url

    async def start(self) -> None:
        """Manager first, then the others, who need its socket. Raises StartupError."""
        await self.manager.start()
        try:
            async with asyncio.TaskGroup() as starting:
                for gateway in self.gateways:
                    starting.create_task(gateway.start())
                starting.create_task(self.worker.start())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None  # one reason is enough, and the other child is ended anyway

    async def keep(self) -> None:
        """Keep all parts running, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for child in (self.manager, *self.gateways, self.worker):
                tasks.create_task(child.keep())

    async def end(self) -> None:
        """End all parts: first who takes requests, last who knows."""
        await asyncio.gather(*(gateway.end() for gateway in self.gateways), self.worker.end())
        await self.manager.end()
        self._home.give_back()
        for sock in self._sockets:
            sock.close()


@asynccontextmanager
async def embedded_pool(settings: Settings, home: Home, notice: Notice) -> AsyncIterator[EmbeddedPool]:
    """A pool that serves; on the way out not one of its processes is left."""
    pool = EmbeddedPool(settings, home, notice)
    try:
        await pool.start()
        yield pool
    finally:
        await pool.end()
        sweep(settings.run_id)


def sweep(run_id: str) -> None:
    """SIGKILL whatever of this run is still there, found by the run id in its environment."""
    if not run_id:
        return
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environ = each.environ()
            ours = READY_FD in environ or "MODELPOOL_ENGINES_OF" in environ
            if each.pid != os.getpid() and ours and environ.get(RUN_ID) == run_id:
                each.kill()
