"""The gateway processes of one node: adopted from a predecessor or started, kept running, ended.

Those of other code or settings retire once there are others in their place: they take no connection any more, serve
those that they have, and end when these have.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import urlsplit

import msgspec

from modelpool.children import Child, child_environ, ended_in_time
from modelpool.cluster.code import running_code
from modelpool.cluster.head import TAG
from modelpool.gateway.handover import taken_over
from modelpool.home import Home
from modelpool.process import DETACHED, is_retiring
from modelpool.process_group import ProcessGroup, reap
from modelpool.process_table import values_of, with_variable
from modelpool.settings import Settings
from modelpool.tcp import BACKLOG, bind_tcp

log = logging.getLogger(__name__)

_VERSION = "MODELPOOL_GATEWAY_VERSION"


class NodeGateways:
    """They outlive whoever started them; `url` is where a predecessor's serve, if there was one.

    Each has a socket of its own, all at one address (SO_REUSEPORT), opened when the first process of that number is
    started, and handed on: one that nobody accepts from would be given its part of the connections.
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
        self._children = {
            number: Child(
                "gateway",
                environ,
                home.gateway_log(number),
                log.warning,
                listen=lambda number=number: self._socket(number),  # type: ignore[misc]
                tag=_tag(home, number),
            )
            for number in range(1, settings.gateway.processes + 1)
        }

    @property
    def url(self) -> str:
        return self._children[1].url

    async def start(self) -> None:
        """Adopt those that run, start the others. Those of another deployment give way to new ones. StartupError."""
        left = {pid: number for pid, number in _gateways_of(self._home).items() if not is_retiring(pid)}
        if not left:  # sharing a port with a stranger of the same user would not be refused
            self._bind(shared=False).close()
        current = with_variable(_VERSION, self._version)
        for number, child in self._children.items():
            before = sorted((pid for pid, its in left.items() if its == number), key=lambda pid: pid in current)
            if before:
                await self._take_over(number, before[-1])
            if before and before[-1] in current and _adopted(child, before[-1], self._left_at):
                log.info("adopted the gateway process %s", child.pid)
            else:
                await child.start()
                log.info("started the gateway process %s at %s, after %s", child.pid, child.url, before or "none")
        for group in self._others():
            group.retire()
            group.close()

    async def _take_over(self, number: int, pid: int) -> None:
        """Have the socket of that process, if it gives it, and it is at the address that we are to serve."""
        sock = await asyncio.to_thread(taken_over, pid)
        if sock is not None and self._is_ours(sock):
            self._sockets[number] = sock

    def _others(self) -> list[ProcessGroup]:
        """All gateway processes of this home that are none of the children."""
        children = [child.pid for child in self._children.values()]
        return _groups(pid for pid in _gateways_of(self._home) if pid not in children)

    async def keep(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for child in self._children.values():
                tasks.create_task(child.keep())

    async def end(self) -> None:
        others = self._others()
        await asyncio.gather(*(child.end() for child in self._children.values()), *map(ended_in_time, others))
        await asyncio.to_thread(end_left_behind, self._home)
        self._home.give_back()

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

    def _is_ours(self, sock: socket.socket) -> bool:
        """Whether it listens where these settings say."""
        host, port = sock.getsockname()[:2]
        with suppress(OSError):
            found = socket.getaddrinfo(self._gateway.host or "0.0.0.0", self._port, type=socket.SOCK_STREAM)
            if (host, port) in [address[:2] for *_, address in found]:
                return True
        sock.close()
        return False

    def _bind(self, *, shared: bool) -> socket.socket:
        return bind_tcp(self._gateway.host, self._port, flag="--port", variable="SERVE_PORT", shared=shared)


def end_left_behind(home: Home) -> None:
    """Kill the gateway processes of a home that nobody looks after any more."""
    for number in set(_gateways_of(home).values()):
        reap(DETACHED, _tag(home, number))


def _gateways_of(home: Home) -> dict[int, int]:
    """The numbers of all gateway processes of this home, by their process ids."""
    prefix = _tag(home, "")
    tags = values_of(DETACHED).items()
    return {pid: int(tag.removeprefix(prefix)) for pid, tag in tags if tag.startswith(prefix)}


def _adopted(child: Child, pid: int, url: str) -> bool:
    try:
        child.adopt(pid, url)
    except ProcessLookupError:
        return False
    return True


def _groups(pids: Iterable[int]) -> list[ProcessGroup]:
    """Without those that have ended."""
    found = []
    for pid in pids:
        with suppress(ProcessLookupError):
            found.append(ProcessGroup(pid))
    return found


def _tag(home: Home, number: int | str) -> str:
    return f"{home.path}:gateway-{number}"


def _version_of(settings: Settings) -> str:
    """The same for gateway processes that need not be replaced by one another."""
    used = (running_code(), settings.gateway, settings.token, settings.log_level)
    return hashlib.sha256(msgspec.json.encode(used)).hexdigest()[:16]
