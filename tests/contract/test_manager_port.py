"""The manager's port over both of its transports: the manager itself, and the actor on Ray."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from modelpool.cluster.actor import STREAMS, ManagerActor
from modelpool.cluster.remote import RayManager
from modelpool.core.pool import Policy
from modelpool.errors import ManagerAway, PoolError
from modelpool.manager.manager import running_manager
from modelpool.manager.port import ManagerPort
from modelpool.manager.store import open_store
from modelpool.messages.cluster import Call, Deployment, Refusal, Reply, encode_deployment
from modelpool.messages.demand import DemandReport, ModelDemand
from modelpool.messages.keys import KeySpec
from modelpool.messages.models import ModelSpec
from modelpool.messages.routing import Delta, Keys, KeysDelta, Snapshot, Update
from modelpool.messages.workers import Heartbeat, RegisterWorker, WorkerInfo
from modelpool.settings import ManagerSettings, Settings
from tests.ray_pool import RayPool


@asynccontextmanager
async def embedded(folder: Path) -> AsyncIterator[ManagerPort]:
    async with open_store(f"sqlite:///{folder}/s.db") as store:
        async with running_manager(store, policy=Policy(), token="t", run_id="r", recovery_s=0.01) as manager:
            yield manager


@asynccontextmanager
async def on_ray(folder: Path, name: str = "") -> AsyncIterator[ManagerPort]:
    settings = Settings(home=str(folder), token="t", run_id="r", manager=ManagerSettings(recovery_s=0.01))
    name = name or f"manager-{secrets.token_hex(4)}"
    kind = ray.remote(concurrency_groups={STREAMS: 10})(ManagerActor)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = kind.options(name=name, namespace="tests", num_cpus=0, max_concurrency=10, scheduling_strategy=here).remote(
        encode_deployment(Deployment(settings, "the-admin-key"))
    )
    while (await actor.health.remote())["status"] != "ok":
        await asyncio.sleep(0.05)
    try:
        yield RayManager(name, "tests")
    finally:
        ray.kill(actor)


Transport = Callable[[Path], AbstractAsyncContextManager[ManagerPort]]


@pytest.fixture(params=["embedded", "ray"])
def transport(request: pytest.FixtureRequest) -> Transport:
    if request.param == "embedded":
        return embedded
    request.getfixturevalue("ray_pool").connect()
    return on_ray


def worker(worker_id: str, incarnation: str = "i1") -> RegisterWorker:
    info = WorkerInfo(worker_id=worker_id, incarnation=incarnation, url="http://127.0.0.1:9")
    return RegisterWorker(info=info, devices=(), engines={})


async def refused(call: Awaitable[object]) -> tuple[int, str, str, str | None]:
    """What a call was refused with."""
    with pytest.raises(PoolError) as raised:
        await call
    error = raised.value
    return error.status, error.code, error.message, error.param


def test_models_are_registered_shown_and_removed(transport: Transport, tmp_path: Path) -> None:
    async def story() -> None:
        async with transport(tmp_path) as manager:
            spec = ModelSpec(alias="a", fake=True, engine_args={"x": [1, None]}, fake_delay_ms=1.5)
            view = await manager.register_model(spec)
            assert (view.alias, view.spec) == ("a", spec)
            assert await manager.register_model(spec) == await manager.model("a")
            assert [each.alias for each in await manager.models()] == ["a"]
            other = ModelSpec(alias="a", fake=True)
            assert (await refused(manager.register_model(other)))[:2] == (409, "alias_taken")
            status, code, message, param = await refused(manager.model("aa"))
            assert (status, code, param) == (404, "model_not_found", "model")
            assert "Did you mean `a`?" in message
            await manager.remove_model("a")
            assert await manager.models() == []
            assert (await refused(manager.remove_model("a")))[0] == 404
            assert (await manager.status()).run_id == "r"

    asyncio.run(story())


def test_workers_register_beat_and_leave(transport: Transport, tmp_path: Path) -> None:
    async def story() -> None:
        async with transport(tmp_path) as manager:
            await asyncio.gather(*(manager.register_worker(worker(f"w{number}")) for number in range(3)))
            beat = Heartbeat(incarnation="i1", devices=(), engines={})
            answers = await asyncio.gather(
                *(manager.heartbeat(f"w{number}", beat) for number in range(4)), return_exceptions=True
            )
            assert [isinstance(each, PoolError) for each in answers] == [False, False, False, True]
            assert (await refused(manager.heartbeat("w3", beat)))[:2] == (404, "worker_not_found")
            assert [each.worker_id for each in await manager.workers()] == ["w0", "w1", "w2"]
            await manager.unregister_worker("w1")
            assert [each.worker_id for each in await manager.workers()] == ["w0", "w2"]

    asyncio.run(story())


def test_a_worker_is_drained_and_leaves(transport: Transport, tmp_path: Path) -> None:
    async def story() -> None:
        async with transport(tmp_path) as manager:
            await manager.register_worker(worker("w"))
            for call in (manager.drain_worker, manager.keep_worker):
                assert (await refused(call("v")))[:2] == (404, "worker_not_found")
            assert not (await manager.keep_worker("w")).draining
            assert (await manager.drain_worker("w")).draining
            assert [each.draining for each in await manager.workers()] == [True]
            await manager.unregister_worker("w")
            assert await manager.workers() == []

    asyncio.run(story())


def test_a_model_is_replaced_where_that_is_asked_for(transport: Transport, tmp_path: Path) -> None:
    async def story() -> None:
        async with transport(tmp_path) as manager:
            created = (await manager.register_model(ModelSpec(alias="a", fake=True))).created
            other = ModelSpec(alias="a", fake=True, fake_capacity=3)
            assert (await refused(manager.register_model(other)))[:2] == (409, "alias_taken")
            view = await manager.register_model(other, replace=True)
            assert (view.spec, view.created) == (other, created)
            assert (await manager.register_model(other, replace=True)).spec == other

    asyncio.run(story())


def test_keys_are_made_listed_and_revoked(transport: Transport, tmp_path: Path) -> None:
    async def story() -> None:
        async with transport(tmp_path) as manager:
            made = await manager.make_key(KeySpec(name="alice", models=("m",), requests_per_minute=3))
            assert [key.id for key in await manager.keys()] == [made.key.id]
            assert (await refused(manager.make_key(KeySpec(name="alice"))))[:2] == (409, "name_taken")
            assert (await manager.revoke_key(made.key.id)).revoked is not None
            assert (await refused(manager.revoke_key("key-x")))[:2] == (404, "key_not_found")

    asyncio.run(story())


def test_a_reader_hears_all_there_is_and_then_every_change_in_order(transport: Transport, tmp_path: Path) -> None:
    async def story() -> list[Update]:
        async with transport(tmp_path) as manager:
            updates = manager.snapshots("g")
            heard: list[Update] = []

            async def hear(last: type[Update], alias: str = "") -> None:
                async with asyncio.timeout(20):
                    async for update in updates:
                        if update is None:
                            continue
                        heard.append(update)
                        if isinstance(update, last) and (not alias or alias in str(update)):
                            return

            await hear(Snapshot)
            await manager.register_model(ModelSpec(alias="new", fake=True))
            await hear(Delta, "new")
            await manager.demand(DemandReport(gateway="g", models={"new": ModelDemand(waiting=1)}))
            await manager.make_key(KeySpec(name="alice"))
            await hear(KeysDelta)
            return heard

    heard = asyncio.run(story())
    assert [type(each) for each in heard[:2]] == [Keys, Snapshot]
    deltas = [each for each in heard if isinstance(each, Delta)]
    assert [each.sequence for each in deltas] == list(range(deltas[0].sequence, deltas[0].sequence + len(deltas)))
    assert len({each.epoch for each in heard}) == 1


def test_the_log_of_what_does_not_run_is_refused_with_the_reason(transport: Transport, tmp_path: Path) -> None:
    async def story() -> None:
        async with transport(tmp_path) as manager:
            await manager.register_model(ModelSpec(alias="a", fake=True))
            refusal = await refused(anext(manager.logs("a", tail=5, follow=False)))
            assert refusal[:2] == (404, "instance_not_found")
            assert "Nothing runs `a`" in refusal[2]

    asyncio.run(story())


def test_where_there_is_no_manager_every_call_says_so(ray_pool: RayPool) -> None:
    ray_pool.connect()

    async def story() -> None:
        with pytest.raises(ManagerAway, match="there is no manager actor"):
            await RayManager("nobody", "tests").models()

    asyncio.run(story())


def test_one_that_steps_aside_lets_another_go_on_at_once(ray_pool: RayPool, tmp_path: Path) -> None:
    """It does not wait for its predecessor's lock or lease, though that process lives."""
    ray_pool.connect()

    async def story() -> None:
        async with on_ray(tmp_path, "before") as before:
            await before.register_model(ModelSpec(alias="a", fake=True))
            first = (await before.status()).epoch
            await ray.get_actor("before", "tests").step_aside.remote()
            status, code, message, _ = await refused(before.models())
            assert (status, code) == (503, "manager_away")
            assert "another takes its place" in message
            async with on_ray(tmp_path, "after") as after:
                second = (await after.status()).epoch
                assert [each.alias for each in await after.models()] == ["a"]
        assert int(second.rpartition(".")[2]) == int(first.rpartition(".")[2]) + 1

    asyncio.run(story())


def test_one_whose_place_nobody_takes_comes_back(ray_pool: RayPool, tmp_path: Path) -> None:
    """Its `deploy` died, say."""
    ray_pool.connect()

    async def story() -> None:
        async with on_ray(tmp_path, "alone") as manager:
            first = (await manager.status()).epoch
            actor = ray.get_actor("alone", "tests")
            await actor.step_aside.remote(0.1)
            async with asyncio.timeout(30):
                while (await actor.health.remote())["status"] != "ok":
                    await asyncio.sleep(0.05)
            assert (await manager.status()).epoch != first

    asyncio.run(story())


def test_what_only_a_later_manager_knows_is_refused_by_name(ray_pool: RayPool, tmp_path: Path) -> None:
    ray_pool.connect()

    async def story() -> None:
        async with on_ray(tmp_path, "earlier") as manager:
            actor = ray.get_actor("earlier", "tests")
            for call in (Call("foretell"), Call("models", (msgspec.Raw(b"1"),)), Call("model", (msgspec.Raw(b"1"),))):
                reply = msgspec.json.decode(await actor.ask.remote(msgspec.json.encode(call)), type=Reply)
                assert isinstance(reply, Refusal)
                assert (reply.status, reply.code) == (400, "not_known_yet")
            assert await manager.models() == []

    asyncio.run(story())
