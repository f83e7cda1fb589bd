"""The addresses of a worker: where it listens, where others reach it, where its hosts listen."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

_ANY = frozenset({"0.0.0.0", "::", ""})


def reachable_host(host: str, manager_url: str) -> str:
    """`host`, or where that means every address: the one that this machine has towards the manager."""
    if host not in _ANY:
        return host
    peer = urlsplit(manager_url).hostname
    if manager_url.startswith("unix:") or not peer:
        return "127.0.0.1"
    family = socket.AF_INET6 if host == "::" else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))  # sends nothing: it only makes the kernel choose a route
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostbyname(socket.gethostname())


def local_host(host: str) -> str:
    """Where this machine itself reaches what listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def hosts_bind(worker_host: str, *, direct: bool) -> str:
    """Where engine hosts listen: as the worker does, or on loopback where all go through its proxy."""
    if direct:
        return worker_host
    return "::1" if _is_ipv6(worker_host) else "127.0.0.1"


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
