"""TCP addresses that our services listen on."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping

from modelpool.process import StartupError

BACKLOG = 4096
LISTEN_FD = "MODELPOOL_LISTEN_FD"


def listen_shared(host: str, port: int, count: int, *, flag: str, variable: str) -> list[socket.socket]:
    """So many listening sockets at one address, over which the kernel spreads connections. Raises as `bind_tcp`.

    Bound to itself alone first: sharing a port with a stranger of the same user would not be refused.
    """
    socks = [bind_tcp(host, port, flag=flag, variable=variable)]
    if count > 1:
        port = socks[0].getsockname()[1]
        socks[0].close()
        socks = [bind_tcp(host, port, flag=flag, variable=variable, shared=True) for _ in range(count)]
    for sock in socks:
        sock.listen(BACKLOG)
    return socks


def inherited(environ: Mapping[str, str] = os.environ) -> socket.socket | None:
    """The socket that the parent of this process opened for it, if it did."""
    fd = environ.get(LISTEN_FD)
    return socket.socket(fileno=int(fd)) if fd else None


def bind_tcp(host: str, port: int, *, flag: str, variable: str, shared: bool = False) -> socket.socket:
    """A bound, not yet listening TCP socket. Raises StartupError that names the flag and variable to change.

    `flag` and `variable` are the port's; the address has the same names with `host`.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise StartupError(
                f"{host}:{port} is taken by another process.", f"End it, or use another port: {flag}, {variable}."
            ) from error
        if error.errno == errno.EACCES:
            raise StartupError(f"{host}:{port} needs privileges.", f"Use a port above 1023: {flag}.") from error
        raise StartupError(
            f"{host}:{port} cannot be listened on: {error.strerror}.",
            f"Name an address of this machine: {flag.replace('port', 'host')}, {variable.replace('PORT', 'HOST')}.",
        ) from error
    return sock


def url_of(sock: socket.socket, scheme: str = "http") -> str:
    """`http://host:port` of a bound socket, as this machine reaches it."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
