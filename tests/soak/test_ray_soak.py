"""A pool on a Ray cluster of three nodes under load, while one part after the other dies; and what a request costs."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
import ray
from benchmarks.machine import cpu_seconds

from tests.e2e.pool import PoolProcess, eventually, running_pool
from tests.load import Load
from tests.ray_pool import BIN, RayPool, deployed_pool, kill_ray, modelpool

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

ROUNDS = int(os.environ.get("MODELPOOL_SOAK_RAY_ROUNDS", "3"))
HEADLESS_S = float(os.environ.get("MODELPOOL_SOAK_HEADLESS_S", "60"))
STOPPED_S = 20.0
REQUESTS = 400


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayPool]:
    with deployed_pool() as pool:
        pool.register("steady", fake=True, fake_delay_ms=20, fake_token_ms=5, idle_sleep_1_s=86400, min_replicas=2)
        pool.wait_active("steady", replicas=2)
        yield pool


def manager_dies(pool: RayPool, _: list[Path]) -> None:
    epoch = pool.status()["epoch"]
    pool.register(f"acknowledged-{epoch}", fake=True)
    pool.ray_process("ray::ManagerActor").kill()

    def back() -> bool:
        status = pool.http.get("/admin/status")
        return status.status_code == 200 and status.json()["epoch"] != epoch and not status.json()["recovering"]

    eventually(back, 120, lambda: "a new manager")
    assert pool.model(f"acknowledged-{epoch}")["alias"] == f"acknowledged-{epoch}"
    pool.remove(f"acknowledged-{epoch}")


def replica_dies(pool: RayPool, homes: list[Path]) -> None:
    replica = pool.ray_process("ray::ServeReplica", homes[1])
    replica.kill()
    psutil.wait_procs([replica], timeout=10)
    pool.ray_process("ray::ServeReplica", homes[1])
    eventually(lambda: answers(pool, homes[1]), 120, lambda: "the control socket of the second node")


def node_is_lost(pool: RayPool, homes: list[Path]) -> None:
    kill_ray(homes[2])
    time.sleep(3)
    pool.add_node(3)
    eventually(lambda: answers(pool, homes[2]), 120, lambda: "the third node")


def worker_stands_still(pool: RayPool, _: list[Path]) -> None:
    worker = pool.one("modelpool: worker")
    worker.suspend()
    time.sleep(STOPPED_S)
    worker.resume()
    eventually(lambda: pool.status()["workers"][0]["last_seen_s"] < 2, 60, lambda: "the worker's report")


def answers(pool: RayPool, home: Path) -> bool:
    """Whether that node's gateway reaches the manager."""
    return httpx.get(f"{pool.node_url(home)}/admin/status", headers=pool.http.headers).status_code == 200


FAULTS: dict[str, Callable[[RayPool, list[Path]], None]] = {
    "the manager actor killed": manager_dies,
    "a gateway's replica killed": replica_dies,
    "a node that is not the head lost, and back": node_is_lost,
    f"the worker stopped for {STOPPED_S:.0f} s": worker_stands_still,
}


def test_a_cluster_serves_on_whatever_dies(cluster: RayPool, capsys: pytest.CaptureFixture[str]) -> None:
    pool = cluster
    homes = [pool.home, pool.add_node(2), pool.add_node(3)]
    started = instances(pool)
    for name, fault in FAULTS.items():
        with ExitStack() as stack:
            loads = [stack.enter_context(Load(pool.node_url(home), "steady", pool.key)) for home in homes]
            for _ in range(ROUNDS):
                fault(pool, homes)
        say(capsys, name, ROUNDS, loads)
        assert all(set(load.statuses) == {200} for load in loads), [load.statuses for load in loads]
    assert instances(pool) == started, "nothing was started twice"

    with ExitStack() as stack:
        loads = [stack.enter_context(Load(pool.node_url(home), "steady", pool.key)) for home in homes]
        for home in homes:
            kill_ray(home)
        time.sleep(HEADLESS_S)
    say(capsys, f"the head and all nodes killed, {HEADLESS_S:.0f} s without them", 1, loads)
    assert all(set(load.statuses) == {200} for load in loads), [load.statuses for load in loads]

    done = modelpool("deploy", environ=pool.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    eventually(lambda: pool.status()["workers"] and pool.status()["workers"][0]["alive"], 120, lambda: "the worker")
    assert instances(pool) == started, "a cluster built anew adopts what runs"
    for home in homes[1:]:
        for gateway in pool.processes("modelpool: gateway"):
            if gateway.environ()["MODELPOOL_HOME"] == str(home):
                gateway.send_signal(signal.SIGTERM)


def instances(pool: RayPool) -> dict[str, int]:
    """The engine processes of the model, by instance."""
    return {each["instance"]: each["pid"] for each in pool.model("steady")["instances"]}


def say(capsys: pytest.CaptureFixture[str], fault: str, times: int, loads: list[Load]) -> None:
    requests = sum(sum(load.statuses.values()) for load in loads)
    failed = {what: count for load in loads for what, count in load.statuses.items() if what != 200}
    with capsys.disabled():
        print(f"\n{fault}, {times} times: {requests} requests, {sum(failed.values())} failed {failed or ''}")


def test_a_request_costs_the_gateway_what_it_costs_without_ray(
    cluster: RayPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_pool(tmp_path / "home", "--no-demo", MODELPOOL_ENGINES="fake") as embedded:
        for pool in (embedded, cluster):
            pool.register("quick", fake=True, idle_sleep_1_s=86400)
            pool.wait_active("quick")
        ratios = []
        for _ in range(10):
            costs = [cpu_per_request(pool) for pool in (cluster, embedded)]
            ratios.append(costs[0] / costs[1])
        ratio = statistics.median(ratios)
        with capsys.disabled():
            print(f"\nCPU of the gateway per request, on Ray by embedded: median {ratio:.3f} of {sorted(ratios)}")
        assert ratio < 1.1


def cpu_per_request(pool: PoolProcess) -> float:
    """Seconds of the gateway process's CPU."""
    gateways = pool.processes("modelpool: gateway")
    gateway = next(each for each in gateways if each.environ()["MODELPOOL_HOME"] == str(pool.home))
    before = cpu_seconds([gateway])
    for _ in range(REQUESTS):
        assert pool.http.post("/v1/completions", json={"model": "quick", "prompt": "x"}).status_code == 200
    return (cpu_seconds([gateway]) - before) / REQUESTS


def test_serve_status_shows_a_healthy_application() -> None:
    with deployed_pool(dashboard=True) as pool:
        pool.connect()
        command = [str(BIN / "serve"), "status", "-a", pool.dashboard]
        done = subprocess.run(command, env=pool.environ, capture_output=True, text=True, check=True)
        ray.shutdown()
    assert "status: RUNNING" in done.stdout
    assert "status: HEALTHY" in done.stdout
