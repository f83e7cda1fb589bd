"""A pool on a Ray cluster of three nodes under a constant load while one part after the other fails, its store in
PostgreSQL; and what a request costs.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import ray
from benchmarks.machine import cpu_seconds

from modelpool import demo
from modelpool.cluster.head import TAG
from modelpool.home import Home
from tests.e2e.pool import PoolProcess, eventually, running_pool
from tests.load import ConstantLoad
from tests.port_forward import Forward, inside
from tests.postgres import Postgres, running_postgres
from tests.ray_pool import BIN, RayPool, deployed_pool, kill_ray, modelpool, ray_processes, started_worker

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

ROUNDS = int(os.environ.get("MODELPOOL_SOAK_RAY_ROUNDS", "2"))
HEADLESS_S = float(os.environ.get("MODELPOOL_SOAK_HEADLESS_S", "20"))
AWAY_S = 20.0
PER_SECOND = 50.0
REAL_PER_SECOND = 2.0
FAR_PER_SECOND = 2.0
REQUESTS = 400
MANAGER = "ray::ManagerActor"
NOWHERE_GB = 1e6


class Cluster:
    """Three nodes, the first of them the head; the worker w1 beside them, and the worker `far`, which has GPUs, reached
    and reaching by `ways` alone.
    """

    def __init__(self, pool: RayPool, homes: list[Path], postgres: Postgres, ways: tuple[Forward, Forward]) -> None:
        self.pool = pool
        self.homes = homes
        self.postgres = postgres
        self.ways = ways

    @property
    def urls(self) -> list[str]:
        return [self.pool.node_url(home) for home in self.homes]

    def manager(self) -> psutil.Process:
        return eventually(
            lambda: next((each for home in self.homes if (each := process_of(home, MANAGER))), None),
            120,
            lambda: "a manager actor",
        )

    def home_of_manager(self) -> Path:
        return Path(self.manager().environ()[TAG])

    def epoch(self) -> str:
        return str(eventually(lambda: self.pool.http.get("/admin/status").json().get("epoch"), 120, lambda: "a status"))

    def await_manager_after(self, epoch: str) -> None:
        """Until there is another one, which knows what runs."""

        def back() -> bool:
            status = self.pool.http.get("/admin/status")
            return status.status_code == 200 and status.json()["epoch"] != epoch and not status.json()["recovering"]

        eventually(back, 180, lambda: "a new manager")

    def await_node(self, home: Path) -> None:
        """Until that node's gateway reaches the manager."""
        url, headers = self.pool.node_url(home), self.pool.http.headers
        eventually(lambda: httpx.get(f"{url}/admin/status", headers=headers).status_code == 200, 120, lambda: f"{home}")

    def rejoin(self, home: Path) -> None:
        kill_ray(home)  # as `ray stop` there
        self.pool.add_node(self.homes.index(home) + 1)
        self.await_node(home)

    def await_worker(self, worker_id: str) -> None:
        def heard() -> bool:
            workers = self.pool.status().get("workers", ())
            return any(each["worker_id"] == worker_id and each["last_seen_s"] < 2 for each in workers)

        eventually(heard, 60, lambda: f"a report of {worker_id}")

    def instances(self) -> dict[str, int]:
        """The engine processes of the models that are asked, by instance."""
        views = [self.pool.model(alias) for alias in ("steady", "far", demo.ALIAS)]
        return {each["instance"]: each["pid"] for view in views for each in view["instances"]}

    def starts(self) -> int:
        """How many instances the workers have started in all."""
        return sum(log.read_text().count(" starts, engine ") for log in self.pool.folder.glob("worker-*.log"))


def process_of(home: Path, title: str) -> psutil.Process | None:
    """A process of this node's Ray, if it has one."""
    for process in ray_processes(home):
        try:
            if " ".join(process.cmdline()).startswith(title):
                return process
        except psutil.Error:
            continue
    return None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_postgres() as postgres:
        url = postgres.database("pool")
        with deployed_pool(MODELPOOL_STORE_URL=url, MODELPOOL_ENGINES="fake,vllm") as pool:
            pool.register("steady", fake=True, fake_delay_ms=20, fake_token_ms=5, min_replicas=2, max_replicas=2)
            pool.wait_active("steady", replicas=2)
            real = {"model_name": str(demo.model_path()), "max_model_len": demo.MAX_MODEL_LEN, "gpu_memory_gb": 1.5}
            pool.register(demo.ALIAS, engine_args=demo.engine_args(), min_replicas=1, max_replicas=1, **real)
            pool.wait_active(demo.ALIAS)
            homes = [pool.home, pool.add_node(2), pool.add_node(3)]
            with worker_far_away(pool) as ways:
                pool.register("far", fake=True, gpu_memory_gb=60, min_replicas=1, max_replicas=1, fake_delay_ms=20)
                view = pool.wait_active("far")
                assert [each["worker_id"] for each in view["instances"]] == ["far"]
                cluster = Cluster(pool, homes, postgres, ways)
                for home in homes:
                    cluster.await_node(home)
                yield cluster


@contextmanager
def worker_far_away(pool: RayPool) -> Iterator[tuple[Forward, Forward]]:
    """The worker `far`, in a network of its own; the way to it, and its way to the manager."""
    there, back = pool.folder / "far.sock", pool.folder / "back.sock"
    ways = Forward(there), Forward(Home(pool.home).control_socket, back)
    environ = {
        **pool.environ,
        "WORKER_ID": "far",
        "WORKER_PORT": "7000",
        "PUBLIC_URL": f"http://127.0.0.1:{ways[0].port}",
        "MODELPOOL_ENGINES": "fake",
        "MODELPOOL_FAKE_DEVICES": "1x80",
    }
    with started_worker(pool.folder, environ, f"unix:{back}", lambda command: inside(there, 7000, command)):
        known = lambda: "far" in {each["worker_id"] for each in pool.status()["workers"]}  # noqa: E731
        eventually(known, 60, lambda: (pool.folder / "worker-far.log").read_text())
        yield ways
    for way in ways:
        way.cut()


def manager_dies(cluster: Cluster) -> None:
    epoch = cluster.epoch()
    cluster.manager().kill()
    cluster.await_manager_after(epoch)


def managers_node_is_lost(cluster: Cluster) -> None:
    for _ in range(20):
        if (home := cluster.home_of_manager()) != cluster.homes[0]:
            break
        manager_dies(cluster)  # Ray starts it again on any node
    assert home != cluster.homes[0]
    epoch = cluster.epoch()
    kill_ray(home)
    cluster.await_manager_after(epoch)
    cluster.rejoin(home)


def head_is_lost(cluster: Cluster) -> None:
    epoch = cluster.epoch()
    kill_ray(cluster.homes[0])
    time.sleep(HEADLESS_S)
    done = modelpool("deploy", environ=cluster.pool.environ)
    assert done.returncode == 0, done.stdout + done.stderr
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


def worker_stands_still(cluster: Cluster) -> None:
    workers = cluster.pool.processes("modelpool: worker")
    (worker,) = [each for each in workers if each.environ()["WORKER_ID"] == "w1"]
    worker.suspend()
    time.sleep(AWAY_S)
    worker.resume()
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


FAULTS: dict[str, Callable[[Cluster], None]] = {
    "manager actor killed": manager_dies,
    "the manager's node, not the head, lost, and back": managers_node_is_lost,
    f"head node killed, `deploy` after {HEADLESS_S:.0f} s": head_is_lost,
    "a gateway's replica killed": replica_dies,
    f"worker w1 stopped for {AWAY_S:.0f} s": worker_stands_still,
    f"worker far cut off for {AWAY_S:.0f} s": worker_is_cut_off,
    f"PostgreSQL stopped for {AWAY_S:.0f} s": postgres_is_away,
}


class Registrar:
    """Registers a model every two seconds, at one node after the other, until it is left. They fit nowhere."""

    def __init__(self, cluster: Cluster) -> None:
        self.acknowledged: set[str] = set()
        self.refused: Counter[int | str] = Counter()
        self._cluster = cluster
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._register)

    def __enter__(self) -> Registrar:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _register(self) -> None:
        headers = self._cluster.pool.http.headers
        for number, url in enumerate(itertools.cycle(self._cluster.urls)):
            if self._ending.wait(2):
                break
            alias = f"kept-{number}"
            body = {"alias": alias, "fake": True, "gpu_memory_gb": NOWHERE_GB}
            try:
                answer = httpx.post(f"{url}/admin/models/register", json=body, headers=headers, timeout=60)
            except httpx.HTTPError as error:
                self.refused[type(error).__name__] += 1
                continue
            if answer.is_success:
                self.acknowledged.add(alias)
            else:
                self.refused[answer.status_code] += 1


def test_a_cluster_serves_on_whatever_fails(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    pool, key, urls = cluster.pool, cluster.pool.key, cluster.urls
    running, starts = cluster.instances(), cluster.starts()
    failures = {}
    say(capsys, "\n| fault, each of them", "times", "steady", "far", demo.ALIAS, "seconds |")
    with Registrar(cluster) as registrar:
        for name, fault in FAULTS.items():
            began = time.monotonic()
            with ExitStack() as stack:
                steady, far, real = (
                    stack.enter_context(ConstantLoad(urls, alias, key, rate, max_tokens=8))
                    for alias, rate in (
                        ("steady", PER_SECOND),
                        ("far", FAR_PER_SECOND),
                        (demo.ALIAS, REAL_PER_SECOND),
                    )
                )
                for _ in range(ROUNDS):
                    fault(cluster)
            took = time.monotonic() - began
            say(capsys, f"| {name}", ROUNDS, *map(told, (steady, far, real)), f"{took:.0f} |")
            assert steady.requests > 0.9 * PER_SECOND * took
            reached = [steady, real, far][: 2 if fault is worker_is_cut_off else 3]
            failures[name] = [load.failures() for load in reached]
            assert cluster.instances() == running, f"{name}: the same instances"
            assert cluster.starts() == starts, f"{name}: nothing was started twice"
    refused = f"{registrar.refused.total()} refused {dict(registrar.refused)}"
    say(capsys, f"registrations: {len(registrar.acknowledged)} acknowledged", refused)
    assert not any(failed for each in failures.values() for failed in each), failures
    assert registrar.acknowledged
    assert registrar.acknowledged <= {each["alias"] for each in pool.status()["models"]}
    assert registrar.acknowledged <= {each["alias"] for each in cluster.postgres.execute("TABLE models", "pool")}


def told(load: ConstantLoad) -> str:
    failed = load.failures()
    what = f" {dict(failed)}" if failed else ""
    return f"{load.requests} ({load.streams} streams), {failed.total()} failed{what}, slowest {load.slowest_s:.1f} s"


def say(capsys: pytest.CaptureFixture[str], *cells: object) -> None:
    with capsys.disabled():
        print(" | ".join(map(str, cells)), flush=True)


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
