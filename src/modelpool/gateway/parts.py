"""The parts of a gateway process, put together."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from typing import NamedTuple

from modelpool.core.admission import Bounds
from modelpool.gateway.app import GatewayApp
from modelpool.gateway.auth import Access, is_loopback
from modelpool.gateway.control import Control
from modelpool.gateway.cors import Cors
from modelpool.gateway.demand import DemandReporter
from modelpool.gateway.hold import Room, Rules
from modelpool.gateway.inference import Inference
from modelpool.gateway.inflight import SharedInflight
from modelpool.gateway.instances import Instances
from modelpool.gateway.keys import KeyRing
from modelpool.gateway.limiter import Limiter
from modelpool.gateway.observe.observers import Observers, observing
from modelpool.gateway.realtime import Realtime
from modelpool.gateway.responses import Responses
from modelpool.gateway.shared import Node, joined
from modelpool.gateway.snapshots import SnapshotFeed
from modelpool.gateway.stored import StoredResponses
from modelpool.gateway.table import Table
from modelpool.home import Home
from modelpool.messages.routing import Others
from modelpool.relay import Deadlines, Endpoint, Pools
from modelpool.settings import GatewaySettings, Settings


class Parts(NamedTuple):
    """What answers requests, and what goes on beside it."""

    app: GatewayApp
    node: Node
    feed: SnapshotFeed
    demand: DemandReporter
    observers: Observers


@asynccontextmanager
async def assembled(settings: Settings, home: Home, *, max_ongoing: int) -> AsyncIterator[Parts]:
    """Left, their connections and shared memory are closed, and what was observed is written."""
    gateway = settings.gateway
    token = settings.token or home.cluster_token()
    cors = Cors.parse(gateway.cors_allowed_origins)
    keys = KeyRing()
    access = _access(gateway, home.admin_key(), token, keys, cors)
    async with AsyncExitStack() as stack:
        node = stack.enter_context(joined(home.shared_memory()))
        upstreams = stack.enter_context(closing(Pools(connect_timeout_s=gateway.connect_timeout_s)))
        controls = stack.enter_context(closing(Pools(connect_timeout_s=gateway.connect_timeout_s)))
        control = controls.pool(Endpoint.unix(home.control_socket))
        instances = Instances(upstreams, token, SharedInflight(node) if gateway.processes > 1 else None)
        table = Table(instances)
        room = Room(table, _rules(gateway, max_ongoing))
        limiter = Limiter(node)
        keys.when_gone(limiter.forget)
        demand = DemandReporter(table, room, control, limiter, node=node.name)

        def hear(others: Others) -> None:
            less = instances.hear(others)
            limiter.hear(others)
            room.look_again()
            if less:
                room.wanted.set()  # other nodes wait to hear that it is theirs now

        feed = SnapshotFeed(table, keys, control, gateway=demand.gateway, hear=hear)
        stored = StoredResponses(gateway.responses_remembered)
        inference = Inference(table, room, stored, limiter, _deadlines(gateway))
        responses = Responses(table, inference, stored)
        realtime = Realtime(table, room, limiter, connect_timeout_s=gateway.connect_timeout_s)
        observers = await stack.enter_async_context(observing(node, table, instances, gateway, home.logs))
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
        yield Parts(app, node, feed, demand, observers)


def _access(gateway: GatewaySettings, admin_key: str, token: str, keys: KeyRing, cors: Cors) -> Access:
    return Access(
        api_key=gateway.api_key,
        admin_key=admin_key,
        cluster_token=token,
        local=is_loopback(gateway.host),
        keys=keys,
        require_key=gateway.require_key,
        cors=cors,
    )


def _rules(gateway: GatewaySettings, max_ongoing: int) -> Rules:
    return Rules(
        max_ongoing=max_ongoing,
        max_wait_s=gateway.waiting_max_s,
        bounds=Bounds(tickets=gateway.waiting_max_requests, bytes=gateway.waiting_max_bytes),
        heartbeat_s=gateway.waiting_heartbeat_s,
    )


def _deadlines(gateway: GatewaySettings) -> Deadlines:
    limits = gateway.first_byte_timeout_s, gateway.between_bytes_timeout_s, gateway.total_timeout_s
    return Deadlines(*(each or math.inf for each in limits))
