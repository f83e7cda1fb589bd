"""A worker as its pool runs it: a process, with a home of its own; and a stand-in for its manager."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import httpx

from modelpool.process import Announcement, Ready
from modelpool.process_group import reap
from modelpool.process_table import with_variable
from modelpool.worker.host_spec import TAG
from tests.part_process import part_process
from tests.promised import promised

Json = dict[str, Any]
T = TypeVar("T")
TOKEN = "the-cluster-token"
NOBODY = "http://127.0.0.1:1"
"""A manager's address where nobody listens."""


def eventually(look: Callable[[], T | None], within: float = 10.0) -> T:
    """The first value of `look` that is neither None nor False. Fails when there is none in time (see `promised`)."""
    deadline = time.monotonic() + promised(within)
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {within} s"
        time.sleep(0.02)
    return found


class WorkerProcess:
    """A running worker, seen from outside."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, tag: str) -> None:
        self.process = process
        self.url = url
        self.tag = tag
        self.http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30, trust_env=False
        )

    def order(self, alias: str, instance: str = "", **model: Any) -> httpx.Response:
        body = {"model": {"alias": alias, "fake": True, **model}, "instance": instance}
        return self.http.post("/instances/start", json=body)

    def start(self, alias: str, instance: str = "", **model: Any) -> Json:
        """The report once it is ACTIVE."""
        answer = self.order(alias, instance, **model)
        assert answer.status_code == 200, answer.text
        return self.wait(instance or alias, "ACTIVE")

    def wait(self, instance: str, state: str, within: float = 10.0) -> Json:
        """The report once it is in this state, and, where it runs, was measured."""

        def there() -> Json | None:
            report = self.report(instance)
            measured = state != "ACTIVE" or report.get("pss_bytes")
            return report if report.get("state") == state and measured else None

        return eventually(there, within)

    def report(self, instance: str) -> Json:
        report: Json = self.http.get(f"/instances/{instance}").json()
        return report

    def instances(self) -> set[str]:
        return {each["instance"] for each in self.http.get("/instances").json()["instances"]}

    def status(self, instance: str) -> Json:
        status: Json = self.http.get(f"/instances/{instance}/status").json()
        return status

    def stop(self, instance: str) -> Json:
        """The answer to the order, once the instance is gone."""
        answer = self.http.post(f"/instances/{instance}/stop")
        assert answer.status_code == 200, answer.text
        eventually(lambda: instance not in self.instances(), 20)
        report: Json = answer.json()
        return report

    def below(self, title: str = "") -> list[int]:
        """The ids of all processes that it is to leave nothing of; of those whose command line has `title`."""
        return [pid for pid in with_variable(TAG, self.tag) if title in _command(pid)]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""


def complete(client: httpx.Client, path: str, model: str, **body: Any) -> httpx.Response:
    return client.post(path, json={"model": model, "prompt": "Hello there", **body})


@contextmanager
def launched(
    home: Path, vllm: bool = False, /, **environ: str
) -> Iterator[tuple[subprocess.Popen[bytes], Announcement]]:
    """A worker process that has said whether it started. At the end nothing of it is left."""
    home.mkdir(parents=True, exist_ok=True)
    if not vllm:
        # Its import would take seconds of every test, for nothing.
        (home / "no-vllm").mkdir(exist_ok=True)
        (home / "no-vllm" / "sitecustomize.py").write_text("import sys\nsys.modules['vllm'] = None\n")
        paths = [str(home / "no-vllm"), os.environ.get("PYTHONPATH", "")]
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    settings = {
        "MODELPOOL_HOME": str(home),
        "MODELPOOL_TOKEN": TOKEN,
        "MODELPOOL_FAKE_DEVICES": "4x80",
        "MANAGER_URL": NOBODY,
        "WORKER_ID": "w",
        "WORKER_PORT": "0",
        **environ,
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MODELPOOL_", "WORKER_", "HF_"))}
    try:
        with part_process("worker", home / "worker.out", {**kept, **settings}) as (process, announcement):
            try:
                yield process, announcement
            finally:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
    finally:
        reap(TAG, f"{home}:{settings['WORKER_ID']}")


@contextmanager
def running_worker(home: Path, vllm: bool = False, /, **environ: str) -> Iterator[WorkerProcess]:
    with launched(home, vllm, **environ) as (process, announcement):
        assert isinstance(announcement, Ready), announcement
        worker = WorkerProcess(process, announcement.url, f"{home}:{environ.get('WORKER_ID', 'w')}")
        with worker.http:
            yield worker


@dataclass
class Control:
    """Stands in for a manager: takes every report, and keeps them all.

    `knows`: whether heartbeats are answered with 200 rather than 404. `gateways`: what answers tell.
    """

    url: str = ""
    knows: bool = True
    gateways: list[str] = field(default_factory=list)
    registrations: list[Json] = field(default_factory=list)
    heartbeats: list[Json] = field(default_factory=list)
    unregistered: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    def take(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Json]:
        self.tokens.add(token)
        answer = {"gateways": self.gateways}
        if (method, path) == ("POST", "/workers/register"):
            self.knows = True
            self.registrations.append(json.loads(body))
            return 200, answer
        if method == "DELETE" and "/unregister?incarnation=" in path:
            self.unregistered.append(path.split("/")[2])
            return 200, {"status": "success"}
        if method == "POST" and path.endswith("/heartbeat") and self.knows:
            self.heartbeats.append(json.loads(body))
            return 200, answer
        return 404, {"error": {"code": "worker_not_found", "message": "Who?"}}

    def registration(self, number: int = 0, within: float = 10.0) -> Json:
        """The first, second … registration, once it is there."""
        eventually(lambda: len(self.registrations) > number, within)
        return self.registrations[number]

    def states(self, instance: str) -> list[str]:
        """The states that the heartbeats told of an instance, each as often as it changed."""
        told = [
            report["state"]
            for beat in self.heartbeats
            for report in beat["instances"]
            if report["instance"] == instance
        ]
        return [state for index, state in enumerate(told) if index == 0 or told[index - 1] != state]


class _UnixServer(ThreadingHTTPServer):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "control", 0


@contextmanager
def serving_control(control: Control, *, port: int = 0, path: Path | None = None) -> Iterator[Control]:
    """Serve `control` on a port of loopback, or on a Unix socket."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def log_message(self, format: str, *args: object) -> None:
            """Be quiet."""

        def address_string(self) -> str:
            return "worker"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = control.take(self.command, self.path, body, self.headers.get("Authorization", ""))
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            # So that ending the server ends its connections too.
            self.send_header("Connection", "close")
            self.close_connection = True
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_DELETE = _answer

    server = _UnixServer(str(path), Handler) if path else ThreadingHTTPServer(("127.0.0.1", port), Handler)  # type: ignore[arg-type]
    server.daemon_threads = True
    control.url = f"unix:{path}" if path else f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="control")
    thread.start()
    try:
        yield control
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
