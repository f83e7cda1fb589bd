"""`python -m modelpool.gateway`: the gateway as a process."""

from __future__ import annotations

import asyncio
import logging
import math
import resource
import signal
import socket
import sys

import uvloop

from modelpool import process
from modelpool.gateway.app import GatewayApp
from modelpool.gateway.auth import Access, check_exposure, is_loopback
from modelpool.gateway.connection import Limits
from modelpool.gateway.control import Control
from modelpool.gateway.inference import Inference
from modelpool.gateway.instances import Instances
from modelpool.gateway.listener import listening
from modelpool.gateway.snapshots import SnapshotFeed
from modelpool.gateway.table import Table
from modelpool.home import Home
from modelpool.relay import Deadlines, Endpoint, Pools
from modelpool.settings import Settings, SettingsError, from_environment
from modelpool.tcp import bind_tcp, url_of

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""What is being served gets this long to finish."""


def main() -> int:
    try:
        settings = from_environment()
        process.enter("gateway", log_level=settings.log_level)
        raise_descriptor_limit()
        check_exposure(settings.gateway)
        home = Home(settings.home_path)
        sock = bind_tcp(settings.gateway.host, settings.gateway.port, flag="--port", variable="SERVE_PORT")
        uvloop.run(serve(settings, home, sock))
    except (process.StartupError, SettingsError, OSError) as error:
        hint = error.hint if isinstance(error, process.StartupError) else ""
        log.error("cannot start: %s", error)
        process.announce(process.NotStarted(str(error), hint))
        return 1
    return 0


async def serve(settings: Settings, home: Home, sock: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, and then until what is being served has ended, or a second signal came."""
    gateway = settings.gateway
    token = settings.token or home.cluster_token()
    access = Access(
        api_key=gateway.api_key, admin_key=home.admin_key(), cluster_token=token, local=is_loopback(gateway.host)
    )
    upstreams = Pools(connect_timeout_s=gateway.connect_timeout_s)
    controls = Pools(connect_timeout_s=gateway.connect_timeout_s)
    control = controls.pool(Endpoint.unix(home.control_socket))
    table = Table(Instances(upstreams, token))
    feed = SnapshotFeed(table, control)
    inference = Inference(
        table,
        Deadlines(
            *(
                each or math.inf
                for each in (gateway.first_byte_timeout_s, gateway.between_bytes_timeout_s, gateway.total_timeout_s)
            )
        ),
    )
    app = GatewayApp(access, table, feed, inference, Control(control))
    limits = Limits(body_bytes=gateway.max_body_bytes)
    ending = ending_signal()
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(feed.follow())
        async with listening(sock, app, limits, grace_s=GRACE_S):
            process.announce(process.Ready(url_of(sock)))
            await ending.wait()
            log.info("ending")
        following.cancel()
    upstreams.close()
    controls.close()


def ending_signal() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT. The second one ends the process the default way."""
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()

    def first() -> None:
        ending.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, first)
    return ending


def raise_descriptor_limit() -> None:
    """As many connections as this user may have: each client and each upstream takes a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        log.warning("no more than %s descriptors, about half as many requests at once: %s", soft, error)
    else:
        log.info("descriptors: %s, was %s", hard, soft)


if __name__ == "__main__":
    sys.exit(main())
