"""A pool on Ray, made by `modelpool deploy`, with a worker started by script."""

from __future__ import annotations

import time

import httpx
import psutil
import pytest
import ray
from ray import serve

from tests.e2e.pool import eventually
from tests.load import Load
from tests.ray_pool import RayPool, ray_processes


@pytest.fixture
def alias(ray_pool: RayPool) -> str:
    """A model that answers, on every gateway."""
    ray_pool.register("on-ray", fake=True, fake_response="from a worker", idle_sleep_1_s=3600)
    ray_pool.wait_active("on-ray")
    return "on-ray"


def test_a_chat_by_the_openai_sdk(ray_pool: RayPool, alias: str) -> None:
    answer = ray_pool.sdk().chat.completions.create(model=alias, messages=[{"role": "user", "content": "hello"}])
    assert answer.choices[0].message.content == "from a worker"


def test_ray_serve_shows_a_healthy_application(ray_pool: RayPool) -> None:
    ray_pool.connect()
    application = serve.status().applications["modelpool"]
    assert application.status == "RUNNING"
    assert application.deployments["gateway"].status == "HEALTHY"


def test_a_users_program_talks_to_the_manager_actor(ray_pool: RayPool, alias: str) -> None:
    manager = ray_pool.actor()
    assert ray.get(manager.health.remote()) == {"status": "ok", "reason": ""}
    assert [each["worker_id"] for each in ray.get(manager.status.remote())["workers"]] == ["w1"]
    registered = ray.get(manager.register_model.remote({"alias": "by-handle", "fake": True}))
    assert registered["alias"] == "by-handle"
    assert ray.get(manager.get_model_routing.remote(alias))["state"] == "ACTIVE"
    with pytest.raises(Exception, match="`nobody` is not registered"):
        ray.get(manager.get_model_routing.remote("nobody"))
    with pytest.raises(Exception, match="faek"):
        ray.get(manager.register_model.remote({"alias": "x", "faek": True}))
    ray_pool.remove("by-handle")


def test_the_manager_actor_dies_and_requests_and_registrations_stay(ray_pool: RayPool, alias: str) -> None:
    epoch = ray_pool.status()["epoch"]
    with Load(ray_pool.url, alias, ray_pool.key) as load:
        ray_pool.register("acknowledged", fake=True)
        ray_pool.ray_process("ray::ManagerActor").kill()

        def back() -> bool:
            answer = ray_pool.http.get("/admin/status")
            return answer.status_code == 200 and answer.json()["epoch"] != epoch and not answer.json()["recovering"]

        eventually(back, 60, lambda: "a new manager")
        eventually(lambda: ray_pool.status()["workers"], 60, lambda: "its worker")
    assert set(load.statuses) == {200}, load.statuses
    assert ray_pool.model("acknowledged")["alias"] == "acknowledged"
    ray_pool.remove("acknowledged")


def test_a_deploy_of_what_is_there_leaves_manager_and_replicas_as_they_are(ray_pool: RayPool) -> None:
    before = [ray_pool.ray_process(title) for title in ("ray::ManagerActor", "ray::ServeReplica")]
    done = ray_pool.command("deploy")
    assert done.returncode == 0, done.stdout + done.stderr
    ray_pool.connect()
    replicas = serve.status().applications["modelpool"].deployments["gateway"].replica_states
    assert replicas == {"RUNNING": 1}
    assert [ray_pool.ray_process(title) for title in ("ray::ManagerActor", "ray::ServeReplica")] == before


def test_a_deploy_with_a_store_that_is_not_there_changes_nothing(ray_pool: RayPool) -> None:
    manager, epoch = ray_pool.ray_process("ray::ManagerActor"), ray_pool.status()["epoch"]
    done = ray_pool.command("deploy", MODELPOOL_STORE_URL="postgresql://nobody@127.0.0.1:1/none")
    assert done.returncode == 1
    assert "The store cannot be used" in done.stderr
    assert "Nothing was changed" in done.stderr
    assert ray_pool.ray_process("ray::ManagerActor") == manager
    assert ray_pool.status()["epoch"] == epoch


def test_a_deploy_that_was_interrupted_is_finished_by_the_next(ray_pool: RayPool, alias: str) -> None:
    """It had taken the manager away, and made none in its place."""
    gateway, epoch = ray_pool.one("modelpool: gateway"), ray_pool.status()["epoch"]
    with Load(ray_pool.url, alias, ray_pool.key) as load:
        ray.kill(ray_pool.actor())
        eventually(lambda: ray_pool.http.get("/admin/status").status_code == 503, 30, lambda: "no manager")
        done = ray_pool.command("deploy")
        assert done.returncode == 0, done.stdout + done.stderr
        eventually(lambda: ray_pool.status().get("epoch", epoch) != epoch, 30, lambda: "a new manager")
    assert set(load.statuses) == {200}, load.statuses
    assert ray_pool.one("modelpool: gateway") == gateway


@pytest.mark.soak
def test_a_replica_dies_and_its_successor_adopts_the_gateway(ray_pool: RayPool, alias: str) -> None:
    gateway = ray_pool.one("modelpool: gateway")
    with Load(ray_pool.url, alias, ray_pool.key) as load:
        replica = ray_pool.ray_process("ray::ServeReplica")
        replica.kill()
        psutil.wait_procs([replica], timeout=10)
        successor = ray_pool.ray_process("ray::ServeReplica")
        assert successor.pid != replica.pid
        eventually(lambda: ray_pool.http.get("/admin/status").status_code == 200, 60, lambda: "the control socket")
    assert set(load.statuses) == {200}, load.statuses
    assert ray_pool.one("modelpool: gateway") == gateway

    gateway.kill()
    eventually(lambda: ray_pool.answers(alias), 60, lambda: "another gateway")
    assert ray_pool.one("modelpool: gateway").pid != gateway.pid
    assert ray_pool.http.base_url.port == int(ray_pool.url.rsplit(":", 1)[1])


@pytest.mark.soak
def test_a_node_that_joins_gets_a_gateway_and_one_that_is_lost_takes_nothing_along(
    ray_pool: RayPool, alias: str
) -> None:
    home = ray_pool.add_node(2)
    url = ray_pool.node_url(home)
    (gateway,) = [
        each for each in ray_pool.processes("modelpool: gateway") if each.environ()["MODELPOOL_HOME"] == str(home)
    ]
    assert url.startswith("http://127.0.0.2:")
    eventually(lambda: httpx.get(f"{url}/health").status_code == 200, 30, lambda: "the second gateway")
    begin = time.monotonic()
    with Load(url, alias, ray_pool.key) as load, Load(ray_pool.url, alias, ray_pool.key) as other:
        eventually(lambda: load.statuses[200] > 3, 30, lambda: f"answers: {load.statuses}")
        for process in ray_processes(home):
            process.kill()
        time.sleep(max(0.0, 2 - (time.monotonic() - begin)))
    assert set(other.statuses) == {200}
    assert set(load.statuses) == {200}, "its gateway serves on, without a node"
    gateway.terminate()
    psutil.wait_procs([gateway], timeout=30)
