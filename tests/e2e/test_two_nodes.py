"""Gateways on two nodes, each with a home and shared memory of its own: limits of keys, and the load of instances."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from modelpool.home import Home
from modelpool.process import READY_FD, Ready
from tests.beside import Beside
from tests.e2e.conftest import FAKE_ONLY
from tests.e2e.pool import PoolProcess, end, eventually, running_pool
from tests.load import ConstantLoad
from tests.promised import promised

LIMIT = 300


class Nodes:
    """A pool whose manager has gateways on two nodes."""

    def __init__(self, pool: PoolProcess, urls: Sequence[str]) -> None:
        self.pool = pool
        self.urls = urls

    def key(self, name: str, **limits: int) -> str:
        made = self.pool.http.post("/admin/keys", json={"name": name, **limits})
        assert made.status_code == 200, made.text
        secret: str = made.json()["secret"]
        eventually(lambda: all(self._knows(url, secret) for url in self.urls), 10, lambda: f"the key {name}")
        return secret

    def _knows(self, url: str, secret: str) -> bool:
        with self.client(url, secret) as client:
            return client.get("/v1/models").status_code == 200

    def client(self, url: str, secret: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {secret}"}
        return httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=30)

    @property
    def admin(self) -> str:
        return str(self.pool.http.headers["authorization"][7:])


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    with running_pool(folder / "one", "--no-demo", **FAKE_ONLY) as pool, another_node(pool, folder / "two") as url:
        pool.register("m", fake=True, idle_sleep_1_s=3600)
        pool.wait_active("m")
        yield Nodes(pool, (pool.url, url))


@contextmanager
def another_node(pool: PoolProcess, folder: Path) -> Iterator[str]:
    """A gateway with a home of its own, which reaches the pool's manager; its address."""
    home = Home(folder)

    for secret in ("cluster-token", "admin-key"):
        shutil.copy(pool.home / secret, folder / secret)
    home.control_socket.symlink_to(Home(pool.home).control_socket)
    environ = {"MODELPOOL_HOME": str(folder), "MODELPOOL_RUN_ID": pool.run_id, "SERVE_PORT": "0", "SPT_NOENV": "1"}
    reader, writer = os.pipe()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MODELPOOL_", "SERVE_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "modelpool.gateway"],
        env={**inherited, **environ, READY_FD: str(writer)},
        pass_fds=(writer,),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as said:
            ready = msgspec.json.decode(said.readline(), type=Ready)
        yield ready.url
    finally:
        end(process)
        home.give_back()


class Asking(Beside):
    """Clients that ask a node for as long as they are let; `answers` by status."""

    def __init__(self, nodes: Nodes, url: str, secret: str, pause_s: float = 0.0) -> None:
        super().__init__()
        self.answers: Counter[int] = Counter()
        self._http = nodes.client(url, secret)
        self._pause_s = pause_s

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._http.close()

    def run(self) -> None:
        while not self.ending.wait(self._pause_s):
            answer = self._http.post("/v1/completions", json={"model": "m", "prompt": "x", "max_tokens": 1})
            self.answers[answer.status_code] += 1


def until_used_up(asking: Sequence[Asking]) -> int:
    """How many were admitted in all, once the last second brought nothing but refusals."""
    admitted, since = -1, time.monotonic()
    deadline = since + 50  # within the minute that the limit is for
    while time.monotonic() < deadline:
        now = sum(each.answers[200] for each in asking)
        if now != admitted:
            admitted, since = now, time.monotonic()
        elif time.monotonic() - since > 3 and all(each.answers[429] for each in asking):
            break
        time.sleep(0.05)
    return admitted


@pytest.mark.parametrize("pauses", [(0.0,), (0.0, 0.0), (0.0, 0.1)], ids=["one", "both alike", "one much more"])
def test_a_minutes_requests_hold_over_both_nodes_and_are_used_up_wherever_they_are_asked_for(
    nodes: Nodes, pauses: Sequence[float], capsys: pytest.CaptureFixture[str]
) -> None:
    secret = nodes.key("requests of " + "-".join(map(str, pauses)), requests_per_minute=LIMIT)
    with ExitStack() as stack:
        asking = [
            stack.enter_context(Asking(nodes, url, secret, pause))
            for url, pause in zip(nodes.urls, pauses, strict=False)
        ]
        admitted = until_used_up(asking)
    with capsys.disabled():
        print(f"\n{LIMIT} requests a minute, {len(pauses)} of 2 nodes asked: {[dict(each.answers) for each in asking]}")
    assert all(set(each.answers) <= {200, 429} for each in asking)
    assert 0.9 * LIMIT <= admitted <= 1.1 * LIMIT


def test_what_one_node_left_the_other_may_use(nodes: Nodes) -> None:
    secret = nodes.key("moving", requests_per_minute=LIMIT)
    with Asking(nodes, nodes.urls[0], secret, 0.01) as first:
        eventually(lambda: first.answers[200] >= 100, 30, lambda: str(first.answers))
    with Asking(nodes, nodes.urls[1], secret) as second:
        until_used_up([second])
    assert 0.9 * LIMIT <= first.answers[200] + second.answers[200] <= 1.1 * LIMIT


def test_requests_at_once_hold_over_both_nodes(nodes: Nodes) -> None:
    most = 10
    nodes.pool.register("slow", fake=True, fake_token_ms=100, fake_response="word " * 500, fake_capacity=64)
    nodes.pool.wait_active("slow")
    secret = nodes.key("at once", max_concurrency=most)
    body = {"model": "slow", "prompt": "x", "stream": True, "max_tokens": 500}
    with ExitStack() as stack:
        clients = [stack.enter_context(nodes.client(url, secret)) for url in nodes.urls]
        streams: list[httpx.Response] = []

        def one_more() -> int:
            for client in clients:
                answer = client.send(client.build_request("POST", "/v1/completions", json=body), stream=True)
                if answer.status_code == 200:
                    streams.append(answer)
                    stack.callback(answer.close)
                else:
                    answer.close()
            return len(streams)

        eventually(lambda: one_more() >= 0.9 * most, 20, lambda: str(len(streams)))
        for _ in range(20):
            one_more()
            time.sleep(0.05)
        assert 0.9 * most <= len(streams) <= 1.1 * most
        with nodes.pool.worker_http() as worker:
            assert worker.get("/instances/slow/status").json()["inflight_requests"] == len(streams)
    nodes.pool.remove("slow")


def test_a_node_knows_what_the_other_has_in_flight(nodes: Nodes) -> None:
    """What is full with the requests of one is not chosen by the other."""
    pool = nodes.pool
    pool.register("wide", fake=True, fake_token_ms=100, fake_response="word " * 500, fake_capacity=8, min_replicas=1)
    pool.wait_active("wide")
    body = {"model": "wide", "prompt": "x", "stream": True, "max_tokens": 500}
    with ExitStack() as stack:
        here, there = (stack.enter_context(nodes.client(url, nodes.admin)) for url in nodes.urls)

        def stream(client: httpx.Client) -> None:
            answer = client.send(client.build_request("POST", "/v1/completions", json=body), stream=True)
            assert answer.status_code == 200
            stack.callback(answer.close)

        for _ in range(4):
            stream(here)
        assert pool.http.patch("/admin/models/wide", json={"min_replicas": 2}).status_code == 200
        pool.wait_active("wide", replicas=2)

        def considered() -> dict[str, int]:
            asked = there.post("/tokenize", json={"model": "wide", "prompt": "x"})
            told: dict[str, Any] = there.get(f"/admin/explain/{asked.headers['x-request-id']}").json()
            return {each["instance"]: each["inflight"] for each in told.get("considered", [])}

        eventually(lambda: considered().get("wide", 0) >= 4, 20, lambda: str(considered()))
        for _ in range(4):
            stream(there)
        with pool.worker_http() as worker:
            counts = [
                worker.get(f"/instances/{name}/status").json()["inflight_requests"] for name in ("wide", "wide-r2")
            ]
        assert counts == [4, 4]
    pool.remove("wide")


class Most(Beside):
    """The most requests that an instance has at once, as its worker says, until it is left."""

    def __init__(self, pool: PoolProcess, instance: str) -> None:
        super().__init__()
        self.seen = 0
        self._pool = pool
        self._path = f"/instances/{instance}/status"

    def run(self) -> None:
        with self._pool.worker_http() as worker:
            while not self.ending.wait(0.02):
                self.seen = max(self.seen, worker.get(self._path).json()["inflight_requests"])


@pytest.mark.parametrize("asked", [(0, 1), (0,), (1, 1, 1, 0)], ids=["both alike", "one", "one much more"])
def test_an_instance_is_never_sent_more_than_it_takes_but_for_one_of_each_gateway(
    nodes: Nodes, asked: Sequence[int], capsys: pytest.CaptureFixture[str]
) -> None:
    pool, capacity, lasting_s, per_second, seconds = nodes.pool, 8, 0.5, 30.0, 4.0
    pool.register("narrow", fake=True, fake_delay_ms=int(1000 * lasting_s), fake_capacity=capacity, max_replicas=1)
    pool.wait_active("narrow")
    urls = [nodes.urls[number] for number in asked]
    began = time.monotonic()
    with Most(pool, "narrow") as most, ConstantLoad(urls, "narrow", nodes.admin, per_second, max_tokens=1) as load:
        time.sleep(seconds)
    took = time.monotonic() - began
    with capsys.disabled():
        print(f"\ncapacity {capacity}, {len(load.asked)} requests in {took:.1f} s, most at once {most.seen}")
    assert load.failures() == {}
    assert capacity <= most.seen <= capacity + len(nodes.urls)
    assert took < promised(2 * len(load.asked) * lasting_s / capacity)
    pool.remove("narrow")
