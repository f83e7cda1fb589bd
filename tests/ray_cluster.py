"""A pool on a Ray cluster of several nodes, its store in PostgreSQL, a worker far away, and a constant load on it."""

from __future__ import annotations

import itertools
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

from modelpool import demo
from modelpool.cluster.head import TAG
from modelpool.home import Home
from tests.beside import Beside
from tests.e2e.pool import eventually
from tests.load import ConstantLoad
from tests.port_forward import Forward, inside
from tests.postgres import Postgres, running_postgres
from tests.ray_pool import RayPool, deployed_pool, kill_ray, ray_processes, started_worker

PER_SECOND = 50.0
REAL_PER_SECOND = 2.0
FAR_PER_SECOND = 2.0
NODES = 3
NOWHERE_GB = 1e6
"""What a model needs to fit nowhere."""
HEADER = "\n| fault | fake: requests, failed, slowest | real | far | registrations | seconds |"


class Cluster:
    """Nodes, the first of them the head; the worker w1 beside them, and the worker `far`, which has GPUs, reached and
    reaching by `ways` alone.
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
        return self.process("ray::ManagerActor")

    def process(self, title: str) -> psutil.Process:
        """The one of Ray whose title or program begins so, wherever it is."""
        return eventually(
            lambda: next((each for home in self.homes if (each := process_of(home, title))), None), 120, lambda: title
        )

    def home_of_manager(self) -> Path:
        return Path(self.manager().environ()[TAG])

    def kill_manager(self) -> None:
        """Until there is another one, wherever Ray puts it."""
        epoch = self.epoch()
        self.manager().kill()
        self.await_manager_after(epoch)

    def move_manager(self, may_stay: Callable[[Path], bool]) -> None:
        """Until it is on a node of which this is true."""
        for _ in range(20):
            if may_stay(self.home_of_manager()):
                return
            self.kill_manager()
        raise AssertionError(f"Ray put it on {self.home_of_manager()}")

    def gateway(self, home: Path) -> psutil.Process:
        """That node's gateway process."""

        def of_home() -> psutil.Process | None:
            gateways = self.pool.processes("modelpool: gateway")
            return next((each for each in gateways if each.environ()["MODELPOOL_HOME"] == str(home)), None)

        return eventually(of_home, 60, lambda: f"a gateway process of {home}")

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
    """A process of this node's Ray whose title or program begins so, if it has one."""
    for process in ray_processes(home):
        try:
            if Path("".join(process.cmdline()[:1])).name.startswith(title):
                return process
        except psutil.Error:
            continue
    return None


@contextmanager
def suspended(process: psutil.Process) -> Iterator[None]:
    """It stands still, and nothing knows why."""
    process.suspend()
    try:
        yield
    finally:
        process.resume()


@contextmanager
def running_cluster(ray_args: str = "", **environ: str) -> Iterator[Cluster]:
    with running_postgres() as postgres:
        url = postgres.database("pool")
        given = {"MODELPOOL_STORE_URL": url, "MODELPOOL_ENGINES": "fake,vllm", **environ}
        with deployed_pool(dashboard=False, ray_args=ray_args, **given) as pool:
            pool.register("steady", fake=True, fake_delay_ms=20, fake_token_ms=5, min_replicas=2, max_replicas=2)
            pool.wait_active("steady", replicas=2)
            real = {"model_name": str(demo.model_path()), "max_model_len": demo.MAX_MODEL_LEN, "gpu_memory_gb": 1.5}
            pool.register(demo.ALIAS, engine_args=demo.engine_args(), min_replicas=1, max_replicas=1, **real)
            pool.wait_active(demo.ALIAS)
            homes = [pool.home, *(pool.add_node(number) for number in range(2, NODES + 1))]
            with _worker_far_away(pool) as ways:
                pool.register("far", fake=True, gpu_memory_gb=60, min_replicas=1, max_replicas=1, fake_delay_ms=20)
                view = pool.wait_active("far")
                assert [each["worker_id"] for each in view["instances"]] == ["far"]
                cluster = Cluster(pool, homes, postgres, ways)
                for home in homes:
                    cluster.await_node(home)
                yield cluster


@contextmanager
def _worker_far_away(pool: RayPool) -> Iterator[tuple[Forward, Forward]]:
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


class Loads(NamedTuple):
    """On fake engines, on a real one, and on the far worker."""

    steady: ConstantLoad
    real: ConstantLoad
    far: ConstantLoad


@contextmanager
def under_load(cluster: Cluster, say: Callable[[str], None], what: str) -> Iterator[Loads]:
    """A constant load on every node, and registrations, until the block ends. Then no acknowledged registration may be
    lost, and no instance ended or started. What came of it is said in a row of a table.
    """
    running, starts = cluster.instances(), cluster.starts()
    rates = {"steady": PER_SECOND, demo.ALIAS: REAL_PER_SECOND, "far": FAR_PER_SECOND}
    with ExitStack() as stack:
        registrar = stack.enter_context(Registrar(cluster))
        eventually(lambda: registrar.acknowledged, 60, lambda: f"a registration: {registrar.refused}")
        loads = Loads(
            *(
                stack.enter_context(ConstantLoad(cluster.urls, alias, cluster.pool.key, rate, max_tokens=8))
                for alias, rate in rates.items()
            )
        )
        began = time.monotonic()
        yield loads
        took = time.monotonic() - began
    registered = f"{len(registrar.acknowledged)} acknowledged, {registrar.refused.total()} refused"
    say(f"| {what} | {' | '.join(map(_told, loads))} | {registered} | {took:.0f} |")
    assert len(loads.steady.asked) > 0.9 * PER_SECOND * took
    assert cluster.instances() == running, "the same instances"
    assert cluster.starts() == starts, "nothing was started twice"
    assert registrar.acknowledged <= {each["alias"] for each in cluster.pool.status()["models"]}
    assert registrar.acknowledged <= {each["alias"] for each in cluster.postgres.execute("TABLE models", "pool")}


def _told(load: ConstantLoad) -> str:
    failures = load.failures()
    what = f" {dict(failures)}" if failures else ""
    return f"{len(load.asked):,}, {failures.total()}{what}, {load.slowest_s:.1f} s"


class Registrar(Beside):
    """Registers a model every two seconds, at one node after the other, until it is left. They fit nowhere."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self.acknowledged: set[str] = set()
        self.refused: Counter[int | str] = Counter()
        self._cluster = cluster

    def run(self) -> None:
        headers = self._cluster.pool.http.headers
        for url in itertools.cycle(self._cluster.urls):
            alias = f"kept-{secrets.token_hex(4)}"
            body = {"alias": alias, "fake": True, "gpu_memory_gb": NOWHERE_GB}
            try:
                answer = httpx.post(f"{url}/admin/models/register", json=body, headers=headers, timeout=60)
            except httpx.HTTPError as error:
                self.refused[type(error).__name__] += 1
            else:
                if answer.is_success:
                    self.acknowledged.add(alias)
                else:
                    self.refused[answer.status_code] += 1
            if self.ending.wait(2):
                break
