"""The gateway processes of one node of a cluster: adopted, replaced, ended, by one supervisor after the other."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from modelpool.cluster.gateways import NodeGateways
from modelpool.home import Home
from modelpool.process import DETACHED, is_retiring
from modelpool.process_group import ProcessGroup
from modelpool.process_table import values_of
from modelpool.relay import Endpoint
from modelpool.settings import GatewaySettings, Settings
from tests.contract.test_gateway_control import Manager
from tests.gateway_world import Client, chat, entry, request, snapshot_of
from tests.wire import on_uvloop, read_message, response, serving


class Slow:
    """An instance that answers once it is let."""

    def __init__(self) -> None:
        self.asked, self.go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_message(reader)
            self.asked.set()
            await self.go_on.wait()
            writer.write(response(b"done"))


class Node:
    """A node's home, and what serves in it."""

    def __init__(self, path: Path) -> None:
        self.home = Home(path)
        self.settings = Settings(home=str(path), gateway=GatewaySettings(port=0))
        self.url = ""

    async def start(self, **changes: object) -> NodeGateways:
        """What the next replica does. The one before is gone, and its gateways are not."""
        self.settings = msgspec.structs.replace(self.settings, **changes)
        gateways = NodeGateways(self.settings, self.home, self.url)
        await gateways.start()
        gateways.close()
        self.url = gateways.url
        return gateways

    async def serving(self, count: int = 1) -> set[int]:
        """Once there are so many."""
        while len(found := {pid for pid in self.processes() if not is_retiring(pid)}) != count:
            await asyncio.sleep(0.01)
        return found

    def processes(self) -> list[int]:
        return [pid for pid, tag in values_of(DETACHED).items() if tag.startswith(f"{self.home.path}:")]

    async def client(self) -> Client:
        return Client(*await asyncio.open_connection(*Endpoint.parse(self.url)))


@asynccontextmanager
async def node(path: Path) -> AsyncIterator[tuple[Node, Slow]]:
    """With the model `m`, whose instance is slow."""
    instance, manager, made = Slow(), Manager(path), Node(path)
    async with AsyncExitStack() as stack:
        manager.first = snapshot_of(entry("m", [await stack.enter_async_context(serving(instance))]))
        await stack.enter_async_context(serving(manager, path=made.home.control_socket))
        try:
            yield made, instance
        finally:
            for pid in made.processes():
                psutil.Process(pid).kill()
            made.home.give_back()


@on_uvloop
async def test_a_successor_adopts_what_is_as_it_wants_it_and_replaces_what_is_not(tmp_path: Path) -> None:
    async with node(tmp_path) as (here, instance):
        await here.start()
        (first,) = await here.serving()
        await here.start()
        assert await here.serving() == {first}

        busy = await here.client()
        busy.send(chat())
        await instance.asked.wait()
        url = here.url
        await here.start(log_level="debug")
        (second,) = await here.serving()
        assert (second != first, here.url) == (True, url)
        assert (await (await here.client()).ask(request("GET", "/health"))).status == 200
        await here.start(log_level="info")
        (third,) = await here.serving()
        assert third not in (first, second), "one that retires is not taken back, though it is as wanted"
        instance.go_on.set()
        assert (await busy.answer()).body == b"done"
        busy.writer.close()
        await ended(first)


@on_uvloop
async def test_where_one_dies_before_it_had_the_old_retire_the_next_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(tmp_path) as (here, _):
        await here.start()
        (old,) = await here.serving()
        with monkeypatch.context() as dying:
            dying.setattr(ProcessGroup, "retire", lambda group: None)
            await here.start(log_level="debug")
        (new,) = await here.serving(2) - {old}
        await here.start()
        await ended(old)
        assert await here.serving() == {new}


@on_uvloop
async def test_whoever_connects_while_gateways_take_each_others_place_is_served(tmp_path: Path) -> None:
    """On connections of their own, so that some are about to be made or wait to be accepted whenever that happens."""
    statuses: Counter[int] = Counter()

    async def keep_asking(here: Node) -> None:
        while True:
            client = await here.client()
            statuses[(await client.ask(request("GET", "/health"))).status] += 1
            client.writer.close()

    async with node(tmp_path) as (here, _), asyncio.TaskGroup() as tasks:
        await here.start()
        asking = [tasks.create_task(keep_asking(here)) for _ in range(16)]
        for level in ("debug", "info", "warning", "error"):
            before = statuses.total()
            await here.start(log_level=level)
            await here.serving()
            assert statuses.total() > before
        for each in asking:
            each.cancel()
    assert set(statuses) == {200}


@on_uvloop
async def test_processes_that_are_no_longer_wanted_retire(tmp_path: Path) -> None:
    async with node(tmp_path) as (here, _):
        await here.start(gateway=GatewaySettings(port=0, processes=2))
        before = await here.serving(2)
        await here.start(gateway=GatewaySettings(port=0, processes=1))
        await asyncio.gather(*map(ended, before))
        assert await here.serving()


@on_uvloop
async def test_on_another_address_a_gateway_takes_its_own_socket(tmp_path: Path) -> None:
    async with node(tmp_path) as (here, _):
        await here.start()
        url = here.url
        await here.start(gateway=GatewaySettings(host="127.0.0.5", port=0))
        assert here.url == url.replace("127.0.0.1", "127.0.0.5")
        assert (await (await here.client()).ask(request("GET", "/health"))).status == 200


@on_uvloop
async def test_at_the_end_those_that_retire_end_too_and_nothing_is_left(tmp_path: Path) -> None:
    async with node(tmp_path) as (here, _):
        await here.start()
        kept = await here.client()
        assert (await kept.ask(request("GET", "/health"))).status == 200
        gateways = await here.start(log_level="debug")
        assert len(here.processes()) == 2
        memory = here.home.shared_memory()
        await gateways.end()
        assert not here.processes()
        assert not memory.is_symlink()


async def ended(pid: int) -> None:
    while psutil.pid_exists(pid):
        await asyncio.sleep(0.01)
