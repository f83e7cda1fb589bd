"""API keys at the manager: made, listed, revoked, over its API; what gateways are told, and what the store keeps."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from modelpool.core.pool import Policy
from modelpool.manager.api import control_app
from modelpool.manager.manager import Manager, running_manager
from modelpool.manager.store import open_store
from modelpool.messages.routing import Keys, KeysDelta, Snapshot, Update
from tests.stores import held


class Pool:
    """A manager, and a client of its control API."""

    def __init__(self, manager: Manager, http: httpx.AsyncClient) -> None:
        self.manager = manager
        self.http = http

    async def make(self, **body: object) -> tuple[str, str]:
        """The key's id, and its secret."""
        answer = await self.http.post("/admin/keys", json=body)
        assert answer.status_code == 200, answer.text
        made = answer.json()
        return made["key"]["id"], made["secret"]

    async def listed(self) -> list[dict[str, Any]]:
        keys: list[dict[str, Any]] = (await self.http.get("/admin/keys")).json()["keys"]
        return keys


@asynccontextmanager
async def running_pool(folder: Path, *, recovery_s: float = 0.01) -> AsyncIterator[Pool]:
    async with open_store(f"sqlite:///{folder}/s.db") as store:
        async with running_manager(store, policy=Policy(), token="t", run_id="r", recovery_s=recovery_s) as manager:
            transport = httpx.ASGITransport(app=control_app(manager))
            async with httpx.AsyncClient(transport=transport, base_url="http://manager") as http:
                yield Pool(manager, http)


def digest(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()


async def keys_told(updates: AsyncIterator[Update | None]) -> Keys | KeysDelta:
    async with asyncio.timeout(1):
        async for update in updates:
            if isinstance(update, Keys | KeysDelta):
                return update
    raise AssertionError("the stream ended")


def test_a_secret_is_shown_once_and_is_nowhere_in_the_store(tmp_path: Path) -> None:
    async def story() -> str:
        async with running_pool(tmp_path) as pool:
            id, secret = await pool.make(
                name="alice", models=["m", "org/n"], requests_per_minute=3, tokens_per_minute=9, max_concurrency=2
            )
            assert len(secret) == len("mp-") + 43
            assert secret.startswith("mp-")
            (listed,) = await pool.listed()
            assert listed.pop("created") > 0
            assert listed == {
                "id": id,
                "name": "alice",
                "models": ["m", "org/n"],
                "requests_per_minute": 3,
                "tokens_per_minute": 9,
                "max_concurrency": 2,
                "priority": 0,
                "revoked": None,
            }
            assert secret not in (await pool.http.get("/admin/keys")).text
            return secret

    secret = asyncio.run(story())
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert secret.encode() not in stored
    assert digest(secret).encode() in stored


def test_a_revoked_key_stays_listed_and_its_name_is_free_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_pool(tmp_path) as pool:
            first, _ = await pool.make(name="alice")
            taken = await pool.http.post("/admin/keys", json={"name": "alice"})
            assert (taken.status_code, taken.json()["error"]["code"]) == (409, "name_taken")
            revoked = await pool.http.delete(f"/admin/keys/{first}")
            assert revoked.json()["revoked"] > 0
            assert (await pool.http.delete(f"/admin/keys/{first}")).json() == revoked.json()
            second, _ = await pool.make(name="alice")
            assert {each["id"]: each["revoked"] is None for each in await pool.listed()} == {first: False, second: True}
            missing = await pool.http.delete("/admin/keys/key-0")
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "key_not_found")

    asyncio.run(story())


def test_those_who_follow_are_told_of_each_change_and_a_new_manager_tells_all_at_once(tmp_path: Path) -> None:
    async def first() -> str:
        async with running_pool(tmp_path) as pool:
            updates = pool.manager.snapshots()
            told = await keys_told(updates)
            assert isinstance(told, Keys)
            assert (told.required, told.keys) == (False, ())
            a, secret_a = await pool.make(name="a", priority=5, models=["m"])
            b, secret_b = await pool.make(name="b")
            deltas = [await keys_told(updates), await keys_told(updates)]
            assert all(isinstance(each, KeysDelta) for each in deltas)
            assert [each.sequence for each in deltas] == [told.sequence + 1, told.sequence + 2]
            entries = [entry for each in deltas if isinstance(each, KeysDelta) for entry in each.made]
            assert [(each.id, each.digest, each.priority, each.models) for each in entries] == [
                (a, digest(secret_a), 5, ("m",)),
                (b, digest(secret_b), 0, ()),
            ]
            await pool.http.delete(f"/admin/keys/{a}")
            revoked = await keys_told(updates)
            assert isinstance(revoked, KeysDelta)
            assert (revoked.made, revoked.revoked) == ((), (a,))
            return b

    async def again(live: str) -> None:
        async with running_pool(tmp_path) as pool:
            told = await keys_told(pool.manager.snapshots())
            assert isinstance(told, Keys)
            assert (told.required, [each.id for each in told.keys]) == (True, [live])
            await pool.http.delete(f"/admin/keys/{live}")
            told = await keys_told(pool.manager.snapshots())
            assert isinstance(told, Keys)
            assert (told.required, told.keys) == (True, ())

    asyncio.run(again(asyncio.run(first())))


def test_keys_are_told_and_revoked_while_the_manager_still_waits_for_its_workers(tmp_path: Path) -> None:
    async def story() -> None:
        async with held(f"sqlite:///{tmp_path}/s.db") as store:
            await store.remember_worker("w", "http://127.0.0.1:1")
        async with running_pool(tmp_path, recovery_s=60) as pool:
            id, _ = await pool.make(name="a")
            updates = pool.manager.snapshots()
            told = await keys_told(updates)
            assert isinstance(told, Keys)
            assert [each.id for each in told.keys] == [id]
            await pool.http.delete(f"/admin/keys/{id}")
            async with asyncio.timeout(1):
                update = await anext(updates)
            assert not isinstance(update, Snapshot)
            assert isinstance(update, KeysDelta)
            assert update.revoked == (id,)

    asyncio.run(story())


def test_a_key_that_cannot_be_read_opens_nothing_and_does_not_open_the_pool(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_pool(tmp_path) as pool:
            await pool.make(name="a")
        with sqlite3.connect(tmp_path / "s.db") as connection:
            connection.execute("UPDATE keys SET spec = json_set(spec, '$.priority', 'high')")
        async with running_pool(tmp_path) as pool:
            told = await keys_told(pool.manager.snapshots())
            assert isinstance(told, Keys)
            assert (told.required, told.keys) == (True, ())

    asyncio.run(story())


def test_keys_are_listed_in_one_order_whichever_manager_is_asked(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_pool(tmp_path) as pool:
            for number in range(20):
                await pool.make(name=f"k{number}")
            listed = await pool.listed()
        async with running_pool(tmp_path) as pool:
            assert await pool.listed() == listed

    asyncio.run(story())


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "name", "name"),
        ({"name": ""}, "name", "length"),
        ({"name": "a/b"}, "name", "'a/b' must be"),
        ({"name": "key-1"}, "name", "as the keys' ids do"),
        ({"name": "a", "models": ["m", "no such/"]}, "models", "'no such/' must be"),
        ({"name": "a", "models": "m"}, "models", "array"),
        ({"name": "a", "requests_per_minute": 0}, "requests_per_minute", ">= 1"),
        ({"name": "a", "tokens_per_minute": -1}, "tokens_per_minute", ">= 1"),
        ({"name": "a", "max_concurrency": 1.5}, "max_concurrency", "int"),
        ({"name": "a", "priority": 1001}, "priority", "<= 1000"),
        ({"name": "a", "rpm": 1}, "rpm", "Unknown field `rpm`"),
    ],
)
def test_a_body_that_does_not_fit_is_refused_by_field(
    tmp_path: Path, body: dict[str, object], param: str, says: str
) -> None:
    async def story() -> None:
        async with running_pool(tmp_path) as pool:
            answer = await pool.http.post("/admin/keys", json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (422, param)
            assert says in error["message"]
            assert await pool.listed() == []

    asyncio.run(story())
