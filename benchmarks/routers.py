"""What is measured: each a context manager that gives a port and the process whose CPU counts."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import msgspec
import psutil

from modelpool.process import READY_FD, Announcement, Ready

Running = tuple[int, psutil.Process]
KEY = "benchmark-key"

_HAPROXY = """
global
    nbthread 1
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend clients
    bind 127.0.0.1:{port}
    default_backend engine
backend engine
    http-reuse always
    server engine 127.0.0.1:{upstream}
"""
_NGINX = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log /dev/null;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    upstream engine {{ server 127.0.0.1:{upstream}; keepalive 64; }}
    server {{
        listen 127.0.0.1:{port};
        keepalive_requests 1000000;
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


@contextmanager
def started(*command: str, stdout: int | None = None, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(command, stdout=stdout, env={**os.environ, **environ})
    try:
        yield child
    finally:
        child.terminate()
        child.wait(10)


@contextmanager
def printing_its_port(*command: str) -> Iterator[Running]:
    """A module of ours that prints the port it listens on."""
    with started(sys.executable, "-m", *command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        yield int(child.stdout.readline()), psutil.Process(child.pid)


@contextmanager
def our_gateway(home: Path) -> Iterator[Running]:
    """The gateway as it runs in a pool: keys on, routing by the snapshot of the manager in `home`."""
    ready = home / "ready"
    with open(ready, "wb") as said:
        os.set_inheritable(said.fileno(), True)
        environ = {
            "MODELPOOL_HOME": str(home),
            "MODELPOOL_API_KEY": KEY,
            "MODELPOOL_LOG_LEVEL": "warning",
            "SERVE_PORT": "0",
            READY_FD: str(said.fileno()),
        }
        child = subprocess.Popen(
            [sys.executable, "-m", "modelpool.gateway"], env={**os.environ, **environ}, pass_fds=(said.fileno(),)
        )
    try:
        _wait_for(lambda: ready.read_bytes().endswith(b"\n"))
        announcement = msgspec.json.decode(ready.read_bytes(), type=Announcement)
        assert isinstance(announcement, Ready), announcement
        yield int(announcement.url.rsplit(":", 1)[1]), psutil.Process(child.pid)
    finally:
        child.terminate()
        child.wait(10)


@contextmanager
def haproxy(upstream: int, folder: Path) -> Iterator[Running]:
    port = _free_port()
    config = folder / "haproxy.cfg"
    config.write_text(_HAPROXY.format(port=port, upstream=upstream))
    with started("haproxy", "-f", str(config)) as child:
        _wait_for(lambda: _listens(port))
        yield port, psutil.Process(child.pid)


@contextmanager
def nginx(upstream: int, folder: Path) -> Iterator[Running]:
    port = _free_port()
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(port=port, upstream=upstream, folder=folder))
    with started("nginx", "-e", "/dev/null", "-c", str(config)) as child:
        _wait_for(lambda: _listens(port))
        yield port, psutil.Process(child.pid).children()[0]


def routers(upstream: int, home: Path) -> dict[str, Callable[[], AbstractContextManager[Running]]]:
    """By name, what can be measured on this machine."""
    found: dict[str, Callable[[], AbstractContextManager[Running]]] = {
        "Model Pool": lambda: our_gateway(home),
        "bare pass-through": lambda: printing_its_port("benchmarks.passthrough", "--upstream", str(upstream)),
    }
    if shutil.which("haproxy"):
        found["HAProxy"] = lambda: haproxy(upstream, home)
    if shutil.which("nginx"):
        found["nginx"] = lambda: nginx(upstream, home)
    return found


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("a router did not start")
        time.sleep(0.02)
