"""What a gateway's replica does on its node: it owns the control socket, and looks after the gateway processes."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack, suppress

from modelpool.cluster.gateways import NodeGateways
from modelpool.cluster.place import at_node
from modelpool.cluster.remote import RayManager
from modelpool.control_http import Server, bind_control_socket
from modelpool.errors import ManagerAway
from modelpool.gateway.auth import check_exposure
from modelpool.home import AlreadyRunning, Home
from modelpool.manager.api import control_app
from modelpool.messages.cluster import POLL_S, Deployment, NodeReport
from modelpool.pool_address import address_file, local_address, write_address
from modelpool.process import StartupError

log = logging.getLogger(__name__)

_PREDECESSOR_S = 40.0
"""How long a predecessor on this node may take to end."""
_RETRY_S = 0.2


class Node:
    """One node's part of the pool, while `run` runs."""

    def __init__(self, deployment: Deployment, node_id: str, node_ip: str) -> None:
        self._settings, self._home = at_node(deployment, "node")
        self._node_id = node_id
        self._node_ip = node_ip
        self._manager = RayManager()
        self._gateways: NodeGateways | None = None
        self.ready = asyncio.Event()
        self._ending = asyncio.Event()

    async def run(self) -> None:
        """Until `end` or `leave`. Whatever goes wrong is raised, and leaves the gateways to a successor."""
        check_exposure(self._settings.gateway)
        with ExitStack() as stack:
            await _take_place(stack, self._home)
            async with asyncio.TaskGroup() as tasks:
                server = Server(control_app(self._manager))
                sock = bind_control_socket(self._home.control_socket)
                sock.listen(256)
                serving = tasks.create_task(server.serve([sock]))
                left = local_address(self._settings)
                self._gateways = NodeGateways(self._settings, self._home, left.url if left else "")
                stack.callback(self._gateways.close)
                await self._gateways.start()
                write_address(self._settings, self._gateways.url)
                background = [tasks.create_task(self._gateways.keep()), tasks.create_task(self._keep_saying())]
                self.ready.set()
                await self._ending.wait()
                for task in background:
                    task.cancel()
                await asyncio.gather(*background, return_exceptions=True)
                server.should_exit = server.force_exit = True
                await serving
                self._home.control_socket.unlink(missing_ok=True)

    def leave(self) -> None:
        """Have `run` return. The gateways serve on."""
        self._ending.set()

    async def end_gateways(self) -> None:
        """After `run` has returned."""
        if self._gateways is not None:
            address_file(self._settings).unlink(missing_ok=True)
            await self._gateways.end()

    async def _keep_saying(self) -> None:
        """Tell the manager, until cancelled, that workers may come to this node's gateway."""
        assert self._gateways is not None
        report = NodeReport(node_id=self._node_id, url=self._reached_at(self._gateways.url))
        while True:
            with suppress(ManagerAway):
                await self._manager.here(report)
            await asyncio.sleep(POLL_S)

    def _reached_at(self, url: str) -> str:
        """The gateway's URL as other nodes use it."""
        if self._settings.gateway.host not in ("", "0.0.0.0", "::"):
            return url
        scheme, _, rest = url.partition("://")
        host = f"[{self._node_ip}]" if ":" in self._node_ip else self._node_ip
        return f"{scheme}://{host}:{rest.rsplit(':', 1)[1]}"


async def _take_place(stack: ExitStack, home: Home) -> None:
    """Hold this home's lock, after whoever has it. Raises StartupError where that takes too long."""
    try:
        async with asyncio.timeout(_PREDECESSOR_S):
            while True:
                try:
                    stack.enter_context(home.lock("up"))
                    return
                except AlreadyRunning as error:
                    holder = error
                    await asyncio.sleep(_RETRY_S)
    except TimeoutError:
        raise StartupError(
            f"{holder} in the home {home.path}.",
            "A home belongs to one machine: give each node its own with MODELPOOL_HOME in the environment of its Ray.",
        ) from None
