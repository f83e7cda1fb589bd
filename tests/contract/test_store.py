from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from modelpool.manager.store import Store, StoreError, open_store
from modelpool.messages.models import ModelSpec


def url(path: Path) -> str:
    return f"sqlite+aiosqlite:///{path}"


def spec(alias: str) -> ModelSpec:
    return ModelSpec(alias=alias, fake=True, fake_capacity=3, engine_args={"a": [1, {"b": None}]})


def test_models_workers_and_the_epoch_are_there_again_after_a_restart(tmp_path: Path) -> None:
    async def first(store: Store) -> int:
        await store.add_model(spec("a"), 1)
        await store.add_model(spec("b"), 2)
        await store.remove_model("a")
        await store.remember_worker("w", "http://one")
        await store.remember_worker("w", "http://two")
        await store.remember_worker("v", "http://three")
        await store.forget_worker("v")
        return await store.next_epoch()

    async def story() -> None:
        async with open_store(url(tmp_path / "s.db")) as store:
            epoch = await first(store)
        async with open_store(url(tmp_path / "s.db")) as store:
            assert [(each.spec, each.created) for each in await store.models()] == [(spec("b"), 2)]
            assert await store.worker_ids() == ["w"]
            assert await store.next_epoch() == epoch + 1

    asyncio.run(story())


def test_a_write_that_the_disk_refuses_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        path = tmp_path / "s.db"
        async with open_store(url(path)) as store:
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


def test_a_store_of_another_schema_or_no_store_at_all_is_refused(tmp_path: Path) -> None:
    async def opened(path: Path) -> None:
        async with open_store(url(path)):
            pass

    asyncio.run(opened(tmp_path / "new.db"))
    with sqlite3.connect(tmp_path / "new.db") as connection:
        connection.execute("UPDATE meta SET value = 99 WHERE name = 'schema'")
    with pytest.raises(StoreError, match="schema 99"):
        asyncio.run(opened(tmp_path / "new.db"))
    (tmp_path / "text.db").write_text("not a database, but long enough to be read as one" * 10)
    with pytest.raises(StoreError, match="not a database"):
        asyncio.run(opened(tmp_path / "text.db"))


def test_a_model_that_cannot_be_read_keeps_no_other_from_being_served(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_store(url(tmp_path / "s.db")) as store:
            await store.add_model(spec("a"), 1)
            await store.add_model(spec("b"), 2)
        with sqlite3.connect(tmp_path / "s.db") as connection:
            connection.execute("UPDATE models SET spec = json_set(spec, '$.fake_capacity', 0) WHERE alias = 'a'")
        async with open_store(url(tmp_path / "s.db")) as store:
            assert [each.spec.alias for each in await store.models()] == ["b"]

    asyncio.run(story())
