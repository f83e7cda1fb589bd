"""`python -m modelpool.manager`: the embedded manager as a process, on the control socket (and TCP where asked for)."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys

import uvloop

from modelpool import process
from modelpool.control_http import Server, TokenGuard, bind_control_socket, bind_tcp
from modelpool.home import AlreadyRunning, Home
from modelpool.manager.api import control_app
from modelpool.manager.startup import holder_here, manager_of
from modelpool.manager.store import Holder, NotHeld, StoreError
from modelpool.settings import Settings, SettingsError, from_environment
from modelpool.tcp import url_of

log = logging.getLogger(__name__)


def main() -> int:
    try:
        settings = from_environment()
        process.enter("manager", log_level=settings.log_level)
        home = Home(settings.home_path)
        with home.lock("manager") as lock_id:
            uvloop.run(serve(settings, home, holder_here(lock_id)))
    except NotHeld as error:
        log.error("ended: %s", error)
        return 1
    except (process.StartupError, SettingsError, StoreError, AlreadyRunning, OSError) as error:
        hint = error.hint if isinstance(error, process.StartupError) else ""
        log.error("cannot start: %s", error)
        process.announce(process.NotStarted(str(error), hint))
        return 1
    return 0


async def serve(settings: Settings, home: Home, holder: Holder) -> None:
    """Serve until SIGTERM or SIGINT."""
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    async with manager_of(settings, home, holder, settings.gateway.urls_elsewhere) as manager:
        app = control_app(manager)
        servers = [(Server(app), bind_control_socket(home.control_socket))]
        if settings.manager.host:
            token = settings.token or home.cluster_token()
            tcp = bind_tcp(settings.manager.host, settings.manager.port, flag="--manager-port", variable="MANAGER_PORT")
            servers.append((Server(TokenGuard(app, token=token)), tcp))
            log.info("workers may register at %s", url_of(tcp))
        process.calm_collector()
        await _serve_all(servers, ending, url=f"unix:{home.control_socket}")


async def _serve_all(servers: list[tuple[Server, socket.socket]], ending: asyncio.Event, url: str) -> None:
    async with asyncio.TaskGroup() as tasks:
        for server, sock in servers:
            sock.listen(256)  # from here on a connection is queued, so it is safe to say that we are ready
            tasks.create_task(server.serve([sock]))
        process.announce(process.Ready(url))
        await ending.wait()
        for server, _ in servers:
            server.should_exit = True
            server.force_exit = True  # streams of snapshots never end by themselves


if __name__ == "__main__":
    sys.exit(main())
