"""A worker of which only a forwarded port can be reached: manager and gateways use nothing else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelpool.home import Home
from tests.e2e.conftest import FAKE_ONLY
from tests.e2e.pool import PoolProcess, end, eventually, running_pool
from tests.port_forward import Forward, forwarded, inside

PORT = 7000


class Far:
    """A pool whose worker that has engines is behind a forward."""

    def __init__(self, pool: PoolProcess, forward: Forward, socket_file: Path) -> None:
        self.pool = pool
        self.forward = forward
        self.socket_file = socket_file

    def address(self, alias: str) -> tuple[str, int]:
        """Where the engine host of a model listens, in the network where it is."""
        with self.pool.worker_http("far") as worker:
            address = worker.get(f"/instances/{alias}").json()["address"]
            return address["host"], address["port"]


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    folder = tmp_path_factory.mktemp("far")
    socket_file = folder / "forward.sock"
    with running_pool(folder / "home", "--no-demo", **{**FAKE_ONLY, "MODELPOOL_ENGINES": ","}) as pool:
        with forwarded(socket_file) as forward:
            command = [sys.executable, "-m", "modelpool.cli", "worker", "--worker-id", "far", "--port", str(PORT)]
            inherited = {name: value for name, value in os.environ.items() if not name.startswith("MODELPOOL_")}
            environ = {
                **inherited,
                **FAKE_ONLY,
                "MODELPOOL_HOME": str(folder / "far"),
                "MODELPOOL_RUN_ID": pool.run_id,
                "MODELPOOL_TOKEN": pool.token,
                # Of a network without a way out, a file is the way to the manager.
                "MANAGER_URL": f"unix:{Home(pool.home).control_socket}",
                "PUBLIC_URL": f"http://127.0.0.1:{forward.port}",
                "SPT_NOENV": "1",
            }
            worker = subprocess.Popen(
                inside(socket_file, PORT, command),
                env=environ,
                cwd=Path(__file__).parents[2],
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            try:
                known = lambda: "far" in {each["worker_id"] for each in pool.status()["workers"]}  # noqa: E731
                eventually(known, 30, lambda: f"far: {worker.poll()}")
                far = Far(pool, forward, socket_file)
                yield far
                far.forward.cut()
            finally:
                end(worker, signal.SIGTERM)


def test_all_goes_through_the_forward_and_nothing_else_is_reachable(far: Far) -> None:
    pool = far.pool
    pool.register("m", fake=True, fake_response="word " * 20, fake_token_ms=50, idle_sleep_1_s=3600)
    view = pool.wait_active("m")
    assert [each["worker_id"] for each in view["instances"]] == ["far"]
    host, port = far.address("m")
    for address in ((host, port), ("127.0.0.1", PORT)):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=5)
    assert pool.http.post("/v1/completions", json={"model": "m", "prompt": "x"}).status_code == 200
    assert pool.http.get("/admin/models/m/logs").status_code == 200
    assert far.forward.count > 0


def test_a_stream_comes_through_the_forward_as_it_is_made(far: Far) -> None:
    pool = far.pool
    pool.register("m", fake=True, fake_response="word " * 20, fake_token_ms=50, idle_sleep_1_s=3600)
    pool.wait_active("m")
    began = time.monotonic()
    times = []
    body = {"model": "m", "prompt": "x", "stream": True, "max_tokens": 20}
    with pool.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = []
        for line in answer.iter_lines():
            times.append(time.monotonic() - began)
            lines.append(line)
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert sum(line.startswith("data: {") for line in lines) >= 20
    assert times[-1] - times[0] > 0.5, "twenty tokens, 50 ms apart"


def test_a_client_that_leaves_ends_the_work_behind_the_forward(far: Far) -> None:
    pool = far.pool
    pool.register("slow", fake=True, fake_response="word " * 1000, fake_token_ms=100)
    pool.wait_active("slow")
    body = {"model": "slow", "prompt": "x", "stream": True, "max_tokens": 1000}
    with pool.worker_http("far") as worker:

        def inflight() -> int:
            return int(worker.get("/instances/slow/status").json()["inflight_requests"])

        with pool.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()  # kept: with its end httpx closes the connection
            next(lines)
            eventually(lambda: inflight() == 1, 5, lambda: "it runs")
        eventually(lambda: inflight() == 0, 5, lambda: "aborted")
    pool.remove("slow")


def test_when_the_forward_was_away_its_models_come_back_by_themselves(far: Far) -> None:
    pool = far.pool
    pool.register("m", fake=True, fake_response="word " * 20, fake_token_ms=50, idle_sleep_1_s=3600)
    pool.wait_active("m")
    host = pool.one("modelpool: host m").pid
    far.forward.cut()
    answer = pool.http.post(
        "/v1/completions", json={"model": "m", "prompt": "x"}, headers={"X-ModelPool-Max-Wait": "0"}
    )
    assert answer.status_code in (502, 503)
    far.forward = Forward(far.socket_file, far.forward.port)
    eventually(
        lambda: pool.http.post("/v1/completions", json={"model": "m", "prompt": "x"}).status_code == 200,
        30,
        lambda: str(pool.status()),
    )
    assert pool.one("modelpool: host m").pid == host, "it ran on"
