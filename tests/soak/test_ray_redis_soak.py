"""A Ray cluster whose head keeps its state in Redis loses its head under a constant load, and goes on with another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from modelpool.core.epoch import number_of
from modelpool.pool_address import local_address
from modelpool.settings import Settings
from tests.ray_cluster import HEADER, Cluster, process_of, running_cluster, under_load
from tests.ray_pool import deploy, deployed_pool, free_port, kill_ray
from tests.redis import running_redis

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

HEADLESS_S = float(os.environ.get("MODELPOOL_SOAK_HEADLESS_S", "20"))
ROUNDS = int(os.environ.get("MODELPOOL_SOAK_RAY_ROUNDS", "2"))


@pytest.fixture(scope="module")
def environ() -> Iterator[dict[str, str]]:
    with running_redis() as address:
        yield {
            "RAY_REDIS_ADDRESS": address,
            "RAY_external_storage_namespace": "one",
            "RAY_gcs_rpc_server_reconnect_timeout_s": f"{HEADLESS_S + 300:.0f}",
        }


@pytest.fixture(scope="module")
def cluster(environ: dict[str, str], say: Callable[[str], None]) -> Iterator[Cluster]:
    with running_cluster(ray_args=f"--port={free_port()}", **environ) as cluster:
        say(HEADER)
        yield cluster


def deploy_again(cluster: Cluster) -> None:
    deploy(cluster.pool.environ)


def ray_starts_again(cluster: Cluster) -> None:
    cluster.pool.start_head()


def kept(cluster: Cluster, back: Callable[[Cluster], None]) -> list[int]:
    """What the head's loss is not to end: all gateways, and Ray on the other nodes. (`deploy` replaces replicas.)"""
    titles = ["raylet"] if back is deploy_again else ["raylet", "ray::ServeReplica"]
    found = [process_of(home, title) for home in cluster.homes[1:] for title in titles]
    return [each.pid for each in (*found, *map(cluster.gateway, cluster.homes)) if each]


BACK = pytest.mark.parametrize("back", [deploy_again, ray_starts_again], ids=lambda back: back.__name__)


@BACK
def test_the_head_is_lost_and_the_manager_elsewhere_goes_on(
    cluster: Cluster, say: Callable[[str], None], back: Callable[[Cluster], None]
) -> None:
    head = cluster.homes[0]
    cluster.move_manager(lambda home: home != head)
    epoch, manager, before = cluster.epoch(), cluster.manager().pid, kept(cluster, back)
    with under_load(cluster, say, f"head lost for {HEADLESS_S:.0f} s, manager elsewhere, {back.__name__}") as loads:
        for _ in range(ROUNDS):
            lose_head(cluster, back)
            cluster.await_node(head)
    assert not any(load.failed() for load in loads)
    assert (cluster.epoch(), cluster.manager().pid) == (epoch, manager)
    assert kept(cluster, back) == before


@BACK
def test_the_head_is_lost_with_the_manager_and_another_manager_comes(
    cluster: Cluster, say: Callable[[str], None], back: Callable[[Cluster], None]
) -> None:
    head, before = cluster.homes[0], kept(cluster, back)
    with under_load(cluster, say, f"head lost for {HEADLESS_S:.0f} s, with the manager, {back.__name__}") as loads:
        for _ in range(ROUNDS):
            cluster.move_manager(lambda home: home == head)
            epoch = cluster.epoch()
            lose_head(cluster, back)
            cluster.await_manager_after(epoch)
            for home in cluster.homes:
                cluster.await_node(home)
            assert number_of(cluster.epoch()) == number_of(epoch) + 1, "one other manager, not more"
    assert not any(load.failed() for load in loads)
    assert kept(cluster, back) == before


def test_a_pool_that_was_taken_down_is_deployed_again(environ: dict[str, str]) -> None:
    namespace = {"RAY_external_storage_namespace": "another"}
    with deployed_pool(dashboard=False, ray_args=f"--port={free_port()}", **{**environ, **namespace}) as pool:
        pool.register("kept", fake=True)
        pool.wait_active("kept")
        for command in ("undeploy", "deploy"):
            done = pool.command(command)
            assert done.returncode == 0, done.stdout + done.stderr
        address = local_address(Settings(home=str(pool.home)))
        assert address is not None
        pool.http.base_url = address.url
        pool.wait_active("kept")


def lose_head(cluster: Cluster, back: Callable[[Cluster], None]) -> None:
    kill_ray(cluster.homes[0])
    # `ray start --head` takes a raylet on this machine, which here is another node's, for its own cluster's.
    (cluster.pool.folder / "ray" / "ray_current_cluster").unlink()
    time.sleep(HEADLESS_S)
    back(cluster)
