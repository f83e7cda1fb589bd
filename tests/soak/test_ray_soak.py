"""A pool on a Ray cluster of three nodes under a constant load while one part after the other fails; and what a request
costs.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest
import ray
from benchmarks.machine import cpu_seconds

from tests.e2e.pool import PoolProcess, eventually, running_pool
from tests.load import Asked, SdkLoad
from tests.ray_cluster import HEADER, NOWHERE_GB, Cluster, Loads, running_cluster, suspended, under_load
from tests.ray_pool import BIN, RayPool, deploy, deployed_pool, kill_ray

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

ROUNDS = int(os.environ.get("MODELPOOL_SOAK_RAY_ROUNDS", "2"))
HEADLESS_S = float(os.environ.get("MODELPOOL_SOAK_HEADLESS_S", "20"))
AWAY_S = 20.0
DYING_S = 1.0
"""How long new connections may be refused after a gateway process was killed."""
GATEWAY_BACK_S = 20.0
REQUESTS = 400


@pytest.fixture(scope="module")
def cluster(say: Callable[[str], None]) -> Iterator[Cluster]:
    with running_cluster() as cluster:
        say(HEADER)
        yield cluster


def manager_dies(cluster: Cluster) -> None:
    cluster.kill_manager()


def manager_stands_still(cluster: Cluster) -> None:
    manager, epoch = cluster.manager(), cluster.epoch()
    with suspended(manager):
        time.sleep(AWAY_S)
    eventually(lambda: cluster.epoch() == epoch, 60, lambda: "the same manager goes on")


def managers_node_is_lost(cluster: Cluster) -> None:
    cluster.move_manager(lambda home: home != cluster.homes[0])
    home, epoch = cluster.home_of_manager(), cluster.epoch()
    kill_ray(home)
    cluster.await_manager_after(epoch)
    cluster.rejoin(home)


def head_is_lost(cluster: Cluster) -> None:
    epoch = cluster.epoch()
    kill_ray(cluster.homes[0])
    time.sleep(HEADLESS_S)
    deploy(cluster.pool.environ)
    cluster.await_manager_after(epoch)
    for home in cluster.homes[1:]:
        cluster.rejoin(home)


def replica_dies(cluster: Cluster) -> None:
    home = cluster.homes[1]
    replica = cluster.pool.ray_process("ray::ServeReplica", home)
    replica.kill()
    psutil.wait_procs([replica], timeout=10)
    cluster.pool.ray_process("ray::ServeReplica", home)
    cluster.await_node(home)


def controller_dies(cluster: Cluster) -> None:
    controller = cluster.process("ray::ServeController")
    controller.kill()
    psutil.wait_procs([controller], timeout=10)
    cluster.process("ray::ServeController")
    for home in cluster.homes:
        cluster.await_node(home)


def gcs_stands_still(cluster: Cluster) -> None:
    with suspended(cluster.process("gcs_server")):
        time.sleep(AWAY_S)
    for home in cluster.homes:
        cluster.await_node(home)


def worker_stands_still(cluster: Cluster) -> None:
    workers = cluster.pool.processes("modelpool: worker")
    (worker,) = [each for each in workers if each.environ()["WORKER_ID"] == "w1"]
    with suspended(worker):
        time.sleep(AWAY_S)
    cluster.await_worker("w1")


def worker_is_cut_off(cluster: Cluster) -> None:
    for way in cluster.ways:
        way.freeze()
    time.sleep(AWAY_S)
    for way in cluster.ways:
        way.thaw()
    cluster.await_worker("far")


def postgres_is_away(cluster: Cluster) -> None:
    epoch = cluster.epoch()
    cluster.postgres.stop()
    time.sleep(AWAY_S)
    cluster.postgres.start()
    body = {"alias": "after", "fake": True, "gpu_memory_gb": NOWHERE_GB}
    eventually(
        lambda: cluster.pool.http.post("/admin/models/register", json=body).is_success, 60, lambda: "a change is taken"
    )
    assert cluster.epoch() == epoch, "the same manager went on"


FAULTS: dict[Callable[[Cluster], None], str] = {
    manager_dies: "manager actor killed",
    manager_stands_still: f"the manager's process stopped (SIGSTOP) for {AWAY_S:.0f} s",
    managers_node_is_lost: "the manager's node, not the head, lost, and back",
    head_is_lost: f"head node killed, `deploy` after {HEADLESS_S:.0f} s, the others joined again",
    replica_dies: "a gateway's replica killed",
    controller_dies: "the controller of Ray Serve killed",
    gcs_stands_still: f"Ray's GCS stopped (SIGSTOP) for {AWAY_S:.0f} s",
    worker_stands_still: f"worker stopped (SIGSTOP) for {AWAY_S:.0f} s",
    worker_is_cut_off: f"far worker cut off for {AWAY_S:.0f} s: nothing passes, nothing is refused",
    postgres_is_away: f"PostgreSQL stopped for {AWAY_S:.0f} s",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_no_request_fails(cluster: Cluster, say: Callable[[str], None], fault: Callable[[Cluster], None]) -> None:
    with under_load(cluster, say, FAULTS[fault]) as loads:
        for _ in range(ROUNDS):
            fault(cluster)
    reached = loads if fault is not worker_is_cut_off else (loads.steady, loads.real)
    assert not any(load.failed() for load in reached)


class Killed(NamedTuple):
    """A gateway process was, at this moment."""

    url: str
    at: float


def gateway_dies(cluster: Cluster, home: Path) -> Killed:
    """The process only; its replica is to start another on the same port."""
    url, gateway = cluster.pool.node_url(home), cluster.gateway(home)
    at = time.monotonic()
    gateway.kill()
    psutil.wait_procs([gateway], timeout=10)
    eventually(lambda: httpx.get(f"{url}/health").is_success, GATEWAY_BACK_S, lambda: f"a gateway at {url}")
    assert cluster.gateway(home) != gateway
    return Killed(url, at)


@pytest.mark.parametrize("adopted", [False, True], ids=["started", "adopted"])
def test_a_killed_gateway_process_breaks_off_what_it_had_and_nothing_else(
    cluster: Cluster, say: Callable[[str], None], adopted: bool
) -> None:
    """Both by one that its replica has started, and whose socket it holds, and by one that it has adopted."""
    home = cluster.homes[1]
    url = cluster.pool.node_url(home)
    gateway_dies(cluster, home)  # whoever started that one: this replica has started the next
    what = f"a gateway process killed that its replica had {'adopted' if adopted else 'started'}"
    with under_load(cluster, say, what) as loads, SdkLoad(url, "steady", cluster.pool.key, max_tokens=32) as sdk:
        kills = []
        for _ in range(ROUNDS):
            if adopted:
                replica_dies(cluster)
            kills.append(gateway_dies(cluster, home))
            time.sleep(2)  # of load on the next one
    say(
        f"the `openai` SDK there: {sdk.requests} requests, {sdk.retries} asked again by itself, "
        f"{sdk.failures.total()} failed, slowest {sdk.slowest_s:.1f} s"
    )
    broken = [of_one_death(loads, killed, say) for killed in kills]
    failed = [each for load in loads for each in load.failed()]
    assert set(failed) == {each for some in broken for each in some}, "nowhere else, and at no other time"
    assert sdk.retries, "it had nothing open when a process was killed"
    assert not sdk.failures


def of_one_death(loads: Loads, killed: Killed, say: Callable[[str], None]) -> list[Asked]:
    """What failed at that gateway, of what was open when it was killed or came right after it."""
    there = [each for load in loads for each in load.asked if each.url == killed.url]
    open_then = [each for each in there if each.began <= killed.at < each.ended]
    after = [each for each in there if killed.at < each.began < killed.at + DYING_S]
    back = min(each.ended for each in there if each.began > killed.at and each.outcome == 200)
    waited = [each for each in there if killed.at < each.began < back and each.outcome == 200]
    broken, refused = ([each for each in some if each.outcome != 200] for some in (open_then, after))
    moment = max((each.began - killed.at for each in refused), default=0.0)
    say(
        f"killed with {len(open_then)} requests open, of which {len(broken)} failed; {len(refused)} that came after, "
        f"within {1000 * moment:.0f} ms, failed; {len(waited)} waited and were answered; another answered after "
        f"{back - killed.at:.2f} s"
    )
    return broken + refused


@pytest.fixture(scope="module")
def one_node() -> Iterator[RayPool]:
    with deployed_pool(dashboard=True) as pool:
        yield pool


def test_serve_status_shows_a_healthy_application(one_node: RayPool) -> None:
    one_node.connect()
    command = [str(BIN / "serve"), "status", "-a", one_node.dashboard]

    def status() -> str:
        return subprocess.run(command, env=one_node.environ, capture_output=True, text=True, check=True).stdout

    eventually(lambda: "status: RUNNING" in status() and "status: HEALTHY" in status(), 60, status)
    ray.shutdown()


def test_a_request_costs_the_gateway_what_it_costs_without_ray(
    one_node: RayPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_pool(tmp_path / "home", "--no-demo", MODELPOOL_ENGINES="fake") as embedded:
        for pool in (embedded, one_node):
            pool.register("quick", fake=True, idle_sleep_1_s=86400)
            pool.wait_active("quick")
        ratios = []
        for _ in range(10):
            costs = [cpu_per_request(pool) for pool in (one_node, embedded)]
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
