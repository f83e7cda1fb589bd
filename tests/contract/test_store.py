"""What survives a manager, in each of the databases that may hold it, and who may change it."""

from __future__ import annotations

import asyncio
import resource
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from msgspec.structs import replace

from modelpool.core.epoch import cluster_of, number_of
from modelpool.manager import tables
from modelpool.manager.migrations import HEAD
from modelpool.manager.store import Deposed, Holder, StoreError, StoreInUse, open_store
from modelpool.messages.dump import StoredKey
from modelpool.messages.keys import KeySpec
from modelpool.messages.models import ModelSpec
from tests.stores import ME, OTHER, answers_lost, held

OLD = Path(__file__).parent / "stores"


def file(path: Path) -> str:
    return f"sqlite:///{path}"


def test_what_is_replaced_and_who_is_being_drained_is_there_again_after_a_restart(store_url: str) -> None:
    async def story() -> None:
        async with held(store_url) as store:
            await store.add_model(spec("a"), 1)
            await store.change_model(spec("a"), ("key", "former"))
            for worker in ("going", "gone", "staying"):
                await store.remember_worker(worker, "http://one")
                await store.drain(worker, drain=True)
                await store.drain(worker, drain=True)
            await store.drain("staying", drain=False)
            await store.forget_worker("gone")
            await store.remember_worker("going", "http://two")
        async with held(store_url) as store:
            assert [each.replaces for each in await store.models()] == [("key", "former")]
            assert await store.draining() == ["going"]

    asyncio.run(story())


def spec(alias: str) -> ModelSpec:
    return ModelSpec(alias=alias, fake=True, fake_capacity=3, engine_args={"a": [1, {"b": None}]})


def key(id: str) -> StoredKey:
    return StoredKey(id=id, digest=f"digest of {id}", spec=KeySpec(name=id, models=("a", "b/c")), created=5)


def test_models_keys_and_workers_are_there_again_after_a_restart(store_url: str) -> None:
    async def story() -> None:
        async with held(store_url) as store:
            epoch = store.epoch
            await store.add_model(spec("a"), 1)
            await store.add_model(spec("b"), 2)
            await store.remove_model("a")
            assert not await store.has_keys()
            await store.add_key(key("k1"))
            await store.add_key(key("k2"))
            await store.revoke_key("k2", 9)
            await store.remember_worker("w", "http://one")
            await store.remember_worker("w", "http://two")
            await store.remember_worker("v", "http://three")
            await store.forget_worker("v")
        async with held(store_url) as store:
            assert [(each.spec, each.created) for each in await store.models()] == [(spec("b"), 2)]
            assert sorted((each.id, each.revoked) for each in await store.keys()) == [("k1", None), ("k2", 9)]
            assert key("k1") in await store.keys()
            assert await store.has_keys()
            assert await store.workers() == {"w": "http://two"}
            assert cluster_of(store.epoch) == cluster_of(epoch)
            assert number_of(store.epoch) == number_of(epoch) + 1

    asyncio.run(story())


# ------------------------------------------------------------ who holds it


def test_a_manager_that_was_deposed_changes_nothing(store_url: str) -> None:
    async def story() -> None:
        async with open_store(store_url) as old, open_store(store_url) as new:
            await old.take_over(ME)
            await old.add_model(spec("a"), 1)
            await old.add_key(key("k"))
            await old.let_go()  # as if its lease had run out
            await new.take_over(OTHER)
            writes: list[Callable[[], Awaitable[None]]] = [
                lambda: old.add_model(spec("b"), 2),
                lambda: old.change_model(spec("a"), ()),
                lambda: old.remove_model("a"),
                lambda: old.add_key(key("l")),
                lambda: old.revoke_key("k", 3),
                lambda: old.remember_worker("w", "http://one"),
                lambda: old.forget_worker("w"),
                lambda: old.go_past(7),
                lambda: old.renew(),
                lambda: old.let_go(),
            ]
            for write in writes:
                with pytest.raises(Deposed, match="Another manager has taken over"):
                    await write()
            assert [each.spec.alias for each in await new.models()] == ["a"]
            assert [(each.id, each.revoked) for each in await new.keys()] == [("k", None)]
            assert await new.workers() == {}
            await new.renew()

    asyncio.run(story())


def test_a_manager_waits_for_the_lease_of_one_that_is_silent(store_url: str) -> None:
    async def story() -> None:
        async with open_store(store_url) as silent, open_store(store_url) as next_:
            await silent.take_over(ME, lease_s=1.0)
            begun = asyncio.get_running_loop().time()
            await next_.take_over(OTHER, lease_s=1.0)
            assert asyncio.get_running_loop().time() - begun > 0.5
            with pytest.raises(Deposed):
                await silent.renew()

    asyncio.run(story())


def test_a_manager_does_not_take_over_from_one_that_is_alive(store_url: str) -> None:
    async def story() -> None:
        async with held(store_url, lease_s=2.0) as store, open_store(store_url) as other:
            taking = asyncio.create_task(other.take_over(OTHER, lease_s=2.0))
            while not taking.done():
                await store.renew()
                await asyncio.sleep(0.1)
            with pytest.raises(StoreInUse, match=r"in use by the manager on here \(process 1\)"):
                await taking
            await store.renew()

    asyncio.run(story())


def test_one_that_comes_after_its_own_death_need_not_wait(store_url: str) -> None:
    async def story() -> None:
        async with open_store(store_url) as dead:
            await dead.take_over(ME, lease_s=60.0)
        async with asyncio.timeout(30), open_store(store_url) as store:
            await store.take_over(ME, lease_s=60.0)

    asyncio.run(story())


def test_of_two_that_begin_a_new_store_at_once_each_has_its_turn(store_url: str) -> None:
    async def begin(number: int) -> str:
        async with held(store_url, Holder(id=str(number), name=str(number)), lease_s=5.0) as store:
            await store.add_model(spec(f"m{number}"), number)
            return store.epoch

    async def story() -> None:
        epochs = await asyncio.gather(*(begin(number) for number in range(6)))
        assert len({cluster_of(epoch) for epoch in epochs}) == 1
        assert sorted(number_of(epoch) for epoch in epochs) == [1, 2, 3, 4, 5, 6]
        async with open_store(store_url) as store:
            assert len(await store.models()) == 6

    asyncio.run(story())


def test_an_epoch_can_go_past_one_that_is_known_elsewhere(store_url: str) -> None:
    async def story() -> None:
        async with held(store_url) as store:
            await store.go_past(41)
            assert number_of(store.epoch) == 42
            await store.add_model(spec("a"), 1)
        async with held(store_url) as store:
            assert number_of(store.epoch) == 43

    asyncio.run(story())


# ------------------------------------------------------------ its tables


@pytest.mark.parametrize("schema", [1, 2, 3])
def test_a_store_of_an_older_version_keeps_all_that_is_in_it(schema: int, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "s.db") as connection:
        connection.executescript((OLD / f"schema-{schema}.sql").read_text())

    async def story() -> None:
        for epoch in (4, 5):
            async with held(file(tmp_path / "s.db")) as store:
                assert number_of(store.epoch) == epoch
                models = {each.spec.alias: each for each in await store.models()}
                assert models["org/a"].spec.engine_args == {"dtype": "bfloat16"}
                assert (models["b"].spec.min_replicas, models["b"].created) == (2, 1700000002)
                assert await store.workers() == {"w1": "http://10.0.0.1:7000"}
                keys = {each.id: each for each in await store.keys() if "new" not in each.id}
                assert set(keys) == ({"key-1", "key-2"} if schema >= 2 else set())
                if keys:
                    assert (keys["key-1"].spec.requests_per_minute, keys["key-2"].revoked) == (60, 1700000005)
                learned = [(each.alias, each.resting, each.measured) for each in await store.experience()]
                assert learned == ([("b", True, {"w1": {"start": (2.5, 3.0)}})] if schema >= 3 else [])
                await store.add_key(key(f"new-{epoch}"))

    asyncio.run(story())


def test_the_migrations_make_the_tables_that_the_code_knows(store_url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    def differences(connection: sa.Connection) -> list[object]:
        context = MigrationContext.configure(connection, opts={"include_name": lambda name, *_: name != "meta"})
        assert context.get_current_revision() == HEAD
        return list(compare_metadata(context, tables.metadata))

    async def story() -> None:
        async with open_store(store_url) as store, store._engine.begin() as connection:
            assert await connection.run_sync(differences) == []

    asyncio.run(story())


def test_a_store_of_a_later_schema_or_no_store_at_all_is_refused(store_url: str, tmp_path: Path) -> None:
    async def opened(url: str) -> None:
        async with open_store(url):
            pass

    async def renamed() -> None:
        async with open_store(store_url) as store, store._engine.begin() as connection:
            await connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'later'")

    asyncio.run(renamed())
    with pytest.raises(StoreError, match=f"schema later; this version knows {HEAD}"):
        asyncio.run(opened(store_url))
    with sqlite3.connect(tmp_path / "old.db") as connection:
        connection.executescript(
            (OLD / "schema-1.sql").read_text() + "UPDATE meta SET value = 99 WHERE name = 'schema'"
        )
    with pytest.raises(StoreError, match="schema 99"):
        asyncio.run(opened(file(tmp_path / "old.db")))
    (tmp_path / "text.db").write_text("not a database, but long enough to be read as one" * 10)
    with pytest.raises(StoreError, match="not a database"):
        asyncio.run(opened(file(tmp_path / "text.db")))
    with pytest.raises(StoreError, match="sslmode"):
        asyncio.run(opened("postgresql://u@127.0.0.1:1/db?sslmode=never"))
    with pytest.raises(StoreError, match="begins with `mysql`; it must be postgresql://"):
        asyncio.run(opened("mysql://h/db"))


# ------------------------------------------------------------ when it fails


def test_a_write_that_the_disk_refuses_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        path = tmp_path / "s.db"
        async with held(file(path)) as store:
            await store.add_model(spec("a"), 1)
            with sqlite3.connect(path) as other:
                pages = other.execute("PRAGMA page_count").fetchone()[0]
            async with store._engine.begin() as connection:
                await connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
            big = ModelSpec(alias="b", fake=True, fake_response="x" * 200_000)
            with pytest.raises(StoreError, match="full"):
                await store.add_model(big, 2)
            assert [each.spec.alias for each in await store.models()] == ["a"]

    asyncio.run(story())


@pytest.mark.parametrize("replaced", [False, True])
def test_what_would_be_written_to_a_file_that_was_removed_is_refused(replaced: bool, tmp_path: Path) -> None:
    async def story() -> None:
        path, elsewhere = tmp_path / "s.db", tmp_path / "elsewhere.db"
        async with open_store(file(path)) as store:
            await store.take_over(ME)
            await store.add_model(spec("a"), 1)
            path.rename(elsewhere)
            if replaced:
                path.write_bytes(b"")
            with pytest.raises(StoreError, match=f"{path} was removed or replaced while it was in use"):
                await store.add_model(spec("b"), 2)
            elsewhere.rename(path)
            await store.add_model(spec("c"), 3)
            assert [each.spec.alias for each in await store.models()] == ["a", "c"]

    asyncio.run(story())


@contextmanager
def full_disk() -> Iterator[None]:
    """No file takes any more, of whichever part of this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_who_is_alone_holds_a_store_that_cannot_be_written_to_and_says_so_later(tmp_path: Path) -> None:
    async def story() -> None:
        url = file(tmp_path / "s.db")
        async with open_store(url) as before, open_store(url) as store:
            await before.take_over(ME)
            await before.add_model(spec("a"), 1)
            with full_disk():
                with pytest.raises(StoreError, match="cannot be used"):
                    await store.take_over(ME)
                await store.take_over(replace(ME, alone=True))
                assert number_of(store.epoch) == number_of(before.epoch) + 1
                assert [each.spec.alias for each in await store.models()] == ["a"]
                with pytest.raises(StoreError, match="cannot be used"):
                    await store.add_model(spec("b"), 2)
            await store.add_model(spec("b"), 2)
            await store.renew()
            with pytest.raises(Deposed):
                await before.renew()
        async with held(url) as after:
            assert number_of(after.epoch) == number_of(store.epoch) + 1
            assert [each.spec.alias for each in await after.models()] == ["a", "b"]

    asyncio.run(story())


def test_who_has_said_so_at_last_and_did_not_hear_that_it_was_written_is_still_the_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        url = file(tmp_path / "s.db")
        async with open_store(url) as store:
            with full_disk():
                await store.take_over(replace(ME, alone=True))
            epoch = store.epoch
            with answers_lost(store, monkeypatch), pytest.raises(StoreError, match="broke after the commit"):
                await store.add_model(spec("a"), 1)
            await store.add_model(spec("b"), 2)
            assert store.epoch == epoch
            assert [each.spec.alias for each in await store.models()] == ["a", "b"]

    asyncio.run(story())


def test_who_thought_to_be_alone_and_was_not_is_told(tmp_path: Path) -> None:
    async def story() -> None:
        url = file(tmp_path / "s.db")
        async with open_store(url) as store:
            with full_disk():
                await store.take_over(replace(ME, alone=True))
            async with held(url, OTHER):
                with pytest.raises(Deposed):
                    await store.renew()

    asyncio.run(story())


def test_a_model_that_cannot_be_read_keeps_no_other_from_being_served(store_url: str) -> None:
    async def story() -> None:
        async with held(store_url) as store:
            await store.add_model(spec("a"), 1)
            await store.add_model(spec("b"), 2)
            broken = sa.update(tables.models).where(tables.models.c.alias == "a").values(spec={"alias": "a", "x": 1})
            async with store._engine.begin() as connection:
                await connection.execute(broken)
        async with open_store(store_url) as store:
            assert [each.spec.alias for each in await store.models()] == ["b"]

    asyncio.run(story())
