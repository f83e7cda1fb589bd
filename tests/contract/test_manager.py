"""What a manager makes of workers that come and go, and when it answers, over its API."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from modelpool.manager import watches
from modelpool.manager.watches import Watches
from modelpool.manager.worker_client import WorkerClient
from modelpool.messages.workers import Heartbeat, RegisterWorker, WorkerInfo
from tests import reports
from tests.contract.test_keys import Pool, running_pool
from tests.wire import on_uvloop, read_message, serving


async def worker_registers(pool: Pool, incarnation: str) -> None:
    # Nothing listens on port 1.
    info = WorkerInfo(worker_id="w", incarnation=incarnation, url="http://127.0.0.1:1")
    message = RegisterWorker(info=info, devices=(), engines={})
    answer = await pool.http.post("/workers/register", content=msgspec.json.encode(message))
    assert answer.status_code == 200, answer.text


async def workers(pool: Pool) -> list[str]:
    return [each["worker_id"] for each in (await pool.http.get("/workers")).json()["workers"]]


def test_the_goodbye_of_an_earlier_life_of_a_worker_does_not_remove_the_next(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_pool(tmp_path) as pool:
            await worker_registers(pool, "1")
            await worker_registers(pool, "2")
            late = await pool.http.delete("/workers/w/unregister", params={"incarnation": "1"})
            assert (late.status_code, late.json()["error"]["code"]) == (404, "worker_not_found")
            assert await workers(pool) == ["w"]
            assert (await pool.http.delete("/workers/w/unregister?incarnation=2")).status_code == 200
            assert await workers(pool) == []

    asyncio.run(story())


def test_a_report_that_was_held_up_on_its_way_does_not_undo_a_later_one(tmp_path: Path) -> None:
    """As when the gateway that it went to was stopped, and the worker went on to another one meanwhile."""

    async def story() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            await told_by(f"http://127.0.0.1:{silent.getsockname()[1]}")

    async def told_by(url: str) -> None:
        async with running_pool(tmp_path) as pool:
            assert (await pool.http.post("/admin/models/register", json={"alias": "m", "fake": True})).is_success
            info = WorkerInfo(worker_id="w", incarnation="1", url=url)
            runs = reports.active("m")
            register = RegisterWorker(info=info, devices=(), engines={}, number=1)
            again = RegisterWorker(info=info, devices=(), engines={}, instances=(runs,), number=3)
            beat = Heartbeat(incarnation="1", devices=(), engines={}, number=2)

            async def states_after(path: str, said: RegisterWorker | Heartbeat) -> list[str]:
                assert (await pool.http.post(f"/workers/{path}", content=msgspec.json.encode(said))).is_success
                view = (await pool.http.get("/admin/models/m")).json()
                return [each["state"] for each in view["instances"]]

            await states_after("register", register)
            assert await states_after("register", again) == ["ACTIVE"]
            assert await states_after("w/heartbeat", beat) == ["ACTIVE"]
            assert await states_after("register", register) == ["ACTIVE"]
            assert await states_after("w/heartbeat", replace(beat, number=4)) == []
            assert await states_after("w/heartbeat", replace(beat, number=0, instances=(runs,))) == ["ACTIVE"]

    asyncio.run(story())


def test_a_registration_is_answered_once_the_gateways_can_be_told(tmp_path: Path) -> None:
    """A new manager tells them nothing until it has heard its workers: until then they would say 404."""

    async def story() -> None:
        async with running_pool(tmp_path) as pool:
            await worker_registers(pool, "1")
        async with running_pool(tmp_path, recovery_s=60) as pool:
            body = {"alias": "m", "fake": True}
            registering = asyncio.create_task(pool.http.post("/admin/models/register", json=body))
            while not (await pool.http.get("/admin/models")).json()["models"]:
                await asyncio.sleep(0.01)
            assert not registering.done()
            await worker_registers(pool, "1")
            assert (await registering).status_code == 200
            assert not (await pool.http.get("/admin/status")).json()["recovering"]

    asyncio.run(story())


@on_uvloop
async def test_a_watch_that_ends_at_once_is_not_begun_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the worker behind a port forward has ended: the forward takes connections, and closes them."""
    monkeypatch.setattr(watches, "_RETRY_S", 0.2)
    loop = asyncio.get_running_loop()
    tried: list[float] = []
    often = asyncio.Event()

    async def forward(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await read_message(reader)
        tried.append(loop.time())
        if len(tried) == 4:
            often.set()

    async with serving(forward) as endpoint, asyncio.TaskGroup() as tasks:
        client = WorkerClient("t", epoch=lambda: "a.1")
        watched = Watches(client, own=tasks.create_task, gone=lambda info: None)
        began = loop.time()
        watched.begin(WorkerInfo(worker_id="w", incarnation="1", url=f"http://{endpoint}"))
        await often.wait()
        watched.end("w")
        await client.aclose()
    assert tried[-1] - began > 0.5
