"""The manager and its store: what it does while the store is out, when it cannot know what was done, when deposed."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from msgspec.structs import replace

from modelpool.core import changes
from modelpool.core.pool import Policy
from modelpool.errors import Conflict
from modelpool.manager.api import control_app
from modelpool.manager.manager import Manager, running_manager
from modelpool.manager.store import Deposed, Holder, Rewound, Store, StoreError, open_store
from modelpool.messages.dump import Dump, StoredKey, StoredModel
from modelpool.messages.keys import KeySpec
from modelpool.messages.models import ModelSpec
from modelpool.messages.routing import Keys, Snapshot
from modelpool.messages.workers import InstanceReport, RegisterWorker, WorkerDescription, WorkerInfo
from modelpool.worker.fence import Fence
from tests import reports
from tests.postgres import Postgres, running_postgres
from tests.stores import ME, answers_lost, held
from tests.wire import read_message, response, serving

PATIENCE_S = 60.0


class World:
    """A manager, its store, and a client of its control API."""

    def __init__(self, store: Store, manager: Manager, http: httpx.AsyncClient) -> None:
        self.store = store
        self.manager = manager
        self.http = http

    async def register(self, alias: str, **more: Any) -> httpx.Response:
        return await self.http.post("/admin/models/register", json={"alias": alias, "fake": True, **more})

    async def aliases(self) -> list[str]:
        return [each["alias"] for each in (await self.http.get("/admin/models")).json()["models"]]

    async def recovered(self) -> bool:
        return not (await self.manager.status()).recovering

    async def until(self, there: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not await there():
                await asyncio.sleep(0.02)


@asynccontextmanager
async def running_world(
    url: str, lease_s: float = 10.0, recovery_s: float = 0.01, holder: Holder = ME
) -> AsyncIterator[World]:
    async with open_store(url, answer_s=min(5.0, lease_s / 3)) as store:
        async with running_manager(
            store, policy=Policy(), token="t", run_id="r", recovery_s=recovery_s, holder=holder, lease_s=lease_s
        ) as manager:
            transport = httpx.ASGITransport(app=control_app(manager))
            async with httpx.AsyncClient(transport=transport, base_url="http://manager") as http:
                yield World(store, manager, http)


@asynccontextmanager
async def sqlite_out(path: Path) -> AsyncIterator[None]:
    """Another program keeps the file to itself."""
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")
    other.close()


@asynccontextmanager
async def postgres_stopped(server: Postgres) -> AsyncIterator[None]:
    server.stop()
    yield
    await asyncio.to_thread(server.start)


@asynccontextmanager
async def postgres_frozen(server: Postgres) -> AsyncIterator[None]:
    server.freeze()
    yield
    server.thaw()


async def go_on_without(url: str, out: AbstractAsyncContextManager[None]) -> None:
    """A manager while its store is out, and afterwards."""
    async with running_world(url, lease_s=3.0) as world:
        assert (await world.register("before")).status_code == 200
        assert world.manager.lease.valid
        async with out:
            answer = await world.register("during")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
            assert "The store" in answer.json()["error"]["message"]
            assert await world.aliases() == ["before"]
            info = WorkerInfo(worker_id="w", incarnation="1", url="http://127.0.0.1:1")
            told = RegisterWorker(info=info, devices=(), engines={})
            answer = await world.http.post("/workers/register", content=msgspec.json.encode(told))
            assert answer.status_code == 200  # it goes on; the next manager is told of it later
            await world.until(_is(lambda: not world.manager.lease.valid))
        await world.until(_is(lambda: world.manager.lease.valid))
        assert (await world.register("during")).status_code == 200
        assert await world.aliases() == ["before", "during"]
        await world.until(_has(world.store.workers, {"w": "http://127.0.0.1:1"}))
    async with held(url) as store:
        assert [each.spec.alias for each in await store.models()] == ["before", "during"]


def test_while_the_file_is_locked_there_are_no_orders_and_it_comes_back_by_itself(tmp_path: Path) -> None:
    asyncio.run(go_on_without(f"sqlite:///{tmp_path}/s.db", sqlite_out(tmp_path / "s.db")))


def test_who_is_alone_gives_orders_while_the_file_is_locked(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_world(f"sqlite:///{tmp_path}/s.db", lease_s=3.0, holder=replace(ME, alone=True)) as world:
            async with sqlite_out(tmp_path / "s.db"):
                await world.until(_is(world.store.trouble.is_set))
                assert world.manager.lease.valid
                assert (await world.register("during")).status_code == 503
            await world.until(_is(lambda: not world.store.trouble.is_set()))
            assert (await world.register("after")).status_code == 200

    asyncio.run(story())


def test_of_many_that_ask_while_the_store_is_silent_one_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with running_world(f"sqlite:///{tmp_path}/s.db", lease_s=6.0) as world:
            add, tried = world.store.add_model, []

            async def counted(spec: ModelSpec, created: int) -> None:
                tried.append(spec.alias)
                await add(spec, created)

            monkeypatch.setattr(world.store, "add_model", counted)
            async with sqlite_out(tmp_path / "s.db"):
                *answers, worker = await asyncio.gather(
                    *(world.register(f"m{number}") for number in range(20)),
                    world.http.post("/workers/register", content=msgspec.json.encode(told("http://127.0.0.1:1"))),
                )
            assert {answer.json()["error"]["code"] for answer in answers} == {"store_unavailable"}
            assert tried == ["m0"]
            assert worker.status_code == 200
            await world.until(_is(lambda: not world.store.trouble.is_set()))
            assert (await world.register("m0")).status_code == 200

    asyncio.run(story())


def test_of_many_workers_that_leave_while_the_store_is_silent_one_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with running_world(f"sqlite:///{tmp_path}/s.db", lease_s=6.0) as world:
            forget, tried = world.store.forget_worker, []

            async def counted(worker_id: str) -> None:
                tried.append(worker_id)
                await forget(worker_id)

            names = [f"w{number:02d}" for number in range(20)]
            for name in names:
                said = told("http://127.0.0.1:1")
                await world.manager.register_worker(replace(said, info=replace(said.info, worker_id=name)))
            monkeypatch.setattr(world.store, "forget_worker", counted)
            async with sqlite_out(tmp_path / "s.db"):
                await asyncio.gather(*(world.manager.unregister_worker(name) for name in names))
                assert (await world.http.get("/workers")).json() == {"workers": []}
                assert len(tried) <= 1
            await world.until(_has(world.store.workers, {}))

    asyncio.run(story())


def test_a_gateway_that_starts_while_the_store_is_silent_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with running_world(f"sqlite:///{tmp_path}/s.db") as world:
            adding, silent, add = asyncio.Event(), asyncio.Event(), world.store.add_model

            async def held_up(spec: ModelSpec, created: int) -> None:
                adding.set()
                await silent.wait()
                await add(spec, created)

            monkeypatch.setattr(world.store, "add_model", held_up)
            async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
                registered = tasks.create_task(world.register("m"))
                await adding.wait()
                cluster = world.store.epoch.partition(".")[0]
                for known in ("", world.store.epoch, f"{cluster}.0"):
                    assert isinstance(await anext(world.manager.snapshots("g", known)), Keys)
                later = asyncio.ensure_future(anext(world.manager.snapshots("g", f"{cluster}.41")))
                await asyncio.sleep(0.1)
                assert not later.done()
                silent.set()
                update = await later
                assert isinstance(update, Keys)
                assert update.epoch == f"{cluster}.42"
            assert registered.result().status_code == 200

    asyncio.run(story())


def test_while_postgresql_is_out_there_are_no_orders_and_it_comes_back_by_itself() -> None:
    with running_postgres() as server:
        asyncio.run(go_on_without(server.database("a"), postgres_stopped(server)))
        asyncio.run(go_on_without(server.database("b"), postgres_frozen(server)))


def _is(condition: Callable[[], bool]) -> Callable[[], Awaitable[bool]]:
    async def there() -> bool:
        return condition()

    return there


def _has(read: Callable[[], Awaitable[object]], value: object) -> Callable[[], Awaitable[bool]]:
    async def there() -> bool:
        return await read() == value

    return there


def test_a_change_whose_outcome_nobody_heard_is_looked_up(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with running_world(store_url) as world:
            await world.register("old")
            key = (await world.http.post("/admin/keys", json={"name": "a"})).json()["key"]["id"]
            with answers_lost(world.store, monkeypatch):
                assert (await world.register("new")).status_code == 503
                await world.until(_has(world.aliases, ["new", "old"]))
            assert (await world.register("new")).status_code == 200

            with answers_lost(world.store, monkeypatch):
                assert (await world.http.delete("/admin/models/old")).status_code == 503
                await world.until(_has(world.aliases, ["new"]))

            updates = world.manager.snapshots()
            assert isinstance(await anext(updates), Keys)
            with answers_lost(world.store, monkeypatch):
                assert (await world.http.delete(f"/admin/keys/{key}")).status_code == 503
            async with asyncio.timeout(PATIENCE_S):
                async for update in updates:
                    if isinstance(update, Keys):
                        assert (update.required, update.keys) == (True, ())
                        break

    asyncio.run(story())


def test_a_pool_that_became_another_without_a_word_about_it_knows_what_it_is(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with running_world(store_url, lease_s=9.0) as world:
            dump = Dump(cluster="dumped", models=(StoredModel(ModelSpec(alias="m", fake=True), 1),), keys=())
            followed = world.manager.snapshots()
            assert isinstance(await anext(followed), Keys)
            with answers_lost(world.store, monkeypatch):
                body = msgspec.json.encode(dump)
                assert (await world.http.post("/admin/load?restore=true", content=body)).status_code == 503
            async with asyncio.timeout(PATIENCE_S):
                async for update in followed:
                    if isinstance(update, Snapshot) and update.epoch == "dumped.1":
                        break
            assert await world.aliases() == ["m"]
            assert (await world.http.post("/admin/load?restore=true", content=body)).status_code == 200

            worker = replace(told("http://127.0.0.1:1"), epoch="dumped.41")
            with answers_lost(world.store, monkeypatch):
                answer = await world.http.post("/workers/register", content=msgspec.json.encode(worker))
                assert answer.status_code == 503
            await world.until(_is(lambda: world.store.epoch == "dumped.42"))
            assert (await world.register("after")).status_code == 200
        async with held(store_url) as store:
            assert store.epoch == "dumped.43"

    asyncio.run(story())


def test_what_was_loaded_is_known_though_the_store_could_not_be_read_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with running_world(f"sqlite:///{tmp_path}/s.db") as world:
            models, times = world.store.models, 0

            async def fail_once() -> list[StoredModel]:
                nonlocal times
                times += 1
                if times == 1:
                    raise StoreError("The connection broke.")
                return await models()

            monkeypatch.setattr(world.store, "models", fail_once)
            dump = Dump(cluster="other", models=(StoredModel(ModelSpec(alias="m", fake=True), 1),), keys=())
            assert (await world.http.post("/admin/load", content=msgspec.json.encode(dump))).status_code == 503
            await world.until(_has(world.aliases, ["m"]))

    asyncio.run(story())


def test_a_pool_that_was_restored_tells_the_gateways_of_no_model_before_its_workers_are_back(tmp_path: Path) -> None:
    async def story() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            async with running_world(f"sqlite:///{tmp_path}/s.db") as world:
                await world.until(world.recovered)
                dump = Dump(cluster="dumped", models=(StoredModel(ModelSpec(alias="m", fake=True), 1),), keys=())
                worker = msgspec.json.encode(replace(told(url, reports.active("m")), epoch="dumped.1"))
                assert (await world.http.post("/workers/register", content=worker)).status_code == 409
                followed = world.manager.snapshots()
                assert isinstance(await anext(followed), Keys)
                assert await anext(followed) == Snapshot(epoch=world.store.epoch, sequence=1, models={})
                body = msgspec.json.encode(dump)
                assert (await world.http.post("/admin/load?restore=true", content=body)).status_code == 200
                assert (await world.manager.status()).recovering
                async with asyncio.TaskGroup() as tasks:
                    late = tasks.create_task(world.register("late"))
                    await asyncio.sleep(0.5)
                    assert (await world.http.post("/workers/register", content=worker)).status_code == 200
                    assert not late.done()
                assert (await late).status_code == 200
                async with asyncio.timeout(PATIENCE_S):
                    async for update in followed:
                        if isinstance(update, Snapshot):
                            assert [each.instance for each in update.models["m"].routes] == ["m"]
                            break

    asyncio.run(story())


def test_while_a_restored_pool_is_not_known_yet_its_gateways_are_refused_as_they_were_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with running_world(f"sqlite:///{tmp_path}/s.db") as world:
            await world.until(world.recovered)
            models, reading, readable = world.store.models, asyncio.Event(), asyncio.Event()

            async def slowly() -> list[StoredModel]:
                reading.set()
                await readable.wait()
                return await models()

            async def first_update() -> object:
                """As a gateway of the dumped pool asks for it, until it is not refused."""
                while True:
                    with suppress(Conflict):
                        return await anext(world.manager.snapshots("g", "dumped.57"))
                    await asyncio.sleep(0.02)

            monkeypatch.setattr(world.store, "models", slowly)
            monkeypatch.setattr("modelpool.manager.manager._REFUSED_BACK_S", 0.2)
            everything = world.manager.snapshots()
            assert isinstance(await anext(everything), Keys)
            assert await anext(everything) == Snapshot(epoch=world.store.epoch, sequence=1, models={})
            key = StoredKey(id="k", digest="d", spec=KeySpec(name="k"), created=1)
            stored = StoredModel(ModelSpec(alias="m", fake=True), 1)
            dump = Dump(cluster="dumped", models=(stored,), keys=(key,))
            async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
                loading = tasks.create_task(world.manager.load(dump, restore=True))
                await reading.wait()
                assert (await world.manager.status()).recovering
                gateway = tasks.create_task(first_update())
                await asyncio.sleep(0.5)
                assert (await world.manager.status()).recovering
                readable.set()
                await loading
                update = await gateway
            assert isinstance(update, Keys)
            assert (update.epoch, update.required, [each.id for each in update.keys]) == ("dumped.58", True, ["k"])
            async with asyncio.timeout(PATIENCE_S):
                async for update in everything:
                    if isinstance(update, Snapshot):
                        assert list(update.models) == ["m"]
                        break

    asyncio.run(story())


async def go_on_too_long(next_: Store, url: str) -> None:
    async with running_world(url) as world:
        await world.register("a")
        await next_.take_over(ME)  # who has its name need not wait until its lease has run out
        # In a task of its own, awaited afterwards: what ends the manager would end it too, and be answered by it.
        asked = asyncio.create_task(world.register("b"))
        try:
            await asyncio.sleep(PATIENCE_S)
        finally:
            answer = await asked
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "manager_away")


def test_a_manager_that_is_deposed_ends(store_url: str) -> None:
    async def story() -> None:
        async with open_store(store_url) as next_:
            with pytest.raises(Deposed, match="Another manager has taken over"):
                await go_on_too_long(next_, store_url)
            assert [each.spec.alias for each in await next_.models()] == ["a"]
            await next_.renew()

    asyncio.run(story())


def test_a_manager_whose_store_is_put_back_by_hand_says_so_and_the_next_one_goes_on(tmp_path: Path) -> None:
    async def story(url: str) -> None:
        async with held(url):
            pass
        async with running_world(url, lease_s=3.0):
            with sqlite3.connect(tmp_path / "s.db") as backup:
                backup.execute("UPDATE cluster SET epoch = 1")
            await asyncio.sleep(PATIENCE_S)

    async def stories() -> None:
        url = f"sqlite:///{tmp_path}/s.db"
        with pytest.raises(Rewound, match="The store is an earlier one than that of this manager: 1 is there, not 2"):
            await story(url)
        async with running_world(url) as world:
            assert (await world.register("a")).status_code == 200

    asyncio.run(stories())


def test_who_knows_a_later_epoch_is_told_one_that_is_later_still(store_url: str) -> None:
    async def story() -> None:
        async with running_world(store_url) as world:
            cluster = world.store.epoch.partition(".")[0]
            followed = world.manager.snapshots()
            assert isinstance(await anext(followed), Keys)
            info = WorkerInfo(worker_id="w", incarnation="1", url="http://127.0.0.1:1")
            told = RegisterWorker(info=info, devices=(), engines={}, epoch=f"{cluster}.41")
            answer = await world.http.post("/workers/register", content=msgspec.json.encode(told))
            assert answer.json()["epoch"] == f"{cluster}.42"
            async with asyncio.timeout(PATIENCE_S):
                async for update in followed:
                    if isinstance(update, Snapshot) and update.epoch == f"{cluster}.42":
                        break
            assert (await world.http.get("/admin/status")).json()["epoch"] == f"{cluster}.42"

    asyncio.run(story())


def test_workers_and_gateways_of_another_cluster_are_left_alone(store_url: str) -> None:
    async def story() -> None:
        async with running_world(store_url) as world:
            said = replace(told("http://127.0.0.1:1", reports.active("m")), epoch="other.3")
            answer = await world.http.post("/workers/register", content=msgspec.json.encode(said))
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "other_cluster")
            answer = await world.http.get("/snapshots", params={"epoch": "other.3"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "other_cluster")
            assert (await world.http.get("/admin/workers")).json() == {"workers": []}

    asyncio.run(story())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("info.url", "http://127.0.0.1:1/\0"),
        ("info.url", "http://127.0.0.1:70000"),
        ("info.url", "http://[::1"),
        ("info.worker_id", "w\0"),
        ("info.worker_id", ""),
        ("epoch", f".{10**19}"),
    ],
)
def test_a_worker_says_nothing_that_the_store_cannot_take(store_url: str, field: str, value: str) -> None:
    async def story() -> None:
        async with running_world(store_url) as world:
            said = told("http://127.0.0.1:1")
            if field == "epoch":
                said = replace(said, epoch=world.store.epoch.partition(".")[0] + value)
            else:
                said = replace(said, info=replace(said.info, **{field.removeprefix("info."): value}))
            answer = await world.http.post("/workers/register", content=msgspec.json.encode(said))
            assert (answer.status_code, answer.json()["error"]["param"]) == (422, field)
            assert not world.store.trouble.is_set()

    asyncio.run(story())


def told(url: str, *instances: InstanceReport, incarnation: str = "1") -> RegisterWorker:
    info = WorkerInfo(worker_id="w", incarnation=incarnation, url=url)
    return RegisterWorker(info=info, devices=(), engines={}, instances=instances)


async def active(world: World, alias: str) -> list[tuple[str, str]]:
    view = (await world.http.get(f"/admin/models/{alias}")).json()
    return [(each["worker_id"], each["state"]) for each in view["instances"]]


def test_a_new_manager_takes_a_silent_worker_to_run_what_it_ran_and_a_dead_one_nothing(store_url: str) -> None:
    async def before(url: str) -> None:
        async with running_world(store_url) as world:
            await world.register("m")
            await world.http.post("/workers/register", content=msgspec.json.encode(told(url, reports.active("m"))))
            assert await active(world, "m") == [("w", "ACTIVE")]

    async def story() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            await before(url)
            async with running_world(store_url, recovery_s=2.0) as world:
                await world.until(world.recovered)
                assert await active(world, "m") == [("w", "ACTIVE")]
                async with asyncio.timeout(PATIENCE_S):
                    async for update in world.manager.snapshots():
                        if isinstance(update, Snapshot):
                            assert [each.instance for each in update.models["m"].routes] == ["m"]
                            break
        async with running_world(store_url, recovery_s=1.0) as world:
            await world.until(world.recovered)
            assert await active(world, "m") == []

    asyncio.run(story())


@pytest.mark.parametrize("url", ["http://127.0.0.1:70000", "http://jump:${PORT}", "http://xn--a"])
def test_a_worker_that_was_written_down_where_nobody_can_be_keeps_no_manager_from_its_work(
    tmp_path: Path, url: str
) -> None:
    """As by a manager that did not look."""

    async def story() -> None:
        store_url = f"sqlite:///{tmp_path}/s.db"
        info = WorkerInfo(worker_id="w", incarnation="1", url=url, direct=False)
        async with running_world(store_url) as world:
            await world.register("m")
            await world.store.remember_worker("w", url)
            await world.store.keep_last_known(
                [WorkerDescription(info=info, devices=(), engines={}, instances=(reports.active("m"),))]
            )
        async with running_world(store_url, recovery_s=0.5) as world:
            await world.until(world.recovered)
            assert await active(world, "m") == []
            assert (await world.http.get("/workers")).json() == {"workers": []}

    asyncio.run(story())


@pytest.mark.parametrize("body", [b'{"info": {"worker_id": "\xff"}}', b"[" * 5000, b"hello"])
def test_who_listens_where_a_worker_was_ends_no_manager(tmp_path: Path, body: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_message(reader)
            writer.write(response(body))

    async def story() -> None:
        store_url = f"sqlite:///{tmp_path}/s.db"
        async with serving(answer) as endpoint:
            async with running_world(store_url) as world:
                await world.store.remember_worker("w", f"http://{endpoint.host}:{endpoint.port}")
            async with running_world(store_url, recovery_s=0.5) as world:
                await world.until(world.recovered)
                assert (await world.register("m")).status_code == 200

    asyncio.run(story())


def test_an_idle_worker_goes_to_another_cluster_and_is_outlived_in_its_own(store_url: str) -> None:
    """It knows an epoch that is later than the store, as after a restore from a backup."""

    async def story() -> None:
        fence = Fence(lambda: False)

        async def registered(world: World) -> tuple[int, str]:
            said = replace(told("http://127.0.0.1:1"), epoch=fence.epoch)
            answer = await world.http.post("/workers/register", content=msgspec.json.encode(said))
            fence.hear(answer.json()["epoch"])
            return answer.status_code, fence.epoch

        fence.hear("other.7")
        async with running_world(store_url) as world:
            cluster = world.store.epoch.partition(".")[0]
            assert await registered(world) == (200, world.store.epoch)
            fence.hear(f"{cluster}.41")
            assert await registered(world) == (200, f"{cluster}.42")

    asyncio.run(story())


async def worker_registers(world: World, url: str, incarnation: str = "1") -> None:
    answer = await world.http.post("/workers/register", content=msgspec.json.encode(told(url, incarnation=incarnation)))
    assert answer.status_code == 200, answer.text


async def worker_is_alive(world: World) -> bool:
    return [each["alive"] for each in (await world.http.get("/workers")).json()["workers"]] != [False]


def test_workers_that_move_and_leave_while_the_store_is_out_are_written_down_later(tmp_path: Path) -> None:
    async def story() -> None:
        url = f"sqlite:///{tmp_path}/s.db"
        with socket.create_server(("127.0.0.1", 0)) as silent:
            elsewhere = f"http://127.0.0.1:{silent.getsockname()[1]}"
            async with running_world(url, lease_s=3.0) as world:
                await worker_registers(world, "http://127.0.0.1:1")
                await world.until(_has(partial(worker_is_alive, world), False))
                async with sqlite_out(tmp_path / "s.db"):
                    await worker_registers(world, elsewhere, "2")
                await world.until(_has(world.store.workers, {"w": elsewhere}))

                assert (await world.http.post("/admin/workers/w/drain")).status_code == 200
                async with sqlite_out(tmp_path / "s.db"):
                    assert (await world.http.delete("/workers/w/unregister")).status_code == 200
                await world.until(_has(world.store.workers, {}))
                assert await world.store.draining() == []
                await worker_registers(world, elsewhere, "3")
                assert not (await world.http.get("/workers")).json()["workers"][0]["draining"]

    asyncio.run(story())


def test_a_drained_worker_that_ended_while_no_manager_was_there_is_forgotten_where_it_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(back: bool) -> None:
        url = f"sqlite:///{tmp_path}/{back}.db"
        async with held(url) as store:
            await store.remember_worker("w", "http://127.0.0.1:1")
            await store.drain("w", drain=True)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            async with running_world(url, recovery_s=2.0) as world:
                await world.until(_has(partial(worker_is_alive, world), False))
                if not back:
                    await world.until(_has(world.store.draining, []))
                await worker_registers(world, f"http://127.0.0.1:{silent.getsockname()[1]}")
                assert (await world.http.get("/workers")).json()["workers"][0]["draining"] is back

    asyncio.run(story(back=True))
    monkeypatch.setattr(changes, "WORKER_BACK_S", 0.1)
    asyncio.run(story(back=False))
