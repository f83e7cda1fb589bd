"""`python -m modelpool.gateway`: the gateway as a process."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import ssl
import sys
from contextlib import suppress

import uvloop

from modelpool import process
from modelpool.gateway.auth import check_exposure
from modelpool.gateway.client_limits import Limits
from modelpool.gateway.handover import keep_offering
from modelpool.gateway.listener import Listener, listening
from modelpool.gateway.parts import assembled
from modelpool.home import Home
from modelpool.settings import Settings, SettingsError, from_environment
from modelpool.tcp import bind_tcp, inherited, url_of
from modelpool.tls import keep_current, server_context

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""What is being served gets this long to finish."""
RETIRING_S = 24 * 3600.0
"""What one that retires serves gets this long."""
FIRST_SNAPSHOT_S = 2.0
"""Who connects waits for so long at first, until it is known which models there are."""
_DESCRIPTORS_SPARE = 512
"""For those who wait, connections that idle, the manager, the log."""
_DESCRIPTORS_MAX = 1 << 20


def main() -> int:
    try:
        settings = from_environment()
        process.enter("gateway", log_level=settings.log_level)
        raise_descriptor_limit()
        check_exposure(settings.gateway)
        tls = server_context(settings.gateway.tls_cert_file, settings.gateway.tls_key_file)
        home = Home(settings.home_path)
        sock = inherited() or bind_tcp(
            settings.gateway.host, settings.gateway.port, flag="--port", variable="SERVE_PORT"
        )
        uvloop.run(serve(settings, home, sock, tls))
    except (process.StartupError, SettingsError, OSError) as error:
        hint = error.hint if isinstance(error, process.StartupError) else ""
        log.error("cannot start: %s", error)
        process.announce(process.NotStarted(str(error), hint))
        return 1
    return 0


async def serve(settings: Settings, home: Home, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
    """Serve until SIGTERM or SIGINT, and then until what is being served has ended, or a second signal came.

    SIGQUIT has it retire, while another process serves at the same address.
    """
    gateway = settings.gateway
    ending, retiring = ending_signal(), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGQUIT, retiring.set)
    max_ongoing = gateway.max_ongoing_requests or ongoing_max()
    async with assembled(settings, home, max_ongoing=max_ongoing) as parts, asyncio.TaskGroup() as tasks:
        beside = [parts.feed.follow(), parts.node.keep_reaping(), parts.demand.keep_reporting()]
        if tls is not None:
            beside.append(keep_current(tls, gateway.tls_cert_file, gateway.tls_key_file))
        background = [tasks.create_task(each) for each in beside]
        await parts.feed.wait_first(FIRST_SNAPSHOT_S)
        limits = Limits(body_bytes=gateway.max_body_bytes)
        async with listening(sock, parts.app, limits, grace_s=GRACE_S, tls=tls) as listener:
            background.append(tasks.create_task(parts.observers.keep_saying(parts.feed, listener)))
            offering = tasks.create_task(keep_offering(sock))
            background += [offering, tasks.create_task(_retire(listener, retiring, offering, ending))]
            process.calm_collector()
            url = url_of(sock, gateway.scheme)
            log.info("listens at %s", url)
            process.announce(process.Ready(url))
            await ending.wait()
            log.info("ending")
        for each in background:
            each.cancel()


async def _retire(listener: Listener, told: asyncio.Event, offering: asyncio.Task[None], ending: asyncio.Event) -> None:
    """Once told to: serve those who are here until they leave, then end."""
    await told.wait()
    process.enter_retirement("gateway")
    log.info("retiring")
    offering.cancel()
    with suppress(TimeoutError):
        async with asyncio.timeout(RETIRING_S):
            await listener.retire()
    ending.set()


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


def ongoing_max() -> int:
    """As many requests as there are descriptors for: one to the client, one to the instance."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = soft if soft != resource.RLIM_INFINITY else _DESCRIPTORS_MAX
    return max(1, (most - _DESCRIPTORS_SPARE) // 2)


if __name__ == "__main__":
    sys.exit(main())
