"""What a manager learned is in the store, and the next one knows it."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

from msgspec.structs import replace

from modelpool.core.changes import apply
from modelpool.core.events import ModelRegistered, ModelRemoved, Report, WorkerReported
from modelpool.core.learned import Learned, What, learn
from modelpool.core.lifecycle import InstanceState
from modelpool.core.pool import Model, Pool
from modelpool.manager.recollection import Recollection
from modelpool.messages.models import ModelSpec
from tests.stores import held

LEARNED: Learned = learn(learn({}, "w", What.START, 2.0), "w", What.WAKE_1, 0.1)


def url(path: Path) -> str:
    return f"sqlite:///{path}/s.db"


def pool(*aliases: str) -> Pool:
    """At rest, with something learned."""
    known = Pool()
    for alias in aliases:
        model = Model(alias=alias, key=f"key of {alias}", engine="fake", created=0)
        known = apply(known, ModelRegistered(model, LEARNED, True), 0)
    return known


def test_what_was_learned_and_who_rests_is_known_to_the_next_manager(tmp_path: Path) -> None:
    async def story() -> None:
        async with held(url(tmp_path)) as store:
            await Recollection(store).save(pool("a", "b"))
        async with held(url(tmp_path)) as store:
            recalled = await Recollection(store).recall()
            assert recalled == {alias: (f"key of {alias}", LEARNED, True) for alias in ("a", "b")}

    asyncio.run(story())


def test_only_what_is_new_is_written(tmp_path: Path) -> None:
    async def story() -> None:
        async with held(url(tmp_path)) as store:
            first = pool("a", "b")
            await Recollection(store).save(first)
            recollection = Recollection(store)
            first = replace(first, learned={alias: of[1] for alias, of in (await recollection.recall()).items()})
            with sqlite3.connect(tmp_path / "s.db") as other:
                other.execute("UPDATE experience SET key = 'not written again'")
            report = Report(instance="b", alias="b", key="key of b", state=InstanceState.ACTIVE)
            news = WorkerReported(worker_id="w", incarnation="1", devices=(), engines={}, reports=(report,))
            await recollection.save(apply(first, news, 1))
            recalled = await Recollection(store).recall()
            assert recalled["a"] == ("not written again", LEARNED, True)
            assert recalled["b"] == ("key of b", LEARNED, False)

    asyncio.run(story())


def test_it_goes_with_its_model(tmp_path: Path) -> None:
    async def story() -> None:
        async with held(url(tmp_path)) as store:
            recollection = Recollection(store)
            both = pool("a", "b")
            await recollection.save(both)
            await store.add_model(ModelSpec(alias="a", fake=True), 0)
            await store.remove_model("a")
            await recollection.save(apply(both, ModelRemoved("a"), 1))
            assert list(await recollection.recall()) == ["b"]

    asyncio.run(story())


def test_a_row_that_cannot_be_read_keeps_no_other_from_being_known(tmp_path: Path) -> None:
    async def story() -> None:
        async with held(url(tmp_path)) as store:
            await Recollection(store).save(pool("a", "b"))
            with sqlite3.connect(tmp_path / "s.db") as other:
                other.execute("UPDATE experience SET measured = '[1]' WHERE alias = 'a'")
            assert list(await Recollection(store).recall()) == ["b"]

    asyncio.run(story())


def test_what_cannot_be_written_now_is_written_with_the_next(tmp_path: Path) -> None:
    async def story() -> None:
        async with held(url(tmp_path)) as store:
            recollection = Recollection(store)
            with sqlite3.connect(tmp_path / "s.db") as other:
                other.execute("ALTER TABLE experience RENAME TO away")
            await recollection.save(pool("a"))
            with sqlite3.connect(tmp_path / "s.db") as other:
                other.execute("ALTER TABLE away RENAME TO experience")
            await recollection.save(pool("a"))
            assert list(await recollection.recall()) == ["a"]

    asyncio.run(story())
