"""TCP addresses that our services listen on."""

from __future__ import annotations

import errno
import socket

from modelpool.process import StartupError


def bind_tcp(host: str, port: int, *, flag: str, variable: str) -> socket.socket:
    """A bound, not yet listening TCP socket. Raises StartupError that names the flag and variable to change.

    `flag` and `variable` are the port's; the address has the same names with `host`.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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


def url_of(sock: socket.socket) -> str:
    """`http://host:port` of a bound socket, as this machine reaches it."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
