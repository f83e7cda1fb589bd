"""What is measured: each a context manager that gives a port and the processes that count."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil

from benchmarks.keys import KEY
from modelpool import __version__
from modelpool.home import Home
from modelpool.process import READY_FD, Announcement, Ready
from modelpool.tcp import LISTEN_FD, listen_shared

OURS, BARE = "Model Pool", "bare pass-through"
OURS_LIMITED = f"{OURS}, limits"
START_S = 90.0
_STOP_S = 10.0


class Running(NamedTuple):
    """A router that serves."""

    port: int
    processes: tuple[psutil.Process, ...]
    """Their children count too."""
    key: str = KEY


class Upstreams(NamedTuple):
    """The instances to route over."""

    ports: list[int]
    processes: tuple[psutil.Process, ...]

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]


class Router(NamedTuple):
    """What can be started."""

    version: str
    start: Callable[[], AbstractContextManager[Running]]


_HAPROXY = """
global
    nbthread 1
    maxconn 9000
defaults
    mode http
    timeout connect 5s
    timeout client 600s
    timeout server 600s
frontend clients
    bind 127.0.0.1:{port}
    http-request deny deny_status 401 unless {{ req.hdr(authorization) -m str "Bearer {key}" }}
    default_backend engines
backend engines
    balance leastconn
    http-reuse always
    {servers}
"""
_NGINX = """
daemon off;
worker_processes 1;
worker_rlimit_nofile 20000;
pid {folder}/nginx.pid;
error_log /dev/null;
events {{ worker_connections 9000; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream engines {{ least_conn; {servers} keepalive 512; }}
    server {{
        listen 127.0.0.1:{port};
        keepalive_requests 1000000;
        keepalive_timeout 600s;
        location / {{
            if ($http_authorization != "Bearer {key}") {{ return 401; }}
            proxy_pass http://engines;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""
_LITELLM_ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it would be fetched from the internet
    "LITELLM_LOG": "ERROR",
    "LITELLM_MODE": "PRODUCTION",
}


def end_on_sigterm() -> None:
    """For a benchmark's main: told to end, end what was started too. It leads sessions of its own."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def started(
    command: Sequence[str],
    log: Path,
    environ: Mapping[str, str] = {},
    inherits: Sequence[int] = (),
    said: Path | None = None,
) -> Iterator[psutil.Process]:
    """A process in a group of its own, all of which is ended. `said`: for its standard output, if not the log."""
    with open(log, "ab") as errors, open(said or log, "ab") as out:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            env={**os.environ, **environ},
            pass_fds=tuple(inherits),
            start_new_session=True,
        )
    try:
        yield psutil.Process(child.pid)
    finally:
        child.terminate()
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


@contextmanager
def upstreams(folder: Path, *, ports: int = 8, control: Path | None = None) -> Iterator[Upstreams]:
    """Engines that answer at once; with `control` also the manager that says where they are."""
    said, log = folder / f"upstream-{time.monotonic_ns()}", folder / "upstream.log"
    command = [sys.executable, "-m", "benchmarks.upstream", "--ports", str(ports)]
    command += ["--control", str(control)] if control else []
    with started(command, log, said=said) as process:
        _wait_for(lambda: said.read_bytes().endswith(b"\n"), process, log)
        yield Upstreams(msgspec.json.decode(said.read_bytes(), type=list[int]), (process,))


@contextmanager
def gateways(
    home: Path, count: int = 1, *, module: str = "modelpool.gateway", environ: Mapping[str, str] = {}
) -> Iterator[Running]:
    """Gateway processes as they run in a pool: keys on, routing by the snapshot of the manager in `home`.

    Another `module` may have its own way to run them.
    """
    with ExitStack() as stack:
        stack.callback(Home(home).give_back)
        socks = listen_shared("127.0.0.1", 0, count, flag="--port", variable="SERVE_PORT")
        processes = []
        common = {
            "MODELPOOL_HOME": str(home),
            "MODELPOOL_LOG_LEVEL": "warning",
            "MODELPOOL_GATEWAY_PROCESSES": str(count),
            "SERVE_MAX_ONGOING_REQUESTS": "20000",
        }
        for number, sock in enumerate(socks):
            stack.callback(sock.close)
            processes.append(
                stack.enter_context(_gateway(home, sock, f"{count}-{number}", module, {**common, **environ}))
            )
        yield Running(socks[0].getsockname()[1], tuple(processes))


@contextmanager
def _gateway(
    home: Path, sock: socket.socket, name: str, module: str, environ: Mapping[str, str]
) -> Iterator[psutil.Process]:
    ready = home / f"ready-{name}"
    with open(ready, "wb") as said:
        fds = {LISTEN_FD: str(sock.fileno()), READY_FD: str(said.fileno())}
        inherits = (said.fileno(), sock.fileno())
        log = home / "gateway.log"
        with started([sys.executable, "-m", module], log, {**environ, **fds}, inherits) as process:
            _wait_for(lambda: ready.read_bytes().endswith(b"\n"), process, log)
            announcement = msgspec.json.decode(ready.read_bytes(), type=Announcement)
            assert isinstance(announcement, Ready), announcement
            yield process


@contextmanager
def bare(engines: Upstreams, folder: Path) -> Iterator[Running]:
    said, log = folder / "bare", folder / "bare.log"
    command = [sys.executable, "-m", "benchmarks.passthrough", "--upstream", str(engines.ports[0])]
    with started(command, log, said=said) as process:
        _wait_for(lambda: said.read_bytes().endswith(b"\n"), process, log)
        yield Running(int(said.read_text()), (process,))


@contextmanager
def haproxy(engines: Upstreams, folder: Path, binary: str) -> Iterator[Running]:
    port = _free_port()
    servers = "\n    ".join(f"server engine{each} 127.0.0.1:{each}" for each in engines.ports)
    config = folder / "haproxy.cfg"
    config.write_text(_HAPROXY.format(port=port, servers=servers, key=KEY))
    with _listening([binary, "-f", str(config)], port, folder / "haproxy.log") as process:
        yield Running(port, (process,))


@contextmanager
def nginx(engines: Upstreams, folder: Path, binary: str) -> Iterator[Running]:
    port = _free_port()
    servers = " ".join(f"server 127.0.0.1:{each};" for each in engines.ports)
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(port=port, servers=servers, folder=folder, key=KEY))
    with _listening([binary, "-e", "/dev/null", "-c", str(config)], port, folder / "nginx.log") as process:
        yield Running(port, (process,))


@contextmanager
def rust_router(engines: Upstreams, folder: Path, binary: str, *arguments: str) -> Iterator[Running]:
    """vllm-router or sglang-router, which has almost the same options."""
    port, name = _free_port(), Path(binary).name
    command = [binary, *arguments, "--host", "127.0.0.1", "--port", str(port), "--policy", "cache_aware"]
    command += ["--api-key", KEY, "--prometheus-host", "127.0.0.1", "--prometheus-port", str(_free_port())]
    command += ["--worker-startup-check-interval", "1", "--worker-urls", *engines.urls]
    with _listening(command, port, folder / f"{name}.log") as process:
        yield Running(port, (process,))


@contextmanager
def litellm(engines: Upstreams, folder: Path, binary: str) -> Iterator[Running]:
    port = _free_port()
    deployments = [
        {"model_name": "m", "litellm_params": {"model": "openai/m", "api_base": f"{url}/v1", "api_key": "none"}}
        for url in engines.urls
    ]
    config = folder / "litellm.yaml"  # JSON is YAML
    config.write_bytes(msgspec.json.encode({"model_list": deployments, "general_settings": {"master_key": KEY}}))
    command = [binary, "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
    with _listening(command, port, folder / "litellm.log", _LITELLM_ENVIRONMENT) as process:
        yield Running(port, (process,))


def routers(engines: Upstreams, home: Home, folder: Path, rivals: Path | None) -> tuple[dict[str, Router], list[str]]:
    """By name, what can be measured on this machine; and the names of what is not installed."""
    found = {
        OURS: Router(__version__, lambda: gateways(home.path)),
        BARE: Router("", lambda: bare(engines, folder)),
    }
    missing: list[str] = []
    for name, command, start in (
        ("HAProxy", "haproxy", haproxy),
        ("nginx", "nginx", nginx),
        ("vllm-router", "vllm-router", rust_router),
        ("sglang-router", "sglang-router", _sglang_router),
        ("LiteLLM", "litellm", litellm),
    ):
        binary = _which(command, rivals)
        if binary:
            found[name] = Router(_version(binary), partial(start, engines, folder, binary))
        else:
            missing.append(name)
    return found, missing


def _sglang_router(engines: Upstreams, folder: Path, binary: str) -> AbstractContextManager[Running]:
    return rust_router(engines, folder, binary, "launch")


def _which(command: str, rivals: Path | None) -> str | None:
    """In the folder of rivals, or in its `bin`, or on the PATH, or where Debian puts servers."""
    folders = [] if rivals is None else [str(rivals), str(rivals / "bin")]
    return shutil.which(command, path=os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/sbin"]))


def _version(binary: str) -> str:
    """As pip knows it, else as the program says it."""
    path = Path(binary).resolve()
    name = path.name.replace("-", "_")
    for folder in path.parent.parent.glob(f"lib/python*/site-packages/{name}-*.dist-info"):
        return folder.name.removesuffix(".dist-info").rpartition("-")[2]
    done = subprocess.run([binary, "-v"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    number = re.search(r"\d+(\.\d+)+", done.stdout)
    return number[0] if number else ""


@contextmanager
def _listening(
    command: Sequence[str], port: int, log: Path, environ: Mapping[str, str] = {}
) -> Iterator[psutil.Process]:
    with started(command, log, environ) as process:
        _wait_for(lambda: _listens(port), process, log)
        yield process


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _wait_for(condition: Callable[[], bool], process: psutil.Process, log: Path | None = None) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > deadline or process.status() == psutil.STATUS_ZOMBIE:
            said = log.read_text(errors="replace")[-2000:] if log else ""
            raise RuntimeError(f"{log.stem if log else 'a process'} did not start. {said}")
        time.sleep(0.02)
