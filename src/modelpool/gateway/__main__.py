"""`python -m modelpool.gateway`: the gateway as a process."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import resource
import signal
import socket
import ssl
import sys
from contextlib import AsyncExitStack, closing

import uvloop

from modelpool import process
from modelpool.core.admission import Bounds
from modelpool.gateway.app import GatewayApp
from modelpool.gateway.auth import Access, check_exposure, is_loopback
from modelpool.gateway.client_limits import Limits
from modelpool.gateway.control import Control
from modelpool.gateway.cors import Cors
from modelpool.gateway.demand import DemandReporter
from modelpool.gateway.hold import Room, Rules
from modelpool.gateway.inference import Inference
from modelpool.gateway.inflight import SharedInflight
from modelpool.gateway.instances import Instances
from modelpool.gateway.keys import KeyRing
from modelpool.gateway.limiter import Limiter
from modelpool.gateway.listener import listening
from modelpool.gateway.observe.observers import observing
from modelpool.gateway.realtime import Realtime
from modelpool.gateway.responses import Responses
from modelpool.gateway.shared import joined
from modelpool.gateway.snapshots import SnapshotFeed
from modelpool.gateway.stored import StoredResponses
from modelpool.gateway.table import Table
from modelpool.home import Home
from modelpool.messages.routing import Others
from modelpool.relay import Deadlines, Endpoint, Pools
from modelpool.settings import GatewaySettings, Settings, SettingsError, from_environment
from modelpool.tcp import bind_tcp, inherited, url_of
from modelpool.tls import keep_current, server_context

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""What is being served gets this long to finish."""
FIRST_SNAPSHOT_S = 2.0
"""Who connects waits for so long at first, until it is known which models there are."""
_DESCRIPTORS_SPARE = 512
"""For those who wait, connections that idle, the manager, the log."""
_DESCRIPTORS_MAX = 1 << 20
_COLLECT = 5_000, 10, 100
"""The young objects' collection takes 1 ms, the next one's 10 ms; a full one comes after five million new objects."""


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
    """Serve until SIGTERM or SIGINT, and then until what is being served has ended, or a second signal came."""
    gateway = settings.gateway
    token = settings.token or home.cluster_token()
    keys = KeyRing()
    cors = Cors.parse(gateway.cors_allowed_origins)
    access = Access(
        api_key=gateway.api_key,
        admin_key=home.admin_key(),
        cluster_token=token,
        local=is_loopback(gateway.host),
        keys=keys,
        require_key=gateway.require_key,
        cors=cors,
    )
    ending = ending_signal()
    async with AsyncExitStack() as stack:
        node = stack.enter_context(joined(home.shared_memory()))
        upstreams = stack.enter_context(closing(Pools(connect_timeout_s=gateway.connect_timeout_s)))
        controls = stack.enter_context(closing(Pools(connect_timeout_s=gateway.connect_timeout_s)))
        control = controls.pool(Endpoint.unix(home.control_socket))
        instances = Instances(upstreams, token, SharedInflight(node) if gateway.processes > 1 else None)
        table = Table(instances)
        room = Room(table, _rules(gateway))
        limiter = Limiter(node)
        keys.when_gone(limiter.forget)
        demand = DemandReporter(table, room, control, limiter, node=node.name)

        def hear(others: Others) -> None:
            instances.hear(others.inflight)
            limiter.hear(others)

        feed = SnapshotFeed(table, keys, control, gateway=demand.gateway, hear=hear)
        stored = StoredResponses(gateway.responses_remembered)
        inference = Inference(table, room, stored, limiter, _deadlines(gateway))
        observers = await stack.enter_async_context(observing(node, table, instances, gateway, home.logs))
        responses = Responses(table, inference, stored)
        realtime = Realtime(table, room, limiter, connect_timeout_s=gateway.connect_timeout_s)
        app = GatewayApp(
            access,
            table,
            feed,
            inference,
            responses,
            realtime,
            Control(control),
            observers,
            cors=cors,
            root_path=gateway.root_path,
        )
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        background = [tasks.create_task(feed.follow()), tasks.create_task(node.keep_reaping())]
        background.append(tasks.create_task(demand.keep_reporting()))
        if tls is not None:
            renewing = keep_current(tls, gateway.tls_cert_file, gateway.tls_key_file)
            background.append(tasks.create_task(renewing))
        await feed.wait_first(FIRST_SNAPSHOT_S)
        limits = Limits(body_bytes=gateway.max_body_bytes)
        async with listening(sock, app, limits, grace_s=GRACE_S, tls=tls) as listener:
            background.append(tasks.create_task(observers.keep_saying(feed, listener)))
            calm_collector()
            process.announce(process.Ready(url_of(sock, gateway.scheme)))
            await ending.wait()
            log.info("ending")
        for each in background:
            each.cancel()


def _rules(gateway: GatewaySettings) -> Rules:
    return Rules(
        max_ongoing=gateway.max_ongoing_requests or ongoing_max(),
        max_wait_s=gateway.waiting_max_s,
        bounds=Bounds(tickets=gateway.waiting_max_requests, bytes=gateway.waiting_max_bytes),
        heartbeat_s=gateway.waiting_heartbeat_s,
    )


def _deadlines(gateway: GatewaySettings) -> Deadlines:
    limits = gateway.first_byte_timeout_s, gateway.between_bytes_timeout_s, gateway.total_timeout_s
    return Deadlines(*(each or math.inf for each in limits))


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


def calm_collector() -> None:
    """Have cycles looked for rarely: a full look at nine thousand streams stops them all for a quarter of a second.

    What is there by now stays for good and is looked at no more. Requests and connections leave no cycles behind,
    unless they fail.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT)


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
