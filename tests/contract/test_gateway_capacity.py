"""An instance is never sent more than it takes at once; the rest waits in the gateway for the next place."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from modelpool.gateway import full_models
from modelpool.home import Home
from modelpool.messages.routing import KeysDelta, Others
from modelpool.relay import Endpoint
from tests.contract.test_gateway_control import Manager
from tests.contract.test_gateway_metrics import until
from tests.contract.test_gateway_process import Gateway, started
from tests.contract.test_gateway_realtime import UPDATE, hear, say, talking
from tests.contract.test_gateway_responses import create, fakes
from tests.contract.test_gateway_waiting import COMMENT, Times, away, rules, until_waiting
from tests.gateway_world import Client, World, chat, entry, gateway, key, snapshot_of
from tests.wire import on_uvloop, read_message, response, serving

ANSWER = response(b"{}", "Content-Type: application/json")


class Engine:
    """Answers each request after `lasting_s`, or when it is let. Its `most` at once."""

    def __init__(self, lasting_s: float = 60.0) -> None:
        self.lasting_s = lasting_s
        self.running: list[asyncio.Event] = []
        self.most = 0
        self.by_user: Counter[str] = Counter()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            _, body = await read_message(reader)
            self.running.append(let := asyncio.Event())
            self.most = max(self.most, len(self.running))
            try:
                async with asyncio.timeout(self.lasting_s):
                    await let.wait()
            except TimeoutError:
                pass
            finally:
                self.running.remove(let)
            self.by_user[msgspec.json.decode(body).get("user", "")] += 1
            writer.write(ANSWER)

    def let(self, count: int = 1) -> None:
        for each in self.running[:count]:
            each.set()

    async def until(self, running: int) -> None:
        async with asyncio.timeout(10):
            while len(self.running) != running:
                await asyncio.sleep(0.001)


async def asked(world: World, count: int, **more: Any) -> list[Client]:
    clients = [await world.connect() for _ in range(count)]
    for client in clients:
        client.send(chat(**more))
    return clients


@on_uvloop
async def test_what_is_more_than_instances_take_waits_and_goes_on_in_order_as_places_are_free() -> None:
    engine = Engine()
    async with serving(engine) as endpoint, gateway(entry("m", [endpoint], capacity=2), rules=rules()) as world:
        clients = []
        for count in range(1, 6):
            clients += await asked(world, 1)
            await engine.until(min(2, count))
            await until_waiting(world, max(0, count - 2))
        for number, client in enumerate(clients):
            engine.let()
            assert (await client.answer()).status == 200
            await engine.until(min(2, 4 - number))
        assert engine.most == 2
        await world.until_idle()


@on_uvloop
async def test_a_new_instance_takes_what_waits_for_the_one_that_is_full() -> None:
    first, second = Engine(), Engine()
    async with serving(first) as one, serving(second) as two:
        async with gateway(entry("m", [one], capacity=2), rules=rules()) as world:
            clients = await asked(world, 5)
            await until_waiting(world, 3)
            Times(world).say(entry("m", [one, two], capacity=2))
            await second.until(2)
            assert (len(first.running), world.room.waiting) == (2, 1)
            second.let()
            await until_waiting(world, 0)
            await second.until(2)
            first.let(2)
            second.let(2)
            assert [(await client.answer()).status for client in clients] == [200] * 5
            assert (first.most, second.most) == (2, 2)


@on_uvloop
async def test_of_many_that_waited_for_a_model_no_more_go_on_than_it_takes() -> None:
    engine = Engine(0.01)
    async with serving(engine) as endpoint, gateway(away(), rules=rules()) as world:
        clients = await asked(world, 60)
        await until_waiting(world, 60)
        Times(world).say(entry("m", [endpoint], capacity=3))
        assert [(await client.answer()).status for client in clients] == [200] * 60
        assert engine.most == 3
        await world.until_idle()


@on_uvloop
async def test_keys_have_their_turns_at_what_is_full() -> None:
    engine, keys = Engine(), [key("mp-a", id="a"), key("mp-b", id="b")]
    async with serving(engine) as endpoint:
        async with gateway(entry("m", [endpoint], capacity=1), keys=keys, rules=rules()) as world:
            clients = await asked(world, 5, headers={"Authorization": "Bearer mp-a"}, user="a")
            await until_waiting(world, 4)
            clients += await asked(world, 2, headers={"Authorization": "Bearer mp-b"}, user="b")
            await until_waiting(world, 6)
            for number in range(1, 8):
                await engine.until(1)
                engine.let()
                while sum(engine.by_user.values()) < number:
                    await asyncio.sleep(0.001)
                if number == 5:
                    assert engine.by_user == {"a": 3, "b": 2}
            assert [(await client.answer()).status for client in clients] == [200] * 7


@on_uvloop
async def test_the_place_of_one_whose_key_was_revoked_is_for_the_next_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_models, "_LOOK_S", 60.0)
    engine, keys = Engine(), [key("mp-a", id="a"), key("mp-b", id="b")]
    async with serving(engine) as endpoint:
        async with gateway(entry("m", [endpoint], capacity=1), keys=keys, rules=rules()) as world:
            (holding,) = await asked(world, 1, headers={"Authorization": "Bearer mp-b"})
            await engine.until(1)
            (revoked,) = await asked(world, 1, headers={"Authorization": "Bearer mp-a"})
            await until_waiting(world, 1)
            (following,) = await asked(world, 1, headers={"Authorization": "Bearer mp-b"})
            await until_waiting(world, 2)
            world.keys.apply(KeysDelta(epoch="e1", sequence=2, revoked=("a",)))
            engine.let()
            assert (await holding.answer()).status == 200
            assert (await revoked.answer()).code == "invalid_api_key"
            await engine.until(1)
            engine.let()
            assert (await following.answer()).status == 200
        await world.until_idle()


@on_uvloop
async def test_what_goes_to_one_instance_leaves_the_places_of_others_to_who_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(full_models, "_LOOK_S", 60.0)
    first, second = Engine(), Engine()
    async with serving(first) as one, serving(second) as two, gateway(away(), rules=rules()) as world:
        model = entry("m", [one, two], capacity=1)
        world.stored.keep("resp_1", model.routes[0])
        clients = [await world.connect() for _ in range(6)]
        for count, client in enumerate(clients, 1):
            client.send(create(previous_response_id="resp_1") if count < 6 else chat())
            await until_waiting(world, count)
        Times(world).say(model)
        await first.until(5)
        await second.until(1)
        first.let(5)
        second.let()
        assert [(await client.answer()).status for client in clients] == [200] * 6
        await world.until_idle()


@on_uvloop
async def test_one_that_may_not_wait_is_told_that_the_model_is_busy() -> None:
    engine = Engine()
    async with serving(engine) as endpoint, gateway(entry("m", [endpoint], capacity=1), rules=rules()) as world:
        first = await asked(world, 1)
        await engine.until(1)
        refused = await world.ask(chat(headers={"X-ModelPool-Max-Wait": "0.05"}))
        assert (refused.status, refused.code) == (503, "model_busy")
        assert "1 at once on one instance" in refused.message
        assert int(refused.headers["retry-after"]) >= 1
        engine.let()
        assert (await first[0].answer()).status == 200
        again = asyncio.ensure_future(world.ask(chat()))
        await engine.until(1)
        engine.let()
        assert (await again).status == 200


@on_uvloop
async def test_a_stream_that_waits_for_a_place_is_told_so_and_one_that_leaves_gives_its_place_up() -> None:
    engine = Engine()
    async with serving(engine) as endpoint, gateway(entry("m", [endpoint], capacity=1), rules=rules()) as world:
        (holding,) = await asked(world, 1)
        await engine.until(1)
        leaving, staying = await asked(world, 2, stream=True)
        await staying.reader.readuntil(COMMENT)
        leaving.abort()
        await until_waiting(world, 1)
        engine.let()
        assert (await holding.answer()).status == 200
        await until_waiting(world, 0)
        await engine.until(1)
        engine.let()
        await world.until_idle()


@on_uvloop
async def test_sessions_wait_for_their_place_too() -> None:
    async with fakes(1) as endpoints, gateway(entry("m", endpoints, capacity=1), rules=rules()) as world:
        async with AsyncExitStack() as stack:
            first, second = [await stack.enter_async_context(talking(world)) for _ in range(2)]
            for client in (first, second):
                assert (await hear(client))["type"] == "session.created"
            await say(first, **UPDATE)
            while world.room.ongoing != 1:
                await asyncio.sleep(0.001)
            await say(second, **UPDATE)
            await until_waiting(world, 1)
            await first.close()
            await until_waiting(world, 0)
            assert [each.own for each in world.table.model("m").instances] == [1]
        await world.until_idle()


@asynccontextmanager
async def gateways(home: Path, count: int, endpoint: Endpoint, capacity: int) -> AsyncIterator[list[Gateway]]:
    """Gateway processes of one node, which know of each other."""
    manager = Manager(home)
    manager.first = snapshot_of(entry("m", [endpoint], capacity=capacity))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(serving(manager, path=Home(home).control_socket))
        environ = {"MODELPOOL_GATEWAY_PROCESSES": str(count)}
        starting = [stack.enter_async_context(started(home, **environ)) for _ in range(count)]
        yield list(await asyncio.gather(*starting))


@on_uvloop
@pytest.mark.parametrize("capacity", [1, 8])
async def test_processes_of_a_node_share_what_an_instance_takes_and_none_is_left_out(
    tmp_path: Path, capacity: int
) -> None:
    engine = Engine(0.02)
    async with serving(engine) as endpoint, gateways(tmp_path, 3, endpoint, capacity) as running:
        ending = time.monotonic() + 3
        served = Counter[int]()

        async def keep_asking(number: int, each: Gateway) -> None:
            client = await each.connect()
            while time.monotonic() < ending:
                answer = await client.ask(chat(version="1.1"))
                assert answer.status == 200
                served[number] += 1
            client.close()

        clients = {0: 20, 1: 8, 2: 4}
        await asyncio.gather(
            *(keep_asking(number, each) for number, each in enumerate(running) for _ in range(clients[number]))
        )
        assert engine.most <= capacity + len(running)
        assert sum(served.values()) > 0.5 * capacity * 3 / 0.02 / 2
        assert min(served.values()) > 0.3 * sum(served.values()) / len(running)


@on_uvloop
async def test_what_a_process_does_not_use_is_used_by_those_where_requests_wait(tmp_path: Path) -> None:
    engine = Engine()
    async with serving(engine) as endpoint, gateways(tmp_path, 3, endpoint, 8) as running:
        clients = []
        for number, count, there in ((0, 1, 1), (1, 7, 8), (1, 8, 8), (2, 8, 8)):
            for _ in range(count):
                clients.append(await running[number].connect())
                clients[-1].send(chat(version="1.1"))
            await engine.until(there)
        await until(running[0], 16, "modelpool_requests_waiting", model="m")
        for each in engine.running[1:]:
            each.set()
        async with asyncio.timeout(10):
            while sum(engine.by_user.values()) < 7 or len(engine.running) < 8:
                await asyncio.sleep(0.001)
        assert len(engine.running) <= 8 + len(running)
        for client in clients:
            client.close()


@on_uvloop
async def test_a_node_keeps_to_its_part_and_goes_on_when_it_grows() -> None:
    engine = Engine()
    async with serving(engine) as endpoint, gateway(entry("m", [endpoint], capacity=8), rules=rules()) as world:
        world.instances.hear(Others(epoch="e1", number=1, nodes=2, instances={"m": 3}))
        clients = await asked(world, 10)
        await engine.until(4)
        await until_waiting(world, 6)
        world.instances.hear(Others(epoch="e1", number=2, nodes=2, instances={"m": 5}))
        world.room.look_again()
        await engine.until(6)
        world.instances.hear(Others(epoch="e1", number=3, nodes=1))
        world.room.look_again()
        await engine.until(8)
        while world.room.ongoing or world.room.waiting:
            engine.let(8)
            await asyncio.sleep(0.001)
        assert [(await client.answer()).status for client in clients] == [200] * 10
        assert engine.most == 8
