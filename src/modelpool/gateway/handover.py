"""A listening socket goes from a gateway process to its successor, by a Unix socket that only they know.

Each with a socket of its own at one address would not do: with the one that is closed go the connections that nobody
has accepted yet, and those whose handshake is still under way.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct

log = logging.getLogger(__name__)

_DEADLINE_S = 5.0
_PAUSE_S = 0.1
"""Until the next one is taken where that just failed, as while there are no descriptors."""
_CREDENTIALS = struct.Struct("3i")


async def keep_offering(sock: socket.socket) -> None:
    """Give `sock` to whoever of this user asks, until cancelled."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as offer:
        try:
            offer.bind(_address(os.getpid()))
        except OSError as error:
            log.warning("a successor will have to open a socket of its own: %s", error)
            return
        offer.listen()
        offer.setblocking(False)
        while True:
            try:
                asking, _ = await loop.sock_accept(offer)
            except OSError as error:
                log.warning("a successor that asks for the socket cannot be heard: %s", error)
                await asyncio.sleep(_PAUSE_S)
            else:
                _give(sock, asking)


def _give(sock: socket.socket, asking: socket.socket) -> None:
    """Whatever becomes of a successor is no harm to whom it succeeds."""
    with asking:
        try:
            if _user(asking) == os.getuid():
                socket.send_fds(asking, [b"\0"], [sock.fileno()])
        except OSError as error:
            log.warning("a successor asked for the socket and did not take it: %s", error)


def taken_over(pid: int) -> socket.socket | None:
    """The listening socket of that gateway process, which has it too. None where it gives none. Blocks for seconds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(_DEADLINE_S)
        try:
            asking.connect(_address(pid))
            if _user(asking) != os.getuid():
                return None
            _, descriptors, _, _ = socket.recv_fds(asking, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return None
    return socket.socket(fileno=descriptors[0]) if descriptors else None


def _address(pid: int) -> bytes:
    """No file, so it goes with the process."""
    return f"\0modelpool-gateway-{pid}".encode()


def _user(peer: socket.socket) -> int:
    """Whose process it is."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])
