"""A pool as a user runs it: `modelpool up` as a process, with a home and ports of its own."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
from openai import OpenAI

from modelpool.home import Home
from tests.promised import promised

Json = dict[str, Any]


class PoolProcess:
    """A running pool, seen from outside."""

    def __init__(self, process: subprocess.Popen[str], home: Path, run_id: str, url: str) -> None:
        self.process = process
        self.home = home
        self.run_id = run_id
        self.url = url
        key = (home / "admin-key").read_text().strip()
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60, trust_env=False)

    @property
    def token(self) -> str:
        return (self.home / "cluster-token").read_text().strip()

    def sdk(self, path: str = "/v1", **options: Any) -> OpenAI:
        return OpenAI(base_url=self.url + path, api_key=self.http.headers["authorization"][7:], **options)

    def register(self, alias: str, **body: Any) -> Json:
        answer = self.http.post("/admin/models/register", json={"alias": alias, **body})
        assert answer.status_code == 200, answer.text
        view: Json = answer.json()["routing"]
        return view

    def remove(self, alias: str) -> None:
        answer = self.http.delete(f"/admin/models/{alias}")
        assert answer.status_code in (200, 404), answer.text

    def model(self, alias: str) -> Json:
        view: Json = self.http.get(f"/admin/models/{alias}").json()
        return view

    def status(self) -> Json:
        status: Json = self.http.get("/admin/status").json()
        return status

    def wait_active(self, alias: str, replicas: int = 1, within: float = 120) -> Json:
        """The model once so many instances of it are ACTIVE, and the gateway knows it."""

        def ready() -> Json | None:
            view = self.model(alias)
            active = [each for each in view.get("instances", []) if each["state"] == "ACTIVE"]
            return view if len(active) >= replicas and self.answers(alias) else None

        return eventually(ready, within, lambda: f"{alias} active: {self.model(alias)}")

    def answers(self, alias: str) -> bool:
        """Whether the gateway has a route to it: it answers a request for no tokens, whatever it says."""
        return self.http.post("/tokenize", json={"model": alias, "prompt": "x"}).status_code not in (502, 503)

    def worker_http(self, worker_id: str | None = None) -> httpx.Client:
        """A client of one worker's own API."""
        workers = [each for each in self.status()["workers"] if worker_id in (None, each["worker_id"])]
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=workers[0]["url"], headers=headers, timeout=30, trust_env=False)

    def processes(self, title: str = "") -> list[psutil.Process]:
        """All processes of this run whose title begins so, by the run id in their environment."""
        return [each for each in processes_of(self.run_id) if _title(each).startswith(title)]

    def one(self, title: str) -> psutil.Process:
        return eventually(lambda: next(iter(self.processes(title)), None), 30, lambda: f"a process {title!r}")


def processes_of(run_id: str) -> list[psutil.Process]:
    """Every live process that carries the run id in its environment, over the whole process table."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MODELPOOL_RUN_ID") == run_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


T = TypeVar("T")


def eventually(attempt: Callable[[], T | None], within: float, what: Callable[[], str]) -> T:
    """The first true result of `attempt`; fails with `what()` when there is none in time (see `promised`)."""
    deadline = time.monotonic() + promised(within)
    while True:
        try:
            if result := attempt():
                return result
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, f"not within {within} s: {what()}"
        time.sleep(0.05)


@contextmanager
def running_pool(home: Path, *flags: str, **environ: str) -> Iterator[PoolProcess]:
    """`modelpool up` until the block ends; then not one process of it may be left."""
    run_id = f"test-{secrets.token_hex(6)}"
    process = start_up(home, *flags, run_id=run_id, **environ)
    try:
        ready = wait_ready(process)
        pool = PoolProcess(process, home, run_id, ready["url"])
        yield pool
        pool.http.close()
    finally:
        end(process)
        left = processes_of(run_id)
        for each in left:
            each.kill()
        Home(home).give_back()  # an `up` that a test killed could not
    assert left == [], [(_title(each), each.pid) for each in left]


@contextmanager
def another_worker(pool: PoolProcess, home: Path, worker_id: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker with a home of its own, registered with the pool; it may have ended before the block does."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MODELPOOL_", "WORKER_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "modelpool.cli", "worker", "--worker-id", worker_id, "--port", "0"],
        env={
            **inherited,
            "MODELPOOL_ENGINES": "fake",
            "MODELPOOL_HEARTBEAT_INTERVAL": "1",
            "MODELPOOL_HOME": str(home),
            "MODELPOOL_RUN_ID": pool.run_id,
            "MODELPOOL_TOKEN": pool.token,
            "MANAGER_URL": pool.url,
            "SPT_NOENV": "1",
            **environ,
        },
        start_new_session=True,
    )
    try:
        eventually(lambda: worker_id in {each["worker_id"] for each in pool.status()["workers"]}, 20, lambda: worker_id)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)


def start_up(home: Path, *flags: str, run_id: str, **environ: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "modelpool.cli", "up", "--json", "--port", "0", "--worker-port", "0", *flags]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MODELPOOL_", "SERVE_"))}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={
            **inherited,
            "MODELPOOL_HOME": str(home),
            "MODELPOOL_RUN_ID": run_id,
            "WORKER_ID": "w1",
            "SPT_NOENV": "1",
            **environ,
        },
    )


def wait_ready(process: subprocess.Popen[str]) -> Json:
    """What `up --json` says when it is ready. Fails with what it printed instead."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        event: Json = json.loads(line)
        if event["event"] == "ready":
            return event
    assert process.stderr is not None
    raise AssertionError(f"up ended with {process.wait()}: {said} {process.stderr.read()}")


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGINT) -> None:
    """As Ctrl-C does; SIGKILL to its session when that is not enough, so that a failed test leaves nothing."""
    if process.poll() is None:
        process.send_signal(number)
    try:
        process.communicate(timeout=45)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
