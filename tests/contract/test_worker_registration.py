"""What a worker's registration makes of the answers that it gets, and what it tells its user of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from modelpool.messages.workers import WorkerDescription, WorkerInfo
from modelpool.worker.fence import Fence
from modelpool.worker.registration import Registration
from tests.wire import on_uvloop, read_message, response, serving

UNAUTHORIZED = b'{"error":{"message":"The cluster token is wrong.","type":"x","param":null,"code":"invalid_api_key"}}'


class Manager:
    """Answers as told, by status and body; `asked` are the requests' first lines."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.body = body
        self.asked: list[str] = []
        self._news = asyncio.Condition()
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, _ = await read_message(reader)
            async with self._news:
                self.asked.append(head.decode().partition(" HTTP/1.1")[0])
                self._news.notify_all()
            writer.write(response(self.body, status=f"{self.status} X"))

    async def was_asked(self, times: int) -> None:
        async with self._news:
            await self._news.wait_for(lambda: len(self.asked) >= times)


@asynccontextmanager
async def registering(status: int, body: bytes, interval_s: float = 60) -> AsyncIterator[tuple[Manager, Registration]]:
    """A registration that runs, with the manager that it knows."""
    manager = Manager(status, body)
    async with serving(manager.handle) as endpoint:
        info = WorkerInfo(worker_id="w", incarnation="1", url="http://127.0.0.1:7000")

        async def describe() -> WorkerDescription:
            return WorkerDescription(info=info, devices=(), engines={}, instances=())

        manager.url = f"http://127.0.0.1:{endpoint.port}"
        registration = Registration(
            manager_url=manager.url,
            token="t",
            info=info,
            describe=describe,
            changed=asyncio.Event(),
            fence=Fence(lambda: True),
            interval_s=interval_s,
        )
        running = asyncio.create_task(registration.run())
        try:
            yield manager, registration
        finally:
            running.cancel()
            await asyncio.wait({running})


@on_uvloop
async def test_a_worker_says_goodbye_where_it_is_registered(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with registering(200, b'{"gateways":[]}') as (manager, registration):
        await manager.was_asked(1)
        while "registered at" not in caplog.text:
            await asyncio.sleep(0.01)
        manager.status = 503
        await registration.unregister()
        assert "unregistered" not in caplog.text
        manager.status = 200
        await registration.unregister()
        assert manager.asked[-1] == "DELETE /workers/w/unregister?incarnation=1"
        assert f"unregistered at {manager.url}" in caplog.text


@on_uvloop
async def test_a_worker_whose_gateway_has_lost_the_manager_goes_on_to_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As when the Ray of that gateway's node has ended, and the manager runs on another."""
    other = Manager(200, b'{"gateways":[]}')
    async with serving(other.handle) as endpoint:
        gateways = f'{{"gateways":["http://127.0.0.1:{endpoint.port}"]}}'.encode()
        async with registering(200, gateways, interval_s=0.05) as (manager, _):
            await manager.was_asked(3)
            manager.body = b'{"error":{"message":"The manager is away.","type":"x","param":null,"code":"manager_away"}}'
            manager.status = 503
            await other.was_asked(2)
            assert other.asked[:2] == ["POST /workers/register", "POST /workers/w/heartbeat"]
            assert f"not registered: {manager.url}: The manager is away" in caplog.text


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, UNAUTHORIZED, "The cluster token is wrong; MODELPOOL_TOKEN must be the content of `cluster-token`"),
        (404, b"<html>", "what answers there takes no workers (status 404); start one there"),
        (200, b"<html>", "what answers there is no Model Pool; start one there"),
        (500, b"<html>", "what answers there is no Model Pool (status 500)"),
    ],
)
def test_a_worker_that_is_refused_says_once_what_to_do_and_tries_on(
    status: int, body: bytes, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def play() -> None:
        async with registering(status, body) as (manager, registration):
            await manager.was_asked(2)
            await registration.unregister()
            assert all(each == "POST /workers/register" for each in manager.asked)
        assert caplog.text.count(f"not registered: {manager.url}: {says}") == 1
        assert '{"error"' not in caplog.text
        assert "unregistered" not in caplog.text

    asyncio.run(asyncio.wait_for(play(), 30))


@on_uvloop
async def test_a_worker_whose_manager_is_away_says_how_to_find_one(caplog: pytest.LogCaptureFixture) -> None:
    async with registering(200, b"{}") as (manager, _):
        url = manager.url
    info = WorkerInfo(worker_id="w", incarnation="1", url="http://127.0.0.1:7000")

    async def describe() -> WorkerDescription:
        return WorkerDescription(info=info, devices=(), engines={}, instances=())

    changed = asyncio.Event()
    registration = Registration(
        manager_url=url,
        token="t",
        info=info,
        describe=describe,
        changed=changed,
        fence=Fence(lambda: True),
        interval_s=60,
    )
    running = asyncio.create_task(registration.run())
    while not caplog.records:
        await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait({running})
    assert f"no manager answers at {url}" in caplog.text
    assert "--manager-url" in caplog.text
