"""What a pool has registered and made is dumped, and loaded into another one, or into the same."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from modelpool.messages.routing import Keys, Snapshot
from tests.contract.test_keys import Pool, digest, running_pool


async def filled(pool: Pool) -> dict[str, Any]:
    """The dump of a pool with two models, a live key and one that was revoked."""
    for body in ({"alias": "a", "fake": True}, {"alias": "org/b", "fake": True, "max_replicas": 2}):
        assert (await pool.http.post("/admin/models/register", json=body)).status_code == 200
    await pool.make(name="alice", models=["a"])
    id, _ = await pool.make(name="bob")
    await pool.http.delete(f"/admin/keys/{id}")
    return await dumped(pool)


async def dumped(pool: Pool) -> dict[str, Any]:
    dump: dict[str, Any] = (await pool.http.get("/admin/dump")).json()
    return dump


def folder(path: Path, name: str) -> Path:
    (path / name).mkdir()
    return path / name


def test_a_dump_is_loaded_whole_told_at_once_and_there_after_a_restart(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_pool(folder(tmp_path, "one")) as one:
            _, secret = await one.make(name="first")
            dump = await filled(one)
            assert secret not in str(dump)
            assert digest(secret) in str(dump)
        async with running_pool(folder(tmp_path, "two")) as two:
            updates = two.manager.snapshots()
            answer = await two.http.post("/admin/load", json=dump)
            assert sorted(answer.json()["models"]) == ["a", "org/b"]
            assert len(answer.json()["keys"]) == 3
            loaded = await dumped(two)
            assert loaded["cluster"] != dump["cluster"]
            assert {**loaded, "cluster": dump["cluster"]} == dump
            live: set[str] = set()
            async with asyncio.timeout(10):
                async for update in updates:
                    if isinstance(update, Keys):
                        live = {each.name for each in update.keys}
                    if isinstance(update, Snapshot) and set(update.models) == {"a", "org/b"}:
                        break
            assert live == {"first", "alice"}
            assert (await two.http.post("/admin/load", json=dump)).json() == {"models": [], "keys": []}
        async with running_pool(tmp_path / "two") as two:
            assert await dumped(two) == loaded

    asyncio.run(story())


def test_what_differs_is_refused_and_nothing_of_the_dump_is_there(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_pool(folder(tmp_path, "one")) as one:
            dump = await filled(one)
        async with running_pool(folder(tmp_path, "two")) as two:
            await two.http.post("/admin/models/register", json={"alias": "org/b", "fake": True, "max_replicas": 3})
            before = await dumped(two)
            answer = await two.http.post("/admin/load", json=dump)
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "alias_taken")
            assert "`org/b`" in answer.json()["error"]["message"]
            assert "max_replicas" in answer.json()["error"]["message"]
            assert await dumped(two) == before

            await two.http.delete("/admin/models/org/b")
            await two.make(name="alice")
            before = await dumped(two)
            answer = await two.http.post("/admin/load", json=dump)
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "key_taken")
            assert await dumped(two) == before

            bad = {**dump, "models": [*dump["models"], {"spec": {"alias": "x"}, "created": 1}]}
            answer = await two.http.post("/admin/load", json=bad)
            assert (answer.status_code, answer.json()["error"]["param"]) == (422, "models[2].spec")
            assert await dumped(two) == before

    asyncio.run(story())


def test_an_empty_pool_can_become_the_one_that_was_dumped_and_another_cannot(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_pool(folder(tmp_path, "one")) as one:
            dump = await filled(one)
        async with running_pool(folder(tmp_path, "two")) as two:
            assert (await two.http.post("/admin/load?restore=true", json=dump)).status_code == 200
            assert await dumped(two) == dump
            assert (await two.http.get("/admin/status")).json()["epoch"].startswith(f"{dump['cluster']}.")
            assert (await two.http.post("/admin/load?restore=true", json=dump)).status_code == 200
            other = {**dump, "cluster": "other", "models": [], "keys": []}
            answer = await two.http.post("/admin/load?restore=true", json=other)
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_empty")

    asyncio.run(story())
