"""`python -m modelpool.manager`: the embedded manager as a process, on the control socket (and TCP where asked for)."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop

from modelpool import process
from modelpool.control_http import Server, TokenGuard, bind_tcp
from modelpool.core.pool import Policy
from modelpool.core.scaling import ScalingPolicy
from modelpool.home import AlreadyRunning, Home, open_private
from modelpool.manager.api import control_app
from modelpool.manager.manager import running_manager
from modelpool.manager.store import Deposed, Holder, StoreError, open_store
from modelpool.settings import Settings, SettingsError, from_environment

log = logging.getLogger(__name__)


def main() -> int:
    try:
        settings = from_environment()
        process.enter("manager", log_level=settings.log_level)
        home = Home(settings.home_path)
        with home.lock("manager") as lock_id:
            holder = Holder(id=lock_id, name=f"on {socket.gethostname()} (process {os.getpid()})")
            uvloop.run(serve(settings, home, holder))
    except Deposed as error:
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
    token = settings.token or home.cluster_token()
    models = settings.models
    policy = Policy(
        min_replicas=models.min_replicas,
        max_replicas=models.max_replicas,
        scaling=ScalingPolicy(
            load_high=models.load_high,
            load_low=models.load_low,
            averaged_over_s=models.scale_interval_s,
            cooldown_s=models.cooldown_s,
            idle_sleep_1_s=models.idle_sleep_1_s,
            idle_sleep_2_s=models.idle_sleep_2_s,
            idle_unload_s=models.idle_unload_s,
        ),
        min_residence_s=models.min_residence_s,
        turn_max_s=models.turn_max_s,
        swaps_per_minute=models.swaps_per_minute,
        heartbeat_timeout_s=settings.manager.heartbeat_timeout_s,
        backoff_initial_s=settings.manager.backoff_initial_s,
        backoff_max_s=settings.manager.backoff_max_s,
    )
    async with AsyncExitStack() as stack:
        url = settings.manager.store_url
        if not url:
            open_private(home.store, "ab").close()  # before SQLite makes it; what it makes beside it is alike
            url = f"sqlite:///{home.store}"
        store = await stack.enter_async_context(open_store(url))
        manager = await stack.enter_async_context(
            running_manager(
                store,
                policy=policy,
                token=token,
                run_id=settings.run_id,
                recovery_s=settings.manager.recovery_s,
                gateways=settings.gateway.urls_elsewhere,
                holder=holder,
                lease_s=settings.manager.lease_s,
            )
        )
        app = control_app(manager)
        servers = [(Server(app), bind_control_socket(home.control_socket))]
        if settings.manager.host:
            tcp = bind_tcp(settings.manager.host, settings.manager.port, flag="--manager-port", variable="MANAGER_PORT")
            servers.append((Server(TokenGuard(app, token=token)), tcp))
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


def bind_control_socket(path: Path) -> socket.socket:
    """The control socket, mode 0600 from its first moment. A file left by a dead manager is replaced."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(mask)
    return sock


if __name__ == "__main__":
    sys.exit(main())
