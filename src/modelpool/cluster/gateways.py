"""The gateway processes of one node: adopted from a predecessor or started, kept running, ended."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
from itertools import count
from urllib.parse import urlsplit

import msgspec

from modelpool import __version__
from modelpool.children import Child, child_environ
from modelpool.cluster.head import TAG
from modelpool.home import Home
from modelpool.process import DETACHED
from modelpool.process_group import reap
from modelpool.process_table import with_variable
from modelpool.settings import Settings
from modelpool.tcp import BACKLOG, bind_tcp

log = logging.getLogger(__name__)

_VERSION = "MODELPOOL_GATEWAY_VERSION"


class NodeGateways:
    """They outlive whoever started them; `url` is where a predecessor's serve, if there was one.

    Sockets are shared with SO_REUSEPORT, and opened only where a process is started: one that nobody accepts from would
    be given its part of the connections.
    """

    def __init__(self, settings: Settings, home: Home, url: str = "") -> None:
        self._home = home
        self._gateway = settings.gateway
        self._port = settings.gateway.port or urlsplit(url).port or 0
        self._sockets: dict[int, socket.socket] = {}
        self._left_at = url
        environ = child_environ(settings, f"unix:{home.control_socket}")
        environ.pop(TAG, None)  # no part of Ray: they go on without it
        self._version = environ[_VERSION] = _version_of(settings)
        self._children = [
            Child(
                "gateway",
                environ,
                home.gateway_log(number),
                log.warning,
                listen=lambda number=number: self._socket(number),  # type: ignore[misc]
                tag=_tag(home, number),
            )
            for number in range(1, settings.gateway.processes + 1)
        ]

    @property
    def url(self) -> str:
        return self._children[0].url

    async def start(self) -> None:
        """Adopt those that run, start the others. Those of another deployment give way to new ones. StartupError."""
        current = with_variable(_VERSION, self._version)
        adopted = [child for child in self._children if child.adopt(self._left_at)]
        if not adopted:  # sharing a port with a stranger of the same user would not be refused
            self._bind(shared=False).close()
        for child in self._children:
            if child not in adopted:
                await child.start()
                log.info("started the gateway process %s at %s", child.pid, child.url)
            elif child.pid not in current:
                await child.replace()
                log.info("replaced a gateway process by %s at %s", child.pid, child.url)
            else:
                log.info("adopted the gateway process %s", child.pid)

    async def keep(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for child in self._children:
                tasks.create_task(child.keep())

    async def end(self) -> None:
        await asyncio.gather(*(child.end() for child in self._children))
        await asyncio.to_thread(end_left_behind, self._home)
        self._home.drop_shared_memory()

    def close(self) -> None:
        """Give up our copies of the sockets; the processes have their own."""
        for sock in self._sockets.values():
            sock.close()

    def _socket(self, number: int) -> socket.socket:
        """A copy of a child's socket, which is opened when it is first asked for and stays through restarts."""
        if number not in self._sockets:
            sock = self._bind(shared=True)
            sock.listen(BACKLOG)
            self._port = sock.getsockname()[1]
            self._sockets[number] = sock
        return self._sockets[number].dup()

    def _bind(self, *, shared: bool) -> socket.socket:
        return bind_tcp(self._gateway.host, self._port, flag="--port", variable="SERVE_PORT", shared=shared)


def end_left_behind(home: Home) -> None:
    """Kill the gateway processes of a home that nobody looks after any more."""
    for number in count(1):
        if not reap(DETACHED, _tag(home, number)):
            return


def _tag(home: Home, number: int) -> str:
    return f"{home.path}:gateway-{number}"


def _version_of(settings: Settings) -> str:
    """The same for gateway processes that need not be replaced by one another."""
    used = (__version__, settings.gateway, settings.token, settings.log_level)
    return hashlib.sha256(msgspec.json.encode(used)).hexdigest()[:16]
