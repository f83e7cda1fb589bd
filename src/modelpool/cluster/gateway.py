"""The gateway as a Ray Serve deployment: one replica on every node, which carries no request."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from modelpool.cluster import APPLICATION, GATEWAY
from modelpool.cluster.node import Node
from modelpool.messages.cluster import Deployment

_END_S = 30.0


class Gateway:
    """Holds the Node. Ray Serve starts it again when its health check fails, or its process dies."""

    async def __init__(self, deployment: bytes) -> None:  # type: ignore[misc]
        context = ray.get_runtime_context()
        self._node = Node(
            msgspec.json.decode(deployment, type=Deployment), context.get_node_id(), ray.util.get_node_ip_address()
        )
        self._running = asyncio.create_task(self._node.run())
        ready = asyncio.create_task(self._node.ready.wait())
        await asyncio.wait((self._running, ready), return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        self.check_health()

    def check_health(self) -> None:
        """Raises what the node's part ended with."""
        if self._running.done():
            self._running.result()
            raise RuntimeError("the gateway's part on this node has ended")

    def __call__(self, *_: Any) -> None:
        """No request comes by here."""

    async def __del__(self) -> None:
        """Ray Serve has this replica end. The gateways end where the application goes; else a successor adopts them."""
        self._node.leave()
        await asyncio.wait((self._running,))
        if await asyncio.to_thread(_application_goes):
            await self._node.end_gateways()


def _application_goes() -> bool:
    application = serve.status().applications.get(APPLICATION)
    return application is None or application.status is ApplicationStatus.DELETING


# Not as a decorator: a class that its module has under its name goes to the nodes as that name, and is their code's.
GATEWAYS = serve.deployment(
    name=GATEWAY,
    max_replicas_per_node=1,
    ray_actor_options={"num_cpus": 0},
    health_check_period_s=5,
    health_check_timeout_s=15,
    graceful_shutdown_timeout_s=_END_S,
)(Gateway)
