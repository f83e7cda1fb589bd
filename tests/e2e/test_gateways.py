"""Several gateway processes on one port: they share load counts, and each may die."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.e2e.pool import PoolProcess, eventually, running_pool


@pytest.fixture(scope="module")
def two_gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolProcess]:
    home = tmp_path_factory.mktemp("gateways")
    with running_pool(home, "--no-demo", "--gateway-processes", "2", MODELPOOL_ENGINES="fake") as pool:
        yield pool


def test_both_serve_and_count_what_the_other_sends(two_gateways: PoolProcess) -> None:
    pool = two_gateways
    gateways = pool.processes("modelpool: gateway")
    assert len(gateways) == 2
    pool.register("m", fake=True, fake_delay_ms=6000, fake_capacity=8, min_replicas=2)
    pool.wait_active("m", replicas=2)
    served: Counter[int] = Counter()

    def ask() -> None:
        # A connection each: the kernel spreads connections, not requests.
        with httpx.Client(base_url=pool.url, headers=pool.http.headers, trust_env=False, timeout=30) as http:
            answer = http.post("/v1/completions", json={"model": "m", "prompt": "x"})
            served[answer.status_code] += 1

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    with pool.worker_http() as worker:

        def inflight() -> list[int]:
            return [worker.get(f"/instances/{name}/status").json()["inflight_requests"] for name in ("m", "m-r2")]

        eventually(lambda: inflight() == [8, 8], 4, lambda: str(inflight()))
    for thread in threads:
        thread.join()
    assert served == {200: 16}
    connections = Counter(each.pid for each in gateways for _ in each.net_connections())
    assert all(connections[each.pid] for each in gateways)


def test_while_one_is_started_again_nobody_is_refused(two_gateways: PoolProcess) -> None:
    pool = two_gateways
    pool.register("n", fake=True)
    pool.wait_active("n")
    failures: list[str] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                with httpx.Client(base_url=pool.url, headers=pool.http.headers, trust_env=False, timeout=30) as http:
                    answer = http.post("/tokenize", json={"model": "n", "prompt": "x"})
                    if answer.status_code != 200:
                        failures.append(answer.text)
            except httpx.ConnectError as error:
                failures.append(repr(error))
            except httpx.TransportError:
                pass  # it was in the hands of the one that was killed

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        before = pool.processes("modelpool: gateway")
        before[0].kill()
        eventually(
            lambda: len({each.pid for each in pool.processes("modelpool: gateway")} - {before[0].pid}) == 2,
            20,
            lambda: "two gateways again",
        )
        time.sleep(0.5)
    finally:
        done.set()
        thread.join()
    assert failures == []
    assert isinstance(before[1], psutil.Process)
    assert before[1].is_running()
