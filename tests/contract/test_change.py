"""A model's settings are changed while it is registered: over the API, in the store, and by several at once."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

from tests.contract.test_keys import Pool, running_pool


async def register(pool: Pool, **body: object) -> None:
    answer = await pool.http.post("/admin/models/register", json={"alias": "org/m", "fake": True, **body})
    assert answer.status_code == 200, answer.text


async def change(pool: Pool, **change: object) -> tuple[int, dict[str, object]]:
    """The status, and the spec or the error."""
    answer = await pool.http.patch("/admin/models/org/m", json=change)
    said = answer.json()
    return answer.status_code, said["routing"]["spec"] if answer.status_code == 200 else said["error"]


def test_a_change_is_answered_once_it_is_kept_and_holds_after_a_restart(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_pool(tmp_path) as pool:
            await register(pool, max_replicas=3)
            changed = {"alias": "org/m", "engine": "fake", "fake": True, "min_replicas": 1, "pinned": True}
            assert await change(pool, min_replicas=1, pinned=True, max_replicas=None) == (200, changed)
            with sqlite3.connect(tmp_path / "s.db") as other:
                assert other.execute("SELECT json_extract(spec, '$.min_replicas') FROM models").fetchone() == (1,)
        async with running_pool(tmp_path) as pool:
            assert (await pool.http.get("/admin/models/org/m")).json()["spec"] == changed

    asyncio.run(story())


def test_two_changes_at_once_both_hold_and_of_one_field_one_of_them(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_pool(tmp_path) as pool:
            await register(pool)
            await asyncio.gather(
                *(change(pool, min_replicas=number) for number in range(1, 5)),
                change(pool, pinned=True),
                change(pool, idle_sleep_1_s=7),
            )
            _, spec = await change(pool)
            assert (spec["pinned"], spec["idle_sleep_1_s"]) == (True, 7)
            assert spec["min_replicas"] in range(1, 5)

    asyncio.run(story())


def test_what_cannot_be_changed_is_refused_whole(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_pool(tmp_path) as pool:
            await register(pool)
            status, error = await change(pool, pinned=True, max_model_len=9)
            assert (status, error["param"], error["code"]) == (422, "max_model_len", "field_fixed")
            assert "pinned" not in (await change(pool))[1]
            assert (await pool.http.patch("/admin/models/org/m", content=b"[1]")).status_code == 422
            assert (await pool.http.patch("/admin/models/n", json={})).status_code == 404

    asyncio.run(story())


def test_what_cannot_be_kept_is_not_changed(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_pool(tmp_path) as pool:
            await register(pool)
            with sqlite3.connect(tmp_path / "s.db") as other:
                other.execute("ALTER TABLE models RENAME TO away")
            assert (await change(pool, pinned=True))[0] == 503
            assert "pinned" not in (await pool.http.get("/admin/models/org/m")).json()["spec"]

    asyncio.run(story())


def test_another_registration_says_that_it_can_be_changed(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_pool(tmp_path) as pool:
            await register(pool)
            answer = await pool.http.post(
                "/admin/models/register", json={"alias": "org/m", "fake": True, "pinned": True}
            )
            assert answer.status_code == 409
            assert "`modelpool set`" in answer.json()["error"]["message"]

    asyncio.run(story())
