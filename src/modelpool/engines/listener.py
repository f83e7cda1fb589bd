"""The address of a host."""

from __future__ import annotations

import errno
import socket

_BACKLOG = 2048


class NoFreePort(Exception):
    """No port of the range can be listened on. The text says which range."""


def listen(bind: str, ports: tuple[int, int]) -> socket.socket:
    """A socket that listens on `bind`: on any free port for (0, 0), else on the first free one of the range.

    It listens at once: until then another process could bind the same port. Raises NoFreePort, or OSError for an
    address that this machine does not have.
    """
    first, last = ports
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    for port in range(first, last + 1):
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((bind, port))
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            continue
        return sock
    raise NoFreePort(f"no free port from {first} to {last} on {bind} (WORKER_PORT_RANGE)")
